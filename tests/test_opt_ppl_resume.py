"""The main job cut short at any moment: nothing finished is lost or half done."""

import os
import signal
import subprocess
import sys
import time

import pytest
from interruptions import Calls, finished_layers, quantize
from tiny_checkpoint import LINEARS, arguments, as_in_tests, numbers, row, table, tiny

from experiments.common import perplexity as perplexity_rows
from experiments.common.results import read_jsonl, write_jsonl
from experiments.opt_ppl import main

__all__ = ["quantize", "tiny"]  # fixtures

# Quantizing takes longer than compiling does.
# Whole programs on tiny models: their numbers, resumption and files.
pytestmark = [pytest.mark.optimized, pytest.mark.slow]

METHODS = "--methods=kashin,uniform"
ROWS, BATCHES_PER_ROW = 3, 8


@pytest.fixture
def nll(monkeypatch):
    calls = Calls(perplexity_rows._nll)
    monkeypatch.setattr(perplexity_rows, "_nll", calls)
    return calls


def interrupt(calls, at, command, out, capsys):
    """Runs the command until call number `at`, which does not return."""
    calls.count, calls.interrupted_at = 0, at
    assert main(command) == 130
    calls.count, calls.interrupted_at = 0, None
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [line for line in printed.err.splitlines() if " bits: " not in line]
    assert lines == [
        "opt_ppl: interrupted; what is finished is kept, and the same command goes on "
        "from there."
    ]
    assert [path.name for path in out.iterdir()] == ["work"]
    assert not [path for path in out.rglob("*") if path.name.endswith(".partial")]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """What the command gives where nobody interrupts it."""
    with as_in_tests():
        return numbers(table(tiny, tmp_path_factory.mktemp("whole"), METHODS))


def test_an_uninterrupted_run_computes_each_layer_and_batch_once(
    tiny, tmp_path, whole, quantize, nll
):
    records = table(tiny, tmp_path, METHODS)
    assert numbers(records) == whole
    assert quantize.count == 2 * LINEARS
    assert nll.count == ROWS * BATCHES_PER_ROW
    # The finished work is removed.
    assert {path.suffix for path in tmp_path.iterdir()} == {".jsonl", ".md", ".png"}


def moments(usual, *others):
    """All of them in the slow suite, a usual one in the default suite."""
    return [usual, *(pytest.param(at, marks=pytest.mark.slow) for at in others)]


@pytest.mark.parametrize("at", moments(LINEARS + 5, 1, 8, 2 * LINEARS))
def test_finished_layers_survive_an_interrupt(
    tiny, tmp_path, whole, quantize, capsys, at
):
    interrupt(quantize, at, arguments(tiny, tmp_path, METHODS), tmp_path, capsys)
    assert numbers(table(tiny, tmp_path, METHODS)) == whole
    assert quantize.count == 2 * LINEARS - (at - 1)


@pytest.mark.parametrize("at", moments(12, 1, 4, ROWS * BATCHES_PER_ROW))
def test_finished_windows_survive_an_interrupt(tiny, tmp_path, whole, nll, capsys, at):
    interrupt(nll, at, arguments(tiny, tmp_path, METHODS), tmp_path, capsys)
    assert numbers(table(tiny, tmp_path, METHODS)) == whole
    assert nll.count == ROWS * BATCHES_PER_ROW - (at - 1)


@pytest.mark.slow
def test_repeated_interrupts_get_there_in_the_end(
    tiny, tmp_path, whole, quantize, capsys
):
    for _ in range(4):
        command = arguments(tiny, tmp_path, METHODS)
        interrupt(quantize, 6, command, tmp_path, capsys)
    assert numbers(table(tiny, tmp_path, METHODS)) == whole
    assert quantize.count == 2 * LINEARS - 4 * 5


def test_seconds_are_those_of_the_run_that_did_the_work(
    tiny, tmp_path, quantize, capsys
):
    flags = ("--methods=uniform",)
    interrupt(quantize, LINEARS, arguments(tiny, tmp_path, *flags), tmp_path, capsys)
    records = table(tiny, tmp_path, *flags)
    assert row(records, "uniform")["quantize_seconds"] > 0


@pytest.mark.slow
def test_a_damaged_layer_is_computed_again(tiny, tmp_path, whole, quantize, capsys):
    command = arguments(tiny, tmp_path, METHODS)
    interrupt(quantize, LINEARS, command, tmp_path, capsys)
    damaged, cut, *_ = finished_layers(tmp_path)
    damaged.write_bytes(b"\xff" * 500)
    cut.write_bytes(cut.read_bytes()[:-9])
    assert numbers(table(tiny, tmp_path, METHODS)) == whole
    assert quantize.count == 2 * LINEARS - (LINEARS - 1) + 2


def test_a_line_of_scores_cut_short_is_computed_again(
    tiny, tmp_path, whole, nll, capsys
):
    interrupt(nll, 5, arguments(tiny, tmp_path, METHODS), tmp_path, capsys)
    (scores,) = tmp_path.rglob("*.jsonl")
    scores.write_bytes(scores.read_bytes()[:-5])
    assert numbers(table(tiny, tmp_path, METHODS)) == whole
    assert nll.count == ROWS * BATCHES_PER_ROW - 3


def test_unfinished_work_of_another_table_is_left_alone(
    tiny, tmp_path, quantize, capsys
):
    command = arguments(tiny, tmp_path, METHODS)
    interrupt(quantize, 8, command, tmp_path, capsys)
    table(tiny, tmp_path, "--methods=rtn-channel")
    quantize.count = 0
    assert main(command) == 0
    assert quantize.count == 2 * LINEARS - 7


def test_finished_rows_are_taken_from_the_result_file(
    tiny, tmp_path, whole, quantize, nll
):
    table(tiny, tmp_path, "--methods=uniform")
    quantize.count = nll.count = 0
    assert numbers(table(tiny, tmp_path, METHODS)) == [whole[0], whole[2], whole[1]]
    assert (quantize.count, nll.count) == (LINEARS, BATCHES_PER_ROW)
    quantize.count = nll.count = 0
    assert main(arguments(tiny, tmp_path, METHODS)) == 0
    assert (quantize.count, nll.count) == (0, 0)
    text = (tmp_path / "table2_opt.md").read_text()
    assert all(f"{record['perplexity']:.2f}" in text for record in whole)


def test_rows_of_older_versions_get_their_bits_per_byte_without_being_scored(
    tiny, tmp_path, whole, quantize, nll
):
    added = {"bits_per_byte", "bytes", "bos_token"}
    older = [
        {key: value for key, value in record.items() if key not in added}
        for record in table(tiny, tmp_path, METHODS)
    ]
    write_jsonl(tmp_path / "table2_opt.jsonl", older)
    quantize.count = nll.count = 0
    for found, expected in zip(
        numbers(table(tiny, tmp_path, METHODS)), whole, strict=True
    ):
        bits = found.pop("bits_per_byte")
        assert bits == pytest.approx(expected["bits_per_byte"], rel=1e-12)
        assert found == {k: v for k, v in expected.items() if k != "bits_per_byte"}
    assert quantize.count == nll.count == 0


def test_another_beginning_of_the_text_is_another_row(tiny, tmp_path, quantize, nll):
    """Guards against rows of one protocol that are taken for those of another."""
    only = "--methods=full precision"
    (own,) = table(tiny, tmp_path, only)
    for flag, token in (("--bos=none", None), ("--bos=<pad>", "<pad>")):
        record = table(tiny, tmp_path, only, flag)[-1]
        assert record["bos_token"] == token and record["bos"] == (token is not None)
        assert record["perplexity"] != own["perplexity"]
    assert len(read_jsonl(tmp_path / "table2_opt.jsonl")) == 3
    scored = nll.count
    assert numbers(table(tiny, tmp_path, only))[0]["bos_token"] == "</s>"
    assert nll.count == scored


def test_no_row_of_other_choices_is_taken_and_none_if_fresh(tiny, tmp_path, quantize):
    table(tiny, tmp_path, "--methods=kashin")
    for flag in ("--max_steps=150", "--seed=7", "--bits=3", "--fresh"):
        quantize.count = 0
        assert main(arguments(tiny, tmp_path, "--methods=kashin", flag)) == 0
        assert quantize.count == LINEARS
    assert "--fresh" not in (tmp_path / "table2_opt.md").read_text()


def test_no_row_of_another_device_or_version_is_taken(tiny, tmp_path, quantize):
    table(tiny, tmp_path, "--methods=uniform")
    path = tmp_path / "table2_opt.jsonl"
    for field in ("device", "jax_version", "weights_sha256", "text_sha256"):
        write_jsonl(path, [{**r, field: "another"} for r in read_jsonl(path)])
        quantize.count = 0
        assert main(arguments(tiny, tmp_path, "--methods=uniform")) == 0
        assert quantize.count == LINEARS


@pytest.mark.parametrize(
    "flag",
    moments("--bits=2", "--seed=7", "--rtol=1e-5", "--max_steps=150"),
)
def test_other_flags_never_share_layers(tiny, tmp_path, quantize, capsys, flag):
    methods = "--methods=rtn-channel"
    command = arguments(tiny, tmp_path, methods)
    interrupt(quantize, LINEARS, command, tmp_path, capsys)
    assert main([*command, flag]) == 0
    assert quantize.count == LINEARS


def test_scores_of_another_text_in_the_same_file_are_not_used(
    tiny, tmp_path, nll, capsys
):
    text = tmp_path / "text.txt"
    whole = tiny.with_suffix(".txt").read_text("utf-8")
    text.write_text(whole)
    flags, out = ("--methods=uniform",), tmp_path / "out"
    command = arguments(tiny, out, *flags, text=text)
    interrupt(nll, 12, command, out, capsys)
    text.write_text(whole[::-1])
    resumed = table(tiny, out, *flags, text=text)
    fresh = table(tiny, tmp_path / "fresh", *flags, text=text)
    assert numbers(resumed) == numbers(fresh)


def test_a_table_that_cannot_be_written_keeps_its_work(
    tiny, tmp_path, whole, quantize, nll, capsys
):
    obstacle = tmp_path / "table2_opt.md"
    obstacle.mkdir()
    assert main(arguments(tiny, tmp_path, METHODS)) == 1
    assert "Is a directory" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob(".*"))
    obstacle.rmdir()
    quantize.count = nll.count = 0
    assert numbers(table(tiny, tmp_path, METHODS)) == whole
    assert quantize.count == nll.count == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_process_loses_nothing_finished(tiny, tmp_path, whole, quantize, kind):
    command = arguments(tiny, tmp_path, METHODS)
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.opt_ppl", *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    # At a moment that no test chooses, once the first layers are there.
    while process.poll() is None and len(finished_layers(tmp_path)) < 3:
        time.sleep(0.002)
    os.kill(process.pid, kind)
    out, err = process.communicate()
    assert out == ""
    assert "Traceback" not in err
    assert process.returncode == (130 if kind == signal.SIGINT else -signal.SIGKILL)
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
    assert numbers(table(tiny, tmp_path, METHODS)) == whole
    assert quantize.count <= 2 * LINEARS - 3
