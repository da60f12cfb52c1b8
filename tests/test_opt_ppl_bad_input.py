"""Whatever is wrong with flags or files: one line that names it, and an exit code."""

import dataclasses
import json

import numpy as np
import pytest
from tiny_checkpoint import (
    POSITIONS,
    VOCABULARY,
    arguments,
    copy,
    edit_config,
    edit_tensors,
    make_tokenizer,
    tiny,
)

from experiments.common.text import ASSETS
from experiments.opt_ppl import OptPplConfig, main

__all__ = ["copy", "tiny"]  # fixtures

USAGE, FILE = 2, 1
WEIGHT = "model.decoder.layers.1.fc1.weight"


@pytest.fixture
def complaint(tmp_path, capsys):
    """Runs a command that must fail cleanly; the line it prints."""

    def run(command, code, out=tmp_path / "out"):
        assert main(command) == code
        printed = capsys.readouterr()
        assert printed.out == ""
        (line,) = printed.err.splitlines()
        assert line.startswith("opt_ppl: ")
        assert not out.is_dir() or [p for p in out.rglob("*") if p.is_file()] == []
        return line

    return run


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--datset=wikitext2", "datset"),
        ("wikitext2", "`wikitext2` is not a flag"),
        ("--dataset=c5", "`--dataset` must be one of wiki_vital, wikitext2, wikitext2"),
        ("--methods=gptq", "`--methods` has no `gptq`. Choose all or from: kashin"),
        ("--methods=", "`--methods` is empty. Choose from: kashin"),
        ("--basis=fourier", "`--basis`: Unknown basis `fourier`. Choose from"),
        ("--basis=haar:fourier", "Unknown basis `fourier`. Choose from"),
        ("--basis=", "`--basis` must be given"),
        ("--bits=0", "`--bits` must list numbers in [1, 8]"),
        ("--bits=9", "`--bits` must list numbers in [1, 8]"),
        ("--bits=4,x", "`--bits` must list numbers in [1, 8]"),
        ("--bits=-4", "`--bits` must list numbers in [1, 8]"),
        ("--bits=2.5x", "with three decimals at most. Got '2.5x'"),
        ("--bits=", "`--bits` must be given"),
        ("--seed=-1", "`--seed` must list whole numbers in [0, 2147483647]. Got '-1'"),
        ("--seed=2147483648", "`--seed` must list whole numbers in [0, 2147483647]"),
        ("--seed=", "`--seed` must be given"),
        ("--context=1", "`--context` must be 0 or at least 2. Got 1"),
        ("--context=-5", "`--context` must be 0 or at least 2. Got -5"),
        ("--context=x", "--context=x"),
        ("--max_tokens=0", "`--max_tokens` must be at least 2. Got 0"),
        ("--max_tokens=1", "`--max_tokens` must be at least 2. Got 1"),
        ("--max_tokens=-5", "`--max_tokens` must be `all` or a whole number. Got -5"),
        ("--max_tokens=abc", "`--max_tokens` must be `all` or a whole number. Got abc"),
        ("--rtol=0", "`--rtol` must be in (0, 1). Got 0.0"),
        ("--rtol=1", "`--rtol` must be in (0, 1). Got 1.0"),
        ("--rtol=nan", "`--rtol` must be in (0, 1). Got nan"),
        ("--max_steps=0", "`--max_steps` must be at least 1. Got 0"),
        ("--batch_size=0", "`--batch_size` must be at least 1. Got 0"),
        ("--batch_size=four", "--batch_size=four"),
        ("--model=", "`--model` must be given"),
        ("--out=", "`--out` must be given"),
        (f"--context={POSITIONS + 1}", "`--context`=65 exceeds the 64 positions"),
    ],
)
def test_a_flag_that_cannot_work_is_named(tiny, tmp_path, complaint, flag, says):
    assert says in complaint([*arguments(tiny, tmp_path / "out"), flag], USAGE)


def test_help_is_the_manual_with_every_flag(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr()
    assert "Exit code 0: done" in printed.out
    for field in dataclasses.fields(OptPplConfig):
        name = f"[no]{field.name}" if field.type is bool else field.name
        assert f"--{name}:" in printed.out
    assert printed.err == ""


@pytest.mark.parametrize("place", ["file", "file/below", "/dev/null/x"])
def test_an_output_that_cannot_be_written_is_found_out_first(
    tmp_path, complaint, place
):
    (tmp_path / "file").write_text("mine")
    # The model does not exist either: the output is tried before anything is read.
    command = [f"--model={tmp_path / 'none'}", f"--out={tmp_path / place}"]
    line = complaint(command, USAGE)
    assert f"`--out` {tmp_path / place} cannot be written" in line
    assert "choose another directory" in line
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty; give a file with text in it."),
        (b" \n\n", "is empty; give a file with text in it."),
        (b"abc\xff\xfe\x00", "is not UTF-8 text (byte 3); convert it to UTF-8."),
        (None, "cannot be read (No such file or directory); check the path."),
    ],
)
def test_a_text_that_cannot_be_read_is_named(tiny, tmp_path, complaint, content, says):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    line = complaint(arguments(tiny, tmp_path / "out", text=text), FILE)
    assert line == f"opt_ppl: `{text}` {says}"


def test_the_text_that_is_scored_does_not_calibrate(tiny, tmp_path, complaint):
    """Guards figures of a test text that was learned from."""
    text = tiny.with_suffix(".txt")
    flags = [f"--calibration={text}", "--calibration_tokens=128"]
    line = complaint(arguments(tiny, tmp_path / "out", *flags), USAGE)
    assert f"`--calibration={text}` is the text that is scored; name another." in line


def test_a_directory_is_no_text(tiny, tmp_path, complaint):
    line = complaint(arguments(tiny, tmp_path / "out", text=tmp_path), FILE)
    assert f"`{tmp_path}` cannot be read (Is a directory)" in line


def test_a_text_shorter_than_a_window_is_refused_where_windows_must_be_full(
    tiny, tmp_path, complaint
):
    written = tmp_path / "wikitext2" / "wiki.test.raw"
    written.parent.mkdir()
    written.write_text(" Made up . \n" * 100)
    flags = [
        "--dataset=wikitext2-gptq", "--text_file=", "--max_tokens=20",
        f"--data_dir={tmp_path}",
    ]  # fmt: skip
    line = complaint([*arguments(tiny, tmp_path / "out"), *flags], FILE)
    assert "Got 20; give a longer text or a smaller context." in line


def test_a_data_set_that_nobody_has_is_named_and_not_replaced(
    tiny, tmp_path, complaint, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", _no_network)
    flags = ["--dataset=ptb", "--text_file=", f"--data_dir={tmp_path}"]
    line = complaint([*arguments(tiny, tmp_path / "out"), *flags], FILE)
    assert line == (
        f"opt_ppl: `{tmp_path}/ptb/ptb.test.txt` is missing and "
        "`ptb-text-only/ptb_text_only` cannot be loaded from the hub (ConnectionError);"
        " put the file into a folder that `--data_dir` names or go online."
    )


def _no_network(self, repository, timeout):
    raise ConnectionError


def test_a_model_that_is_not_there_is_named(tiny, tmp_path, complaint):
    missing = tmp_path / "none" / "model"
    line = complaint([*arguments(tiny, tmp_path / "out"), f"--model={missing}"], FILE)
    assert line == f"opt_ppl: {missing}: no such directory; check the path."


def test_a_hub_id_without_a_network_says_what_to_download(
    tmp_path, complaint, monkeypatch
):
    import huggingface_hub

    class Offline:
        def model_info(self, hub_id, timeout):
            raise ConnectionError

    def nothing_downloaded(*args, **kwargs):
        raise FileNotFoundError

    monkeypatch.setattr(huggingface_hub, "HfApi", Offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing_downloaded)
    line = complaint(["--model=facebook/opt-125m", f"--out={tmp_path / 'out'}"], FILE)
    assert "facebook/opt-125m: no such directory, and the hub cannot" in line
    assert "https://huggingface.co/facebook/opt-125m into a directory" in line


def break_weights(keep):
    def change(directory):
        path = directory / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])

    return change


def scramble_header(directory):
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[:64] = b"\xa5" * 64
    path.write_bytes(content)


def poison(value):
    def change(tensors):
        tensors[WEIGHT] = tensors[WEIGHT].copy()
        tensors[WEIGHT][3, 4] = value

    return lambda directory: edit_tensors(directory, change)


def write(name, content):
    return lambda directory: (directory / name).write_text(content)


def remove(name):
    return lambda directory: (directory / name).unlink()


def larger_tokenizer(directory):
    text = (ASSETS / "wiki_vital" / "valid.txt").read_text("utf-8")[:20_000]
    make_tokenizer(text, directory / "tokenizer.json", VOCABULARY + 1)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (break_weights(0), "model.safetensors: is truncated or damaged"),
        (break_weights(50), "model.safetensors: is truncated or damaged"),
        (break_weights(-1), "model.safetensors: is truncated or damaged"),
        (scramble_header, "model.safetensors: is truncated or damaged"),
        (remove("model.safetensors"), "holds no weights; put one of model.safetensors"),
        (poison(np.nan), f"`{WEIGHT}` has NaN or infinite values; download it again."),
        (poison(np.inf), f"`{WEIGHT}` has NaN or infinite values; download it again."),
        (remove("config.json"), "config.json: is missing; copy or download it."),
        (write("config.json", "{"), "config.json: is not valid JSON"),
        (write("config.json", "[]"), "config.json: is not a JSON object"),
        (remove("tokenizer.json"), "has no tokenizer: add `tokenizer.json`"),
        (write("tokenizer.json", "{}"), "is not a readable tokenizer"),
        (write("asset.json", "{}"), "has no whole number `trained_context`"),
        (larger_tokenizer, f"the model's `vocab_size` is {VOCABULARY}; use"),
    ],
)
def test_a_damaged_checkpoint_is_named(copy, tmp_path, complaint, damage, says):
    copy.with_suffix(".txt").write_text("A text.")
    damage(copy)
    line = complaint([*arguments(copy, tmp_path / "out"), "--context=0"], FILE)
    assert says in line
    assert str(copy) in line or "tokenizer" in line


@pytest.mark.parametrize(
    "field", ["hidden_size", "vocab_size", "num_hidden_layers", "ffn_dim"]
)
def test_a_configuration_without_a_field_is_named(copy, tmp_path, complaint, field):
    edit_config(copy, lambda content: content.pop(field))
    line = complaint(arguments(copy, tmp_path / "out"), FILE)
    assert f"{copy / 'config.json'}: field `{field}` is missing; restore" in line


def test_another_architecture_is_refused(copy, tmp_path, complaint):
    edit_config(copy, lambda content: content.update(model_type="bert"))
    line = complaint(arguments(copy, tmp_path / "out"), USAGE)
    assert "is a classifier (bert); name a language model." in line
    edit_config(copy, lambda content: content.update(model_type="mamba"))
    line = complaint(arguments(copy, tmp_path / "out"), FILE)
    assert "`model_type` is 'mamba'; models that run here are" in line


def test_weights_of_another_size_are_refused(copy, tmp_path, complaint):
    edit_config(copy, lambda content: content.update(ffn_dim=128))
    line = complaint(arguments(copy, tmp_path / "out"), FILE)
    assert "but config.json asks for" in line


def test_a_method_that_overflows_is_a_dash_and_names_the_layer(copy, tmp_path, capsys):
    def enlarge(tensors):
        for name, value in tensors.items():
            tensors[name] = value.astype(np.float32)
        tensors[WEIGHT] = 1e8 * tensors[WEIGHT]

    edit_tensors(copy, enlarge)
    copy.with_suffix(".txt").write_text("A text.")
    out = tmp_path / "out"
    assert main([*arguments(copy, out), "--methods=rtn-channel,uniform"]) == 0
    table = capsys.readouterr().out
    assert f"`{WEIGHT}` reaches" in table
    (jsonl,) = out.glob("*.jsonl")
    _, uniform, rtn = map(json.loads, jsonl.read_text().splitlines())
    assert rtn["method"] == "rtn-channel" and rtn["perplexity"] is None
    assert uniform["method"] == "uniform" and uniform["perplexity"] is not None


def test_a_trained_length_beyond_the_positions_is_cut(copy, tmp_path):
    (copy / "asset.json").write_text(json.dumps({"trained_context": 10 * POSITIONS}))
    copy.with_suffix(".txt").write_text("A text. " * 100)
    out = tmp_path / "out"
    flags = ["--context=0", "--methods=full precision"]
    assert main([*arguments(copy, out), *flags]) == 0
    (file,) = out.glob("*.jsonl")
    assert json.loads(file.read_text())["context"] == POSITIONS
