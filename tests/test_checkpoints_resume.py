"""Interrupted runs go on to the same bytes, and never mix with another run."""

import errno
import functools
import itertools
import math
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from quantized_sources import FEW, RTN_RULES, content, edit_json, make_source, method

from kashin_jax import Rules
from kashin_jax.errors import CheckpointError, NonFiniteError, UsageError
from kashin_jax.io import TensorWriter, open_checkpoint
from kashin_jax.pipeline import checkpoint, dequantize_checkpoint, quantize_checkpoint
from kashin_jax.pipeline import run as run_module
from kashin_jax.pipeline.resume import Fingerprint, claimed_directory
from kashin_jax.progress import progress_bar

SHARD = 50_000
STATE = ".kashin_quantize.json"


class KilledError(BaseException):
    """Stands for SIGKILL: no handler of the program sees it."""


class Killer:
    """Ends a run at one of its steps on the disk, and everything after it too."""

    def __init__(self, monkeypatch):
        self.count, self.at = 0, None
        for owner, name in (
            (os, "replace"), (os, "fsync"), (pathlib.Path, "unlink"),
            (pathlib.Path, "mkdir"), (pathlib.Path, "write_text"),
            (TensorWriter, "append"),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, self.wrapped(getattr(owner, name)))

    def wrapped(self, function):
        def run(*args, **kwargs):
            self.count += 1
            # Dead programs do not tidy up: what `finally` asks for is not done either.
            if self.at is not None and self.count >= self.at:
                raise KilledError
            return function(*args, **kwargs)

        return run

    def run(self, function, *, at=None):
        """Whether it was killed."""
        self.count, self.at = 0, at
        try:
            function()
        except KilledError:
            return True
        finally:
            self.at = None
        return False


@pytest.fixture
def killer(monkeypatch):
    return Killer(monkeypatch)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("checkpoints") / "source")


@pytest.fixture(scope="module")
def whole(source):
    target = source.parent / "whole"
    result = quantize_checkpoint(source, target, FEW, max_shard_bytes=SHARD)
    assert result.resumed == 0
    return target


def stored(directory):
    """What was made, without the hidden file that a run to be found again leaves."""
    found = content(directory)
    found.pop(STATE, None)
    return found


def killed_at_every_step(killer, run, expected, tmp_path):
    """Kills and repeats a run at each of its steps; counts them."""
    for step in itertools.count(1):
        again = functools.partial(run, tmp_path / f"{step}")
        if not killer.run(again, at=step):
            return step
        # Every fifth time a second accident, soon after the start.
        if step % 5 or killer.run(again, at=step % 7 + 1):
            again()
        assert stored(tmp_path / f"{step}") == expected, step


@pytest.mark.slow
@pytest.mark.parametrize("exist_ok", [False, True])
def test_a_run_killed_at_any_step_goes_on_to_the_same_bytes(
    killer, source, whole, tmp_path, exist_ok
):
    def run(target):
        result = quantize_checkpoint(
            source, target, FEW, max_shard_bytes=SHARD, exist_ok=exist_ok
        )
        assert len(result.reports) == 2
        assert (target / STATE).exists() == exist_ok

    expected = content(whole)
    shards = [name for name in expected if name.endswith(".safetensors")]
    assert len(shards) > 2 and STATE not in expected
    assert killed_at_every_step(killer, run, expected, tmp_path) > 40


@pytest.mark.slow
def test_undoing_killed_at_any_step_goes_on_to_the_same_bytes(killer, whole, tmp_path):
    def run(target):
        dequantize_checkpoint(whole, target, max_shard_bytes=10**6)
        assert not (target / STATE).exists()

    run(tmp_path / "expected")
    expected = content(tmp_path / "expected")
    assert killed_at_every_step(killer, run, expected, tmp_path) > 20


def test_finished_shards_are_not_quantized_again(killer, source, whole, tmp_path):
    target = tmp_path / "q"

    def run():
        return quantize_checkpoint(source, target, FEW, max_shard_bytes=SHARD)

    assert killer.run(run, at=45)
    done = {path: path.stat().st_mtime_ns for path in target.glob("m*.safetensors")}
    assert done
    result = run()
    assert result.resumed == len(done)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert len(result.reports) == 2


def test_finished_tensors_of_one_shard_are_not_quantized_again(
    source, tmp_path, monkeypatch
):
    """Only whole shards of 5 GB counted: most models began again from nothing."""
    quantize_checkpoint(source, tmp_path / "expected", RTN_RULES)
    coded, quantize = [], run_module.quantize_stack

    def interrupted(*args, **kwargs):
        if len(coded) == 5:
            coded.append("killed")
            raise KilledError
        coded.append(kwargs["path"])
        return quantize(*args, **kwargs)

    monkeypatch.setattr(run_module, "quantize_stack", interrupted)
    with pytest.raises(KilledError):
        quantize_checkpoint(source, tmp_path / "q", RTN_RULES)
    assert len(list((tmp_path / "q").glob(".kept-*"))) == 5
    reports = quantize_checkpoint(source, tmp_path / "q", RTN_RULES).reports
    coded.remove("killed")
    assert sorted(coded) == sorted(reports) and len(coded) == len(set(coded)) == 12
    assert content(tmp_path / "q") == content(tmp_path / "expected")


PROGRAM = """
import os, signal, sys
from kashin_jax.cli import main
from kashin_jax.io import TensorWriter, open_checkpoint
append, count = TensorWriter.append, 0
def counted(*args):
    global count
    count += 1
    if count == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return append(*args)
TensorWriter.append = counted
sys.exit(main(sys.argv[1:]))
"""


def quantize_killed(source, target, flags, at):
    """`kashin quantize` in a process that dies in its `at`-th call of `append`."""
    command = [sys.executable, "-c", PROGRAM.format(at=at), "quantize"]
    return subprocess.run(
        [*command, str(source), str(target), *flags], capture_output=True, text=True
    )


@pytest.mark.slow
def test_a_process_killed_inside_a_shard_goes_on_in_another_one(source, tmp_path):
    flags = ["--method=rtn", "--bits=4", f"--max-shard-size={SHARD}", "--skip=_proj"]

    def run(target, at):
        return quantize_killed(source, tmp_path / target, flags, at)

    assert run("expected", at=None).returncode == 0
    assert run("q", at=30).returncode == -signal.SIGKILL
    left = content(tmp_path / "q")
    assert any(name.endswith(".partial") for name in left) and STATE in left
    assert "config.json" not in left
    again = run("q", at=None)
    assert again.returncode == 0 and "were finished already" in again.stdout
    found, expected = content(tmp_path / "q"), content(tmp_path / "expected")
    # Says how long each layer took.
    assert found.pop(STATE) != expected.pop(STATE)
    assert found == expected


@pytest.fixture
def unfinished(killer, source, tmp_path):
    def run():
        quantize_checkpoint(source, tmp_path / "q", FEW, max_shard_bytes=SHARD)

    assert killer.run(run, at=45)
    return tmp_path / "q"


def refused(pattern, *args, error=UsageError, **options):
    with pytest.raises(error, match=pattern) as caught:
        quantize_checkpoint(*args, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"seed": 1, "rules": FEW, "max_shard_bytes": SHARD}, r"seed \(0, not 1\)"),
        ({"rules": RTN_RULES, "max_shard_bytes": SHARD}, "other rules"),
        (
            {"rules": FEW, "max_shard_bytes": SHARD + 1},
            "shards .50000 bytes, not 50001",
        ),
    ],
    ids=["seed", "rules", "shards"],
)
def test_an_unfinished_run_is_not_mixed_with_another(
    source, unfinished, tmp_path, options, named
):
    before = content(unfinished)
    refused(f"{named}.*Repeat its command, or remove", source, unfinished, **options)
    assert content(unfinished) == before
    refused("Repeat", source, unfinished, **options, replace="finished")
    quantize_checkpoint(source, unfinished, **options, replace="unfinished")
    quantize_checkpoint(source, tmp_path / "new", **options)
    assert content(unfinished) == content(tmp_path / "new")


def test_a_finished_checkpoint_is_replaced_only_if_that_is_asked_for(source, tmp_path):
    target = tmp_path / "q"
    quantize_checkpoint(source, target, RTN_RULES, exist_ok=True)
    again = quantize_checkpoint(source, target, RTN_RULES, exist_ok=True)
    assert again.is_old
    message = r"finished run with other rules and other seed \(0, not 1\).*--force"
    refused(message, source, target, FEW, seed=1, exist_ok=True)
    refused("is not empty", source, target, FEW, seed=1)
    refused("is not empty", source, target, FEW, replace="unfinished")
    assert not quantize_checkpoint(source, target, FEW, replace="finished").is_old
    quantize_checkpoint(source, tmp_path / "new", FEW)
    assert content(target) == content(tmp_path / "new")
    nested = target / "source"
    nested.mkdir()
    for name, data in content(source).items():
        (nested / name).write_bytes(data)
    refused("holds the source", nested, target, FEW, replace="finished")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    refused("is not empty", source, tmp_path / "mine", FEW, replace="finished")


def test_an_unfinished_run_is_not_mixed_with_other_weights(unfinished, tmp_path):
    other = make_source(tmp_path / "other", seed=1)
    refused("other weights", other, unfinished, FEW, max_shard_bytes=SHARD)


def test_a_source_that_changed_meanwhile_is_noticed(source, killer, tmp_path):
    copied = tmp_path / "copied"
    copied.mkdir()
    for name, data in content(source).items():
        (copied / name).write_bytes(data)
    target = tmp_path / "q"

    def run():
        quantize_checkpoint(copied, target, FEW, max_shard_bytes=SHARD)

    assert killer.run(run, at=45)
    edit_json(copied / "config.json", lambda c: c.update(extra=1))
    refused("other weights", copied, target, FEW, max_shard_bytes=SHARD)


HOLDER = """
import sys, time
from pathlib import Path
from kashin_jax.pipeline import run as run_module
from kashin_jax.pipeline.resume import Fingerprint, claimed_directory
from kashin_jax.progress import progress_bar
with claimed_directory(Path(sys.argv[1]), Fingerprint({})):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_second_process_is_refused_and_a_dead_one_is_forgotten(source, tmp_path):
    """Two runs of one command at once: the first lost its open file to the second."""
    target = tmp_path / "q"
    target.mkdir()
    command = [sys.executable, "-c", HOLDER, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        left = content(target)
        refused("another process is writing there", source, target, RTN_RULES)
        assert content(target) == left
        first.kill()
    (target / STATE).unlink()
    assert quantize_checkpoint(source, target, RTN_RULES).reports


def test_two_runs_in_one_process_are_kept_apart_too(source, tmp_path):
    with claimed_directory(tmp_path / "q", Fingerprint({})):
        refused("another process", source, tmp_path / "q", RTN_RULES)
    refused("an unfinished run", source, tmp_path / "q", RTN_RULES)


def test_a_directory_with_something_else_in_it_is_refused(source, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    refused("is not empty", source, tmp_path, RTN_RULES)
    assert content(tmp_path) == {"thesis.tex": b"years of work"}


def test_a_file_in_place_of_the_directory_is_refused(source, tmp_path):
    (tmp_path / "file").write_text("content")
    refused("is a file", source, tmp_path / "file", RTN_RULES)


def test_a_finished_checkpoint_is_not_overwritten(source, whole):
    before = content(whole)
    refused("is not empty", source, whole, FEW, max_shard_bytes=SHARD)
    assert content(whole) == before


@pytest.mark.parametrize("spelling", [".", "../source"])
def test_the_source_is_never_the_target(source, spelling):
    before = content(source)
    refused("is the source", source, source / spelling, RTN_RULES)
    assert content(source) == before


def test_a_quantized_source_is_refused(whole, tmp_path):
    refused("quantized already", whole, tmp_path / "new", RTN_RULES)
    assert not (tmp_path / "new").exists()


def test_a_rule_that_matches_nothing_is_refused_before_any_writing(source, tmp_path):
    refused("matches none", source, tmp_path / "q", Rules(skip=["fc3"]))
    refused("quantize none", source, tmp_path / "q", Rules(skip=["."]))
    assert not (tmp_path / "q").exists()


def test_a_method_that_cannot_code_a_matrix_names_it(source, tmp_path):
    rules = Rules(config=method("kashin", block_shape=[48, 48]))
    refused(r"`model\.decoder\.layers.*48", source, tmp_path / "q", rules)
    assert not (tmp_path / "q").exists()


def test_weights_that_are_not_finite_are_named_and_nothing_is_half_written(
    source, tmp_path
):
    copied = tmp_path / "copied"
    copied.mkdir()
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    name = "model.decoder.layers.1.fc2.weight"
    tensors[name][3, 4] = np.nan
    safetensors.numpy.save_file(tensors, copied / "model.safetensors")
    (copied / "config.json").write_bytes((source / "config.json").read_bytes())
    target = tmp_path / "q"
    refused(f"`{name}` holds 1 NaN", copied, target, RTN_RULES, error=NonFiniteError)
    assert all(left.startswith(".") for left in content(target))
    assert not list(target.glob(".*.partial"))


def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(
    source, whole, tmp_path, monkeypatch
):
    target = tmp_path / "q"
    append = TensorWriter.append
    calls = iter(range(10**6))

    def full(*args):
        if next(calls) == 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return append(*args)

    monkeypatch.setattr(TensorWriter, "append", full)
    options = {"max_shard_bytes": SHARD, "error": CheckpointError}
    refused("No space left.*free space", source, target, FEW, **options)
    assert not list(target.glob(".*.partial"))
    quantize_checkpoint(source, target, FEW, max_shard_bytes=SHARD)
    assert content(target) == content(whole)


def test_a_truncated_source_is_named(source, tmp_path):
    copied = tmp_path / "copied"
    copied.mkdir()
    data = content(source)
    data["model.safetensors"] = data["model.safetensors"][:-1]
    for name, value in data.items():
        (copied / name).write_bytes(value)
    pattern = "model.safetensors"
    refused(pattern, copied, tmp_path / "q", RTN_RULES, error=CheckpointError)
    assert not (tmp_path / "q").exists()


def test_undoing_refuses_files_whose_hash_is_another(whole, tmp_path):
    """Only `inspect` looked: damaged codes were decoded without a word."""
    copied = tmp_path / "copied"
    copied.mkdir()
    for name, data in content(whole).items():
        (copied / name).write_bytes(data)
    shard = max(copied.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{shard.name} changed since"):
        dequantize_checkpoint(copied, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_missing_shard_is_named(source, tmp_path):
    copied = tmp_path / "copied"
    copied.mkdir()
    (copied / "config.json").write_bytes((source / "config.json").read_bytes())
    text = '{"weight_map": {"x.weight": "model-00001-of-00002.safetensors"}}'
    (copied / "model.safetensors.index.json").write_text(text)
    pattern = "names 'model-00001-of-00002.safetensors', which is missing"
    refused(pattern, copied, tmp_path / "q", RTN_RULES, error=CheckpointError)


def test_a_report_that_was_removed_meanwhile_is_named(killer, source, tmp_path):
    target = tmp_path / "q"

    def run():
        quantize_checkpoint(source, target, FEW, max_shard_bytes=SHARD)

    assert killer.run(run, at=45)
    for part in target.glob(".*.report.jsonl"):
        part.unlink()
    options = {"max_shard_bytes": SHARD, "error": CheckpointError}
    refused("is missing or damaged", source, target, FEW, **options)


def test_finished_shards_do_not_count_for_the_time_that_is_left(
    source, whole, tmp_path, monkeypatch
):
    target = tmp_path / "q"
    write, finished = checkpoint.write_part, []

    def interrupted(directory, shard, records):
        if len(finished) == 3:
            raise KilledError
        finished.append(shard)
        write(directory, shard, records)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_part", interrupted)
        with pytest.raises(KilledError):
            quantize_checkpoint(source, target, FEW, max_shard_bytes=SHARD)
    made = []

    def remembered(*args, **kwargs):
        made.append(progress_bar(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(checkpoint, "progress_bar", remembered)
    result = quantize_checkpoint(source, target, FEW, max_shard_bytes=SHARD)
    (bar,) = made
    # Weights that are coded, not bytes: what is copied takes no time.
    opened = open_checkpoint(whole)
    packed = opened.descriptions
    done = [name for name in packed if opened.places[name] in finished]
    weights = {
        name: math.prod(each["layout"]["shape"]) for name, each in packed.items()
    }
    assert result.resumed == 3 < len(opened.files)
    assert bar.initial == sum(weights[name] for name in done) > 0
    assert bar.n == bar.total == sum(weights.values())
