"""A number of bits that no width has is a budget, of which layers get their shares."""

import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy

from kashin_jax.cli import main
from kashin_jax.errors import UsageError
from kashin_jax.io import open_checkpoint
from kashin_jax.methods import RTN, JointKashin
from kashin_jax.pipeline import Rule, Rules, mixed_widths, quantize_checkpoint
from kashin_jax.pipeline.allocate import JOINT_ERRORS
from kashin_jax.pipeline.mixed_widths import mixed_checkpoint_rules

OPT = pathlib.Path(__file__).parent / "golden" / "opt" / "prenorm"
FAST = Rules(config=JointKashin(effort="fast"))


@pytest.fixture(autouse=True)
def two_widths(monkeypatch):
    """Every width is another program to compile."""
    errors = {width: JOINT_ERRORS[width] for width in (2, 3)}
    monkeypatch.setattr(mixed_widths, "JOINT_ERRORS", errors)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    sizes = {"up": 1.0, "down": 5.0, "side": 0.1}
    safetensors.numpy.save_file(
        {
            f"layers.0.{name}.weight": np.float32(rng.normal(0, std, (64, 64)))
            for name, std in sizes.items()
        },
        directory / "model.safetensors",
    )
    return directory


def kashin(*arguments):
    return main(["quantize", *map(str, arguments), "--set=effort=fast"])


def test_the_command_gives_large_weights_more_bits_and_says_by_what(
    source, tmp_path, capsys
):
    target = tmp_path / "q"
    # Of 64 x 64, scales, levels and seed take .58 bits a weight at 2 bits.
    assert kashin(source, target, "--bits=3.1") == 0
    printed = capsys.readouterr().out
    assert "by squared errors of weights" in printed
    assert ": 2 at 2, 1 at 3." in printed
    found = json.loads((target / "config.json").read_text())["quantization_config"]
    widths = {rule["bits"]: rule["pattern"] for rule in found["rules"]["rules"]}
    assert widths[3] == "^(layers/0/down)$"
    reports = open_checkpoint(target)
    stored = sum(each.size for name in reports.files for each in
                 reports.files[name].specs.values())  # fmt: skip
    assert 8 * stored / (3 * 64 * 64) <= 3.1
    assert not list(target.glob(".sens*"))
    assert kashin(source, target, "--bits=3.1") == 0
    assert "Already done" in capsys.readouterr().out
    assert kashin(source, target, "--bits=3.2") == 2
    assert "other rules" in capsys.readouterr().err


def test_rules_come_first_and_take_no_part(source):
    rules = Rules(config=FAST.config, rules=[Rule("down", RTN(bits=4))])
    found, widths = mixed_checkpoint_rules(open_checkpoint(source), rules, 3.2)
    assert list(widths.bits) == ["layers/0/side", "layers/0/up"]
    assert found.config_for("layers/0/down") == RTN(bits=4)
    assert found.config_for("layers/0/up") == JointKashin(bits=3, effort="fast")


def test_a_budget_is_refused_where_it_cannot_be_kept(source):
    checkpoint = open_checkpoint(source)
    with pytest.raises(UsageError, match="`budget`=2 bits per weight cannot be met"):
        mixed_checkpoint_rules(checkpoint, FAST, 2)
    with pytest.raises(UsageError, match="is for joint coding"):
        mixed_checkpoint_rules(checkpoint, Rules(config=RTN()), 2.7)


def test_an_interrupted_measurement_goes_on_where_it_was(tmp_path, monkeypatch):
    """Of a large model it takes longer than coding does."""
    calls = []

    def measured(model, coded, key, done, keep):
        found = list(done)
        for path in list(coded)[len(done) :]:
            if len(calls) == 5:
                calls.append("interrupted")
                raise KeyboardInterrupt
            calls.append(path)
            found.append(float(len(found)))
            keep(found[-1])
        return dict(zip(coded, found, strict=True))

    monkeypatch.setattr(mixed_widths, "layer_sensitivities", measured)
    target = tmp_path / "q"
    # One width: coding is not what is tested.
    monkeypatch.setattr(mixed_widths, "JOINT_ERRORS", {2: JOINT_ERRORS[2]})
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(OPT, target, FAST, budget=4.9)
    assert (target / ".sensitivities.json").exists()
    result = quantize_checkpoint(OPT, target, FAST, budget=4.9)
    paths = [call for call in calls if call != "interrupted"]
    assert sorted(paths) == sorted(set(paths)) == sorted(result.widths.bits)
    assert "predictions" in result.widths.criterion
    assert not (target / ".sensitivities.json").exists()
