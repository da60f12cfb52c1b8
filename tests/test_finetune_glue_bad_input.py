"""Fine-tuning refuses what cannot work, in one line, before any step."""

import dataclasses
import json
import shutil

import pytest
from tiny_finetuning import arguments, tokenizer, write_model, write_tasks

from experiments.finetune_glue import main
from experiments.finetuning.config import FinetuneConfig


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    directory = tmp_path_factory.mktemp("given")
    model = write_model(directory / "model")
    return {"model": str(model), "data_dir": str(write_tasks(directory / "glue"))}


def _message(capsys, flags, code):
    assert main(flags) == code
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"task": "squad"}, "`--task` must be one of cola, sst2"),
        ({"task": ""}, "`--task` must be one of"),
        ({"epochs": 0}, "`--epochs` must be positive"),
        ({"epochs": "nan"}, "`--epochs` must be positive"),
        ({"epochs": -1}, "`--epochs` must be positive"),
        ({"warmup_fraction": 1}, "`--warmup_fraction` must be in [0, 1)"),
        ({"warmup_fraction": -0.1}, "`--warmup_fraction` must be in [0, 1)"),
        ({"batch_size": 0}, "`--batch_size` must be at least 1"),
        ({"grad_accumulation": 3}, "`--grad_accumulation`=3 must divide"),
        ({"learning_rate": 0}, "`--learning_rate` must be positive"),
        ({"weight_decay": "inf"}, "`--weight_decay` must be at least 0 and finite"),
        ({"clip": 0}, "`--clip` must be positive"),
        ({"dropout": 1}, "`--dropout` must be -1 or in [0, 1)"),
        ({"dtype": "float16"}, "`--dtype` must be bfloat16 or float32"),
        ({"max_length": 41}, "`--max_length`=41 exceeds the 40 positions"),
        ({"max_length": 2}, "`--max_length` must be at least 3"),
        ({"labels": "negative,positive"}, "name it by `--head` too"),
        ({"head": "stored", "labels": "a,b"}, "must hold each label of SST-2 once"),
        ({"eval_batch_size": 0}, "`--eval_batch_size` must be at least 1"),
        ({"out": ""}, "`--out` must be given"),
        ({"out": "/dev/null/run"}, "`--out=/dev/null/run` cannot be written"),
        ({"seed": -1}, "`--seed` must be at least 0"),
        ({"speed": 3}, "speed"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(
    changes, named, given, tmp_path, capsys
):
    flags = arguments(**given | {"out": tmp_path / "o"} | changes)
    assert named in _message(capsys, flags, 2)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "no/where/at/all"}, "no/where/at/all: no such directory"),
        ({"data_dir": "no/where"}, "`--data_dir`=no/where is not a folder"),
        ({"head": "rte"}, "has no head 'rte'"),
        ({"head": "stored"}, "names its outputs LABEL_0, LABEL_1"),
        ({"head": "stored", "task": "stsb"}, "STS-B needs a head with one output"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_and_exit_code_1(
    changes, named, given, tmp_path, capsys
):
    flags = arguments(**given | {"out": tmp_path / "o"} | changes)
    assert named in _message(capsys, flags, 1)
    assert not (tmp_path / "o").exists()


def test_a_head_with_generic_names_is_taken_once_its_labels_are_stated(
    given, tmp_path, capsys
):
    flags = arguments(**given, out=tmp_path, head="stored", epochs=0.1)
    assert main([*flags, "--labels=positive,negative"]) == 0
    content = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert content["id2label"] == {"0": "positive", "1": "negative"}


def _larger_vocabulary(directory):
    larger = tokenizer()
    larger.add_tokens(["more"])
    larger.save(str(directory / "tokenizer.json"))
    return "tokens, the model's `vocab_size` is 26"


def _other_padding(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"pad_token_id": 1}))
    return "pads with token 0"


def _no_tokenizer(directory):
    (directory / "tokenizer.json").unlink()
    return "tokenizer"


@pytest.mark.parametrize("damage", [_larger_vocabulary, _other_padding, _no_tokenizer])
def test_a_tokenizer_that_is_not_the_models_is_refused(damage, given, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(given["model"], model)
    named = damage(model)
    flags = arguments(**given | {"model": model, "out": tmp_path / "o"})
    assert named in _message(capsys, flags, 1)


def test_token_types_that_the_model_lacks_are_refused(given, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    model = write_model(tmp_path / "model", type_vocab_size=1)
    flags = arguments(**given | {"model": model, "task": "stsb", "out": tmp_path / "o"})
    message = _message(capsys, flags, 1)
    assert "uses 2 token types, the model's `type_vocab_size` is 1" in message


def test_the_directory_of_another_run_is_refused_and_cut_texts_are_counted(
    given, tmp_path, capsys
):
    flags = arguments(**given, out=tmp_path / "o", stop_after=1, max_length=13)
    assert main(flags) == 3
    # And what it could not take whole is counted and said.
    rows = (tmp_path / given["data_dir"] / "SST-2" / "train.tsv").read_text()
    long = sum(len(row.split("\t")[0].split()) > 11 for row in rows.splitlines())
    assert long > 0
    assert f"{long} of them were cut to 13 tokens" in capsys.readouterr().out
    message = _message(capsys, [*flags, "--seed=1"], 1)
    assert "holds a run with `seed`=0, not 1" in message
    shutil.copytree(given["data_dir"], tmp_path / "glue")
    with (tmp_path / "glue" / "SST-2" / "train.tsv").open("a") as file:
        file.write("one more\t1\n")
    message = _message(capsys, [*flags, f"--data_dir={tmp_path / 'glue'}"], 1)
    assert "holds a run with `data_sha256`=" in message
    (tmp_path / "model").mkdir()
    other = write_model(tmp_path / "model", initializer_range=0.2)
    message = _message(capsys, [*flags, f"--model={other}"], 1)
    assert "holds a run with `model_sha256`=" in message


def test_help_names_every_flag(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(field.name in text for field in dataclasses.fields(FinetuneConfig))
    assert "python -m experiments.finetune_glue --task=rte" in text
