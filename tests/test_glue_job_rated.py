"""Which tasks a table has by default, and rated sentences end to end."""

import json
import shutil

import pytest
from test_glue_job import several_heads
from tiny_classifier import given, make_classifier, table, write_rows

from experiments.classification.checkpoints import resolve_tasks
from kashin_jax.errors import DataError, UsageError

__all__ = ["given"]  # fixture

# Quantizing takes longer than compiling does.
pytestmark = pytest.mark.optimized

RATED = ["id\trating\tsentence", "1\t2.5\tw1 w2", "2\t-1\tw3", "3\t1\tw4"]


def test_rated_sentences_are_answered_by_the_head_of_sst2(tmp_path):
    """Where no task of GLUE has data; and the shared classifier is kept once."""
    model = several_heads(tmp_path / "model", ("rte", "sst2"))
    for name in ("amazon", "nyt"):
        write_rows(tmp_path / "sentiment" / f"{name}.tsv", RATED)
    save = tmp_path / "saved"
    flags = ("--methods=uniform", f"--save={save}")
    records = table(model, tmp_path, tmp_path / "out", *flags)
    assert [(r["method"], r["task"], r["metric"], r["examples"]) for r in records] == [
        (method, f"sentiment-{name}", metric, 3)
        for method in ("full precision", "uniform")
        for name in ("amazon", "nyt")
        for metric in ("accuracy", "pearson")
    ]
    assert [path.name for path in save.iterdir()] == ["sst2-uniform-4bit"]
    config = json.loads((save / "sst2-uniform-4bit" / "config.json").read_text())
    assert config["finetuning_task"] == "sst2"
    again = table(save / "sst2-uniform-4bit", tmp_path, tmp_path / "again")
    assert [r["value"] for r in again] == [r["value"] for r in records[4:]]


def test_a_template_names_the_directory_of_the_head(tmp_path):
    make_classifier(tmp_path / "bert-sst2", "sst2")
    write_rows(tmp_path / "sentiment" / "nyt.tsv", RATED)
    flags = ("--tasks=sentiment-nyt", "--methods=full precision")
    records = table(tmp_path / "bert-{task}", tmp_path, tmp_path / "out", *flags)
    assert {r["task"] for r in records} == {"sentiment-nyt"}


def test_tasks_of_glue_come_before_those_that_borrow_their_heads(given, tmp_path):
    """A table of GLUE must not change because other files lie beside it."""
    data = tmp_path / "data"
    shutil.copytree(given.data, data)
    for name in ("amazon", "nyt"):
        write_rows(data / "sentiment" / f"{name}.tsv", RATED)
    tasks, left_out = resolve_tasks(given.template, (), data)
    assert ([task.name for task in tasks], left_out) == (["sst2", "stsb"], ())
    embedded, left_out = resolve_tasks(given.template, (), None)
    assert [task.name for task in embedded] == ["sentiment-amazon", "sentiment-nyt"]
    assert [task.name for task in left_out] == ["sst2", "stsb"]


def test_no_other_task_stands_in_for_what_a_data_dir_lacks(given, tmp_path):
    with pytest.raises(UsageError, match="None of sst2, stsb has data at hand"):
        resolve_tasks(given.template, (), tmp_path)
    with pytest.raises(DataError, match="`--data_dir`=.*nowhere is not a folder"):
        resolve_tasks(given.template, (), tmp_path / "nowhere")
