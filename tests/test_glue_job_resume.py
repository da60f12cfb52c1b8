"""GLUE's table cut short at any moment: nothing finished is lost or half done."""

import numpy as np
import pytest
from interruptions import Calls, finished_layers, quantize
from tiny_checkpoint import as_in_tests
from tiny_classifier import (
    BUCKETS,
    LINEARS,
    TASKS_OF_TABLE,
    arguments,
    given,
    numbers,
    table,
)

from experiments.classification import evaluation
from experiments.common.resumable import remembered
from experiments.glue import main

__all__ = ["given", "quantize"]  # fixtures

# Quantizing takes longer than compiling does.
# Whole programs on tiny models: their numbers, resumption and files.
pytestmark = [pytest.mark.optimized, pytest.mark.slow]

OTHER = ("--tasks=sst2", "--methods=full precision")
METHODS = "--methods=uniform,kashin"
LAYERS = 2 * len(TASKS_OF_TABLE) * LINEARS["bert"]
# Full precision and two methods; all examples of a bucket fit into one batch.
SPLITS = 3 * len(TASKS_OF_TABLE)
BATCHES = SPLITS * BUCKETS


@pytest.fixture
def states(monkeypatch):
    calls = Calls(evaluation._first_states)
    monkeypatch.setattr(evaluation, "_first_states", calls)
    return calls


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    """What the command gives where nobody interrupts it."""
    with as_in_tests():
        return numbers(
            table(given.template, given.data, tmp_path_factory.mktemp("w"), METHODS)
        )


@pytest.fixture
def command(given, tmp_path):
    return arguments(given.template, given.data, tmp_path, METHODS)


@pytest.fixture
def resumed(given, tmp_path):
    """Runs the same command to its end; its records."""
    return lambda: numbers(table(given.template, given.data, tmp_path, METHODS))


def interrupt(calls, at, command, out, capsys):
    """Runs the command until call number `at`, which does not return."""
    calls.count, calls.interrupted_at = 0, at
    assert main(command) == 130
    calls.count, calls.interrupted_at = 0, None
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [line for line in printed.err.splitlines() if " bits" not in line]
    assert lines == [
        "glue: interrupted; what is finished is kept, and the same command goes on "
        "from there."
    ]
    assert [path.name for path in out.iterdir()] == ["work"]
    assert not [path for path in out.rglob("*") if path.name.endswith(".partial")]


def test_an_uninterrupted_run_computes_each_layer_and_batch_once(
    resumed, whole, quantize, states, tmp_path
):
    assert resumed() == whole
    assert (quantize.count, states.count) == (LAYERS, BATCHES)
    assert {path.suffix for path in tmp_path.iterdir()} == {".jsonl", ".md", ".png"}


def moments(usual, *others):
    """All of them in the slow suite, a usual one in the default suite."""
    return [usual, *(pytest.param(at, marks=pytest.mark.slow) for at in others)]


@pytest.mark.parametrize("at", moments(LINEARS["bert"] + 3, 1, LAYERS))
def test_finished_layers_survive_an_interrupt(
    command, resumed, whole, quantize, tmp_path, capsys, at
):
    interrupt(quantize, at, command, tmp_path, capsys)
    assert resumed() == whole
    assert quantize.count == LAYERS - (at - 1)


@pytest.mark.parametrize("at", moments(8, 1, 2, 7, BATCHES))
def test_finished_splits_survive_an_interrupt(
    command, resumed, whole, states, tmp_path, capsys, at
):
    interrupt(states, at, command, tmp_path, capsys)
    assert resumed() == whole
    finished = (at - 1) // BUCKETS
    assert states.count == BATCHES - finished * BUCKETS


DAMAGES = {
    "empty": lambda content: b"",
    "header cut": lambda content: content[:40],
    "data cut": lambda content: content[:-5],
    "other bytes": lambda content: b"\xff" * len(content),
    "hole in the header": lambda content: content[:20] + b"\x00" * 20 + content[40:],
}


def outputs_of(tmp_path, values):
    """As a table keeps them; the file, and whether they had to be computed."""
    calls = []
    found = remembered(
        tmp_path, {"a": 1}, values.shape, lambda: calls.append(1) or values
    )
    np.testing.assert_array_equal(found, values)
    (file,) = tmp_path.iterdir()
    return file, bool(calls)


@pytest.mark.parametrize("damage", DAMAGES)
def test_kept_outputs_that_are_damaged_are_computed_again(tmp_path, damage):
    values = np.arange(6.0).reshape(3, 2)
    file, is_computed = outputs_of(tmp_path, values)
    assert is_computed
    assert outputs_of(tmp_path, values) == (file, False)
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    assert outputs_of(tmp_path, values) == (file, True)
    assert outputs_of(tmp_path, values) == (file, False)


def test_kept_outputs_of_another_shape_are_computed_again(tmp_path):
    file, _ = outputs_of(tmp_path, np.zeros((3, 2)))
    assert outputs_of(tmp_path, np.zeros((2, 2))) == (file, True)


def forget_rows(directory):
    """Leaves the outputs of finished rows, which rows that are found do not need."""
    for path in directory.rglob("rows.jsonl"):
        path.unlink()


def test_damaged_outputs_are_computed_again(
    command, resumed, whole, states, tmp_path, capsys
):
    """Each file in another way; one that is believed keeps the count too small."""
    interrupt(states, BATCHES, command, tmp_path, capsys)
    forget_rows(tmp_path)
    files = sorted(tmp_path.rglob("*.npy"))
    for file, damage in zip(files, DAMAGES.values(), strict=True):
        file.write_bytes(damage(file.read_bytes()))
    assert resumed() == whole
    assert states.count == BATCHES


@pytest.mark.slow
def test_outputs_of_another_shape_are_computed_again(
    command, resumed, whole, states, tmp_path, capsys
):
    interrupt(states, 5, command, tmp_path, capsys)
    forget_rows(tmp_path)
    first, second = sorted(tmp_path.rglob("*.npy"))
    first.write_bytes(second.read_bytes())
    assert resumed() == whole
    assert states.count == BATCHES - BUCKETS


@pytest.mark.slow
def test_a_damaged_layer_is_computed_again(
    command, resumed, whole, quantize, tmp_path, capsys
):
    interrupt(quantize, 10, command, tmp_path, capsys)
    damaged, cut, *_ = finished_layers(tmp_path)
    damaged.write_bytes(b"\xff" * 500)
    cut.write_bytes(cut.read_bytes()[:-9])
    assert resumed() == whole
    assert quantize.count == LAYERS - 9 + 2


def test_unfinished_work_of_another_table_is_left_alone(
    given, command, quantize, tmp_path, capsys
):
    interrupt(quantize, 8, command, tmp_path, capsys)
    table(given.root / "bert-sst2", given.data, tmp_path, *OTHER)
    quantize.count = 0
    assert main(command) == 0
    assert quantize.count == LAYERS - 7


def test_finished_rows_are_taken_from_the_result_file(
    given, command, resumed, whole, quantize, states, tmp_path
):
    table(given.template, given.data, tmp_path, METHODS)
    quantize.count = states.count = 0
    assert resumed() == whole
    assert quantize.count == states.count == 0
    assert main([*command, "--seeds=2"]) == 0
    assert quantize.count == LAYERS // 2  # `uniform` is not random
    quantize.count = 0
    assert main([*command, "--fresh"]) == 0
    assert quantize.count == LAYERS


def test_rows_are_made_again_for_what_a_record_does_not_say(given, tmp_path, quantize):
    """Saved classifiers are in no record, nor is what `--labels` said."""
    flags, out = (*OTHER, "--methods=uniform"), tmp_path / "out"
    model = given.root / "bert-sst2"
    first = numbers(table(model, given.data, out, *flags))
    for flag in (f"--save={tmp_path / 'saved'}", "--labels=task"):
        quantize.count = 0
        assert numbers(table(model, given.data, out, *flags, flag)) == first
        assert quantize.count == LINEARS["bert"]
    assert len(list((tmp_path / "saved").iterdir())) == 1


def test_outputs_for_other_data_in_the_same_folder_are_not_used(
    given, tmp_path, states, capsys
):
    data, out = tmp_path / "glue", tmp_path / "out"
    path = data / "SST-2" / "dev.tsv"
    path.parent.mkdir(parents=True)
    header, *rows = (given.data / "SST-2" / "dev.tsv").read_text().splitlines()
    path.write_text("\n".join([header, *rows]) + "\n")
    model, flags = given.root / "bert-sst2", ("--tasks=sst2", "--methods=uniform")
    interrupt(states, 3, arguments(model, data, out, *flags), out, capsys)
    path.write_text("\n".join([header, *rows[::-1]]) + "\n")
    states.count = 0
    records = table(model, data, out, *flags)
    assert states.count == 2 * BUCKETS
    fresh = table(model, data, tmp_path / "fresh", *flags)
    assert numbers(records) == numbers(fresh)


def test_a_table_that_cannot_be_written_keeps_its_work(
    given, command, resumed, whole, quantize, states, tmp_path, capsys
):
    obstacle = tmp_path / "table3_glue.md"
    obstacle.mkdir()
    assert main(command) == 1
    assert "Is a directory" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob(".*"))
    obstacle.rmdir()
    quantize.count = states.count = 0
    assert resumed() == whole
    assert quantize.count == states.count == 0
