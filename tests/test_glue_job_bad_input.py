"""Whatever is wrong with flags or files: one line that names it, and an exit code."""

import dataclasses
import json

import numpy as np
import pytest
from tiny_classifier import (
    LONG,
    WORDS,
    arguments,
    copy,
    edit_config,
    edit_tensors,
    given,
    make_classifier,
    make_tokenizer,
    table,
    write_rows,
)

from experiments.classification.tasks import TASKS
from experiments.glue import GlueConfig, main

__all__ = ["copy", "given"]  # fixtures

USAGE, FILE = 2, 1
WEIGHT = "bert.encoder.layer.1.output.dense.weight"


@pytest.fixture
def complaint(tmp_path, capsys):
    """Runs a command that must fail cleanly; the line it prints."""

    def run(command, code, out=tmp_path / "out"):
        assert main(command) == code
        printed = capsys.readouterr()
        assert printed.out == ""
        (line,) = printed.err.splitlines()
        assert line.startswith("glue: ")
        assert not out.is_dir() or list(out.iterdir()) == []
        return line

    return run


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--taks=sst2", "taks"),
        ("sst2", "`sst2` is not a flag"),
        ("--tasks=snli", "`--tasks` must name some of cola, sst2"),
        ("--tasks=sst2,snli,ax", "Got ax, snli."),
        ("--methods=gptq", "`--methods` has no `gptq`. Choose all or from: kashin"),
        ("--methods=", "`--methods` is empty. Choose from: kashin"),
        (
            "--bits=0",
            "with three decimals at most. Got '0'",
        ),
        (
            "--bits=4,9",
            "with three decimals at most. Got '9'",
        ),
        (
            "--bits=four",
            "with three decimals at most. Got 'four'",
        ),
        ("--bits=", "`--bits` must be given"),
        ("--seeds=0", "`--seeds` must be at least 1. Got 0"),
        ("--seeds=0,1", "--seeds=0,1"),
        ("--basis=fourier", "`--basis`: Unknown basis `fourier`. Choose from"),
        ("--basis=", "`--basis` must be given"),
        ("--rtol=0", "`--rtol` must be in (0, 1). Got 0.0"),
        ("--rtol=nan", "`--rtol` must be in (0, 1). Got nan"),
        ("--max_steps=0", "`--max_steps` must be at least 1. Got 0"),
        ("--batch_tokens=0", "`--batch_tokens` must be at least 1. Got 0"),
        ("--max_length=0", "`--max_length` must be at least 1. Got 0"),
        ("--max_length=2", "`--max_length` must be at least 3, special tokens"),
        ("--max_length=41", "`--max_length`=41 exceeds the 40 positions"),
        ("--model=", "`--model` must be given"),
        ("--out=", "`--out` must be given"),
        ("--out=/dev/null/x", "`--out` /dev/null/x cannot be written"),
    ],
)
def test_a_flag_that_cannot_work_is_named(given, tmp_path, complaint, flag, says):
    model = given.root / "bert-sst2"
    command = arguments(model, given.data, tmp_path / "out", "--tasks=sst2", flag)
    assert says in complaint(command, USAGE)


def test_help_is_the_manual_with_every_flag(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr()
    assert "Exit code 0: done" in printed.out
    for field in dataclasses.fields(GlueConfig):
        name = f"[no]{field.name}" if field.type is bool else field.name
        assert f"--{name}:" in printed.out
    assert printed.err == ""


def test_a_model_that_does_not_name_its_task_needs_the_flag(copy, tmp_path, complaint):
    command = arguments(copy, tmp_path / "glue", tmp_path / "out")
    line = complaint(command, USAGE)
    assert f"`--tasks` is needed: `--model={copy}` does not say" in line
    assert ", ".join(TASKS) in line
    edit_config(copy, finetuning_task="imdb")
    assert "`--tasks` is needed" in complaint(command, USAGE)
    edit_config(copy, finetuning_task="SST-2")
    records = table(copy, tmp_path / "glue", tmp_path / "out", "--methods=uniform")
    assert {record["task"] for record in records} == {"sst2"}


def test_a_template_without_a_directory_needs_the_flag(tmp_path, complaint):
    command = arguments(tmp_path / "no-{task}", tmp_path, tmp_path / "out")
    assert "`--tasks` is needed" in complaint(command, USAGE)
    line = complaint([*command, "--tasks=rte"], FILE)
    assert line == f"glue: {tmp_path / 'no-rte'}: no such directory; check the path."


@pytest.mark.parametrize(
    ("task", "head", "says"),
    [
        ("sst2", "mnli", "SST-2 needs a head with 2 outputs (negative, positive), and"),
        (
            "mnli",
            "sst2",
            "MNLI needs a head with 3 outputs (entailment, neutral, contr",
        ),
        ("sst2", "stsb", "has a head for a regression, which SST-2 is not; name a"),
        ("stsb", "sst2", "has a head for classes, which STS-B is not; name a"),
        ("sst2", "rte", "outputs are entailment, not_entailment, the labels of SST-2"),
    ],
)
def test_a_head_for_something_else_is_refused(
    given, tmp_path, complaint, task, head, says
):
    model = make_classifier(tmp_path / "model", head)
    command = arguments(model, given.data, tmp_path / "out", f"--tasks={task}")
    assert says in complaint(command, FILE)


def test_a_missing_head_is_named_with_those_there_are(tmp_path, complaint):
    command = ["--tasks=qqp", f"--out={tmp_path / 'out'}"]
    line = complaint(command, FILE)
    assert "has no head for QQP; its heads are cola, mrpc, rte, sst2, stsb." in line


def poison(value):
    def change(tensors):
        tensors[WEIGHT] = tensors[WEIGHT].copy()
        tensors[WEIGHT][3, 4] = value

    return lambda directory: edit_tensors(directory, change)


def cut_weights(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (poison(np.nan), f"`{WEIGHT}` has NaN or infinite values"),
        (poison(np.inf), f"`{WEIGHT}` has NaN or infinite values"),
        (cut_weights, "model.safetensors: is truncated or damaged"),
        (lambda d: (d / "tokenizer.json").unlink(), "has no tokenizer: add"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), "not a readable tokenizer"),
        (lambda d: (d / "config.json").write_text("{"), "is not valid JSON"),
        (lambda d: edit_config(d, model_type="opt"), "`model_type` is 'opt'"),
        (lambda d: edit_config(d, intermediate_size=65), "but config.json asks for"),
        (
            lambda d: make_tokenizer(d / "tokenizer.json", words=(*WORDS, "more")),
            "The tokenizer has 45 tokens, the model's `vocab_size` is 44; use the",
        ),
        (
            lambda d: make_tokenizer(d / "tokenizer.json", "roberta"),
            "The tokenizer pads with token 1, the model's `pad_token_id` is 0; use",
        ),
    ],
)
def test_a_damaged_checkpoint_is_named(copy, tmp_path, complaint, damage, says):
    damage(copy)
    data, out = tmp_path / "glue", tmp_path / "out"
    assert says in complaint(arguments(copy, data, out, "--tasks=sst2"), FILE)


def test_token_types_that_the_model_lacks_are_refused(given, tmp_path, complaint):
    model = make_classifier(tmp_path / "model", "stsb", type_vocab_size=1)
    command = arguments(model, given.data, tmp_path / "out", "--tasks=stsb")
    line = complaint(command, FILE)
    assert "uses 2 token types, the model's `type_vocab_size` is 1" in line


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (["text\tlabel", "w1\t1"], "line 1 has no column `sentence`; SST-2 needs"),
        (["sentence\tclass", "w1\t1"], "line 1 has no column `label`; SST-2 needs"),
        (["sentence\tlabel", "w1\t1", "w2"], "line 3 has 1 cells instead of 2"),
        (["sentence\tlabel", "w1\t1", "w2\tw3\t0"], "line 3 has 3 cells instead of 2"),
        (
            ["sentence\tlabel", "w1\t1", "w2\t2"],
            "line 3 has the label '2'; SST-2 knows",
        ),
        (["sentence\tlabel", "w1\t-1"], "line 2 has the label -1: hidden"),
        (["sentence\tlabel", "w1\t1", "\t0"], "line 3 has an empty text"),
        (["sentence\tlabel"], "holds no examples"),
    ],
)
def test_a_malformed_table_is_named_with_its_line(
    copy, tmp_path, complaint, rows, says
):
    path = tmp_path / "glue" / "SST-2" / "dev.tsv"
    write_rows(path, rows)
    command = arguments(copy, tmp_path / "glue", tmp_path / "out", "--tasks=sst2")
    line = complaint(command, FILE)
    assert f"`{path}` {says}" in line


def test_a_score_outside_the_range_is_named_with_its_line(given, tmp_path, complaint):
    rows = ["sentence1\tsentence2\tscore", "w1\tw2\t5.0", "w1\tw3\t5.1"]
    write_rows(tmp_path / "STS-B" / "dev.tsv", rows)
    model = given.root / "bert-stsb"
    command = arguments(model, tmp_path, tmp_path / "out", "--tasks=stsb")
    assert "line 3 has the score '5.1', not a number from 0" in complaint(command, FILE)


def test_a_data_dir_that_does_not_exist_is_named(copy, tmp_path, complaint):
    command = arguments(copy, tmp_path / "no", tmp_path / "out", "--tasks=sst2")
    line = complaint(command, FILE)
    assert f"`--data_dir`={tmp_path / 'no'} is not a folder; check the path." in line


def test_nothing_is_quantized_before_all_tasks_are_known_to_work(
    given, tmp_path, complaint
):
    write_rows(tmp_path / "SST-2" / "dev.tsv", ["sentence\tlabel", "w1\t1"])
    write_rows(tmp_path / "STS-B" / "dev.tsv", ["sentence1\tsentence2\tscore", "w1"])
    command = arguments(given.template, tmp_path, tmp_path / "out")
    assert "STS-B/dev.tsv` line 2 has 1 cells" in complaint(command, FILE)


def test_long_sentences_are_cut_to_the_flag_counted_and_said(copy, tmp_path, capsys):
    rows = ["sentence\tlabel", f"{LONG}\t1", "w1 w2\t0", f"w1 {LONG} w2\t1"]
    write_rows(tmp_path / "glue" / "SST-2" / "dev.tsv", rows)
    flags = ("--tasks=sst2", "--methods=full precision")
    out = tmp_path / "out"
    (cut,) = table(copy, tmp_path / "glue", out, *flags)
    assert (cut["examples"], cut["truncated"]) == (3, 2)
    assert "SST-2 3 (2 cut); at most 24 tokens each" in capsys.readouterr().out
    # All 40 positions of the model take them whole: 33 and 35 words, [CLS] and [SEP].
    whole = tmp_path / "whole"
    (all_of_it,) = table(copy, tmp_path / "glue", whole, *flags, "--max_length=40")
    assert all_of_it["truncated"] == 0
    assert "SST-2 3; at most 40 tokens each" in capsys.readouterr().out
    assert all_of_it["log_loss"] != cut["log_loss"]


def test_a_method_that_overflows_is_a_dash_and_names_the_layer(copy, tmp_path, capsys):
    def enlarge(tensors):
        tensors[WEIGHT] = 1e8 * tensors[WEIGHT]

    edit_tensors(copy, enlarge)
    out, flags = tmp_path / "out", ("--tasks=sst2", "--methods=rtn-g128,uniform")
    _, uniform, rtn = table(copy, tmp_path / "glue", out, *flags)
    assert (rtn["method"], rtn["value"]) == ("rtn-g128", None)
    assert (uniform["method"], uniform["value"] is None) == ("uniform", False)
    printed = capsys.readouterr()
    assert f"`{WEIGHT}` reaches" in printed.out
    assert "rtn-g128, 4 bits: -" in printed.err
    (page,) = out.glob("*.md")
    assert f"`{WEIGHT}` reaches" in page.read_text()
    assert json.loads(next(out.glob("*.jsonl")).read_text().splitlines()[2])["note"]
