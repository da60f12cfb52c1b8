"""Whose output means what: never scored silently wrong, whatever its order."""

import json

import numpy as np
import pytest
from tiny_checkpoint import as_in_tests
from tiny_classifier import (
    LINEARS,
    arguments,
    copy,
    edit_config,
    edit_tensors,
    given,
    make_classifier,
    table,
    write_rows,
)

from experiments.classification.labels import output_order
from experiments.classification.quantized import load_classifier_packed
from experiments.classification.tasks import TASKS
from experiments.glue import main
from kashin_jax.pipeline import run

__all__ = ["copy", "given"]  # fixtures

# Quantizing takes longer than compiling does.
# A whole program on tiny models; its parts have tests of their own.
pytestmark = [pytest.mark.optimized, pytest.mark.slow]

HEAD = ("classifier.weight", "classifier.bias")
FLAGS = ("--tasks=sst2", "--methods=uniform")


def swap_outputs(tensors):
    for name in HEAD:
        tensors[name] = np.ascontiguousarray(tensors[name][::-1])


def name_outputs(directory, *labels):
    edit_config(
        directory,
        id2label={str(i): label for i, label in enumerate(labels)},
        label2id={label: i for i, label in enumerate(labels)},
    )


def measured(records):
    keys = ("method", "metric", "value", "flip_rate", "log_loss")
    return [tuple(record[key] for key in keys) for record in records]


@pytest.fixture(scope="module")
def usual(given, tmp_path_factory):
    """The rows of the classifier whose outputs are in the task's order."""
    out = tmp_path_factory.mktemp("usual")
    with as_in_tests():
        return measured(table(given.root / "bert-sst2", given.data, out, *FLAGS))


def test_a_reversed_head_scores_exactly_the_same(copy, tmp_path, usual):
    edit_tensors(copy, swap_outputs)
    name_outputs(copy, "positive", "negative")
    records = table(copy, tmp_path / "glue", tmp_path / "out", *FLAGS)
    assert measured(records) == usual


def test_a_reversed_head_that_is_named_wrong_scores_the_complement(
    copy, tmp_path, usual
):
    # So that the test above cannot pass by ignoring the names.
    name_outputs(copy, "positive", "negative")
    records = table(copy, tmp_path / "glue", tmp_path / "out", *FLAGS)
    assert records[0]["value"] == pytest.approx(100 - usual[0][2])
    assert usual[0][2] != 50


@pytest.mark.parametrize("order", ["entailment,contradiction,neutral", "permuted"])
def test_three_classes_in_another_order_score_the_same(tmp_path, order):
    labels = {"dev_matched": "neutral", "dev_mismatched": "contradiction"}
    for split, label in labels.items():
        rows = [f"{i}\tw{i} w{i + 7}\tw{2 * i}\t{label}" for i in range(12)]
        header = "index\tsentence1\tsentence2\tgold_label"
        write_rows(tmp_path / "MNLI" / f"{split}.tsv", [header, *rows])
    model = make_classifier(tmp_path / "model", "mnli")
    flags = ("--tasks=mnli", "--methods=full precision")
    before = table(model, tmp_path, tmp_path / "before", *flags)
    # Of three labels a permutation and its inverse differ, unlike of two.
    chosen = [2, 0, 1]

    def permute(tensors):
        for name in HEAD:
            tensors[name] = np.ascontiguousarray(tensors[name][chosen])

    edit_tensors(model, permute)
    names = [("entailment", "neutral", "contradiction")[i] for i in chosen]
    if order == "permuted":
        name_outputs(model, *names)
    else:
        name_outputs(model, *(f"LABEL_{i}" for i in range(3)))
        flags += (f"--labels={','.join(names)}",)
    after = table(model, tmp_path, tmp_path / "after", *flags)
    assert measured(after) == measured(before)
    assert before[0]["value"] != before[1]["value"]


def test_generic_names_are_an_error_until_labels_says_what_they_mean(
    copy, tmp_path, usual, capsys
):
    name_outputs(copy, "LABEL_0", "LABEL_1")
    command = arguments(copy, tmp_path / "glue", tmp_path / "out", *FLAGS)
    assert main(command) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "LABEL_0, LABEL_1" in line
    assert "`--labels=negative,positive`, or `--labels=task`" in line
    for value in ("task", "negative,positive"):
        records = table(
            copy, tmp_path / "glue", tmp_path / value, *FLAGS, f"--labels={value}"
        )
        assert measured(records) == usual
    edit_tensors(copy, swap_outputs)
    flags = (*FLAGS, "--labels=positive,negative")
    records = table(copy, tmp_path / "glue", tmp_path / "swapped", *flags)
    assert measured(records) == usual
    (page,) = (tmp_path / "swapped").glob("*.md")
    assert "--labels=positive,negative" in page.read_text()


def test_what_is_saved_says_what_its_outputs_mean(copy, tmp_path):
    name_outputs(copy, "LABEL_0", "LABEL_1")
    edit_tensors(copy, swap_outputs)
    flags = (*FLAGS, "--labels=positive,negative", f"--save={tmp_path / 'saved'}")
    table(copy, tmp_path / "glue", tmp_path / "out", *flags)
    found = load_classifier_packed(tmp_path / "saved" / "sst2-uniform-4bit")
    # Refinement takes it without a flag, and in its own order.
    assert output_order(TASKS["sst2"], found.loaded.config.id2label) == (1, 0)


def test_a_run_with_other_labels_uses_no_outputs_of_an_interrupted_one(
    copy, tmp_path, usual, monkeypatch
):
    """Both runs are called alike, so they share their unfinished work."""
    name_outputs(copy, "LABEL_0", "LABEL_1")
    edit_tensors(copy, swap_outputs)
    data, out = tmp_path / "glue", tmp_path / "out"
    quantize, calls = run.quantize_stack, []

    def interrupted(*args, **kwargs):
        calls.append(kwargs["path"])
        if len(calls) == LINEARS["bert"]:
            raise KeyboardInterrupt
        return quantize(*args, **kwargs)

    monkeypatch.setattr(run, "quantize_stack", interrupted)
    assert main(arguments(copy, data, out, *FLAGS, "--labels=task")) == 130
    assert list(out.rglob("*.npy"))
    records = table(copy, data, out, *FLAGS, "--labels=positive,negative")
    assert measured(records) == usual


@pytest.mark.parametrize(
    ("names", "flag", "code", "says"),
    [
        (("pos", "neg"), "--labels=", 1, "the labels of SST-2 are negative, positive"),
        (("LABEL_0", "LABEL_1"), "--labels=good,bad", 2, "must hold each label of"),
        (("LABEL_0", "LABEL_1"), "--labels=positive", 2, "must hold each label of"),
        (("positive", "negative"), "--labels=task", 2, "contradicts the checkpoint"),
    ],
)
def test_names_that_are_not_the_tasks_are_refused(
    copy, tmp_path, capsys, names, flag, code, says
):
    name_outputs(copy, *names)
    out = tmp_path / "out"
    assert main(arguments(copy, tmp_path / "glue", out, *FLAGS, flag)) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert list(out.iterdir()) == []
    assert json.loads((copy / "config.json").read_text())["id2label"]["0"] == names[0]
