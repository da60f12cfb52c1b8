"""Calibrated runs that are killed anywhere go on to the same bytes, in any mode."""

import functools
import signal

import pytest
from quantized_sources import content
from test_calibration import GPTQ, windows
from test_checkpoints_resume import STATE, Killer, quantize_killed
from tiny_checkpoint import make_checkpoint

from kashin_jax import RTN, AlternatingKashin, JointKashin, KMeans, Rotated, Rules
from kashin_jax.pipeline import Calibration, quantize_checkpoint

MODES = {
    "sequential": {},
    "parallel": {"is_sequential": False},
    "weighted": {"weighting": "gradient"},
    "weighted, parallel": {"is_sequential": False, "weighting": "gradient"},
    "asymmetric": {"is_asymmetric": True},
}
BOTH_SIDES = "joint of both sides"
METHODS = {
    "joint": JointKashin(bits=2, effort="fast"),
    BOTH_SIDES: JointKashin(bits=2, effort="fast"),
    "act-order": RTN(bits=2, group_size=32, act_order=True),
    "k-means": KMeans(bits=2, num_restarts=1),
    "kashin-dct": AlternatingKashin(bits=2),
    "rotated": Rotated(RTN(bits=2, group_size=32)),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Not to be changed."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def killer(monkeypatch):
    return Killer(monkeypatch)


def killed_now_and_then(killer, run, tmp_path, every):
    """Kills a run at some of its steps on the disk, twice, and repeats it."""
    assert not killer.run(functools.partial(run, tmp_path / "whole"))
    steps, expected = killer.count, content(tmp_path / "whole")
    for step in range(every, steps, every):
        again = functools.partial(run, tmp_path / f"{step}")
        assert killer.run(again, at=step)
        killer.run(again, at=step % 7 + 1)
        again()
        assert content(tmp_path / f"{step}") == expected, step
    return steps


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_run_killed_at_any_step_goes_on_to_the_same_bytes(
    killer, tiny, tmp_path, mode
):
    """Guards moments of some layers alone, which another program sums otherwise."""
    text = Calibration(windows=windows(), **MODES[mode])

    def run(target):
        quantize_checkpoint(tiny, target, GPTQ, calibration=text)

    assert killed_now_and_then(killer, run, tmp_path, every=23) > 100


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_the_same_bytes_again_and_after_a_kill(
    killer, tiny, tmp_path, name
):
    rules = Rules(config=METHODS[name])
    of_both = {"weighting": "outputs", "is_asymmetric": True}
    fields = of_both if name == BOTH_SIDES else {}
    text = Calibration(windows=windows(), **fields)

    def run(target):
        quantize_checkpoint(tiny, target, rules, calibration=text)

    run(tmp_path / "again")
    assert killed_now_and_then(killer, run, tmp_path, every=71) > 100
    assert content(tmp_path / "again") == content(tmp_path / "whole")


@pytest.mark.slow
def test_a_process_killed_between_layers_goes_on_in_another_one(tiny, tmp_path):
    """Guards what one process knows and another does not, and the text's draw."""
    text = tiny.with_suffix(".txt")
    flags = ["--method=rtn", "--bits=2", "--set", "group_size=32"]
    flags += [f"--calibration={text}", "--calibration-tokens=256"]
    flags += ["--calibration-weighting=gradient"]

    def run(target, at):
        return quantize_killed(tiny, tmp_path / target, flags, at)

    assert run("expected", at=None).returncode == 0
    assert run("q", at=19).returncode == -signal.SIGKILL
    left = content(tmp_path / "q")
    assert any(name.startswith(".kept-") for name in left) and STATE in left
    assert not any(name.endswith(".safetensors") for name in left)
    assert run("q", at=None).returncode == 0
    found, expected = content(tmp_path / "q"), content(tmp_path / "expected")
    # Says how long each layer took.
    assert found.pop(STATE) != expected.pop(STATE)
    assert found == expected
