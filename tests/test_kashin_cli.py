"""The `kashin` command: flags, exit codes, and what it prints."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from quantized_sources import content, make_source
from tiny_checkpoint import edit_tensors

from kashin_jax.cli import main
from kashin_jax.cli.program import read_bits, read_size
from kashin_jax.io import hash_file, open_checkpoint
from kashin_jax.pipeline import inspect_checkpoint
from kashin_jax.pipeline import run as pipeline_run

COMMANDS = ["quantize", "inspect", "dequantize", "eval", "generate"]
RTN = ["--method=rtn", "--bits=4"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("checkpoints") / "source")


@pytest.fixture
def kashin(capsys):
    """Runs the command; its exit code and what it printed."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def failed(result, code, *parts):
    """One line on stderr, or argparse's usage and a line."""
    found, out, err = result
    assert (found, out) == (code, "")
    assert "Traceback" not in err
    for part in parts:
        assert part in err.splitlines()[-1]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(kashin, command):
    code, out, err = kashin(command, "--help")
    assert (code, err) == (0, "") and f"usage: kashin {command}" in out
    assert command in kashin("--help")[1]


def test_the_version_is_printed(kashin):
    code, out, _ = kashin("--version")
    assert code == 0 and out[0].isdigit()


def test_help_does_not_wait_for_the_models():
    code = """
import sys
from kashin_jax.cli import main
assert main(["eval", "--help"]) == 0
print("kashin_jax.models" in sys.modules, "kashin_jax.cli.commands" in sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "False False"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "command"),
        (["compress"], "compress"),
        (["quantize", "a"], "DST"),
        (["quantize", "a", "b", "--bits=four"], "'four' is not a number of bits"),
        (["quantize", "a", "b", "--bits=inf"], "number of bits"),
        (["quantize", "a", "b", "--bits=-2"], "number of bits"),
        (["quantize", "a", "b", "--method=gptq"], "choose from 'kashin-joint'"),
        (["quantize", "a", "b", "--seed=-1"], "whole number"),
        (["quantize", "a", "b", "--seed=4294967296"], "whole number"),
        (["quantize", "a", "b", "--max-shard-size=5 apples"], "such as 500MB"),
        (["quantize", "a", "b", "--max-shard-size=0"], "such as 500MB"),
        (["quantize", "a", "b", "--max-shard-size=1e400GB"], "such as 500MB"),
        (["quantize", "a", "b", "--max-shard-size=-5MB"], "such as 500MB"),
        (["quantize", "a", "b", "--max-shard-size=nan"], "such as 500MB"),
        (["quantize", "a", "b", "--max-shard-size=" + "9" * 400], "such as 500MB"),
        (["eval", "a"], "--text"),
        (["eval", "a", "--text=b", "--batch-size=0"], "whole number from 1"),
        (["generate", "a", "b", "--temperature=-1"], "0 or more"),
    ],
)
def test_wrong_use_is_exit_code_2_and_a_line(kashin, arguments, part):
    failed(kashin(*arguments), 2, part)


@pytest.mark.parametrize(
    ("text", "size"),
    [("500MB", 5 * 10**8), ("1.5gb", 15 * 10**8), ("7", 7), ("7B", 7), ("2 TB", 2e12)],
)
def test_sizes_are_powers_of_ten(text, size):
    assert read_size(text) == size and type(read_size(text)) is int


def test_whole_bits_are_integers():
    assert (read_bits("4"), read_bits("4.0"), read_bits("3.5")) == (4, 4, 3.5)
    assert type(read_bits("4.0")) is int


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--bits=9"], "bits"),
        (["--skip=("], "regular expression"),
        (["--skip=fc3"], "matches none"),
        (["--skip=."], "quantize none"),
        (["--method=rtn", "--bits=3.5"], "bits"),
    ],
)
def test_rules_that_cannot_work_are_wrong_use(kashin, source, tmp_path, flags, part):
    failed(kashin("quantize", source, tmp_path / "q", *flags), 2, part)
    assert not (tmp_path / "q").exists()


def test_what_is_not_there_is_exit_code_1(kashin, source, tmp_path):
    nothing = tmp_path / "nothing"
    failed(kashin("quantize", nothing, tmp_path / "q"), 1, "nothing", "no such dir")
    failed(kashin("inspect", nothing), 1, "no such directory")
    failed(kashin("eval", source, f"--text={nothing}"), 1, "nothing")
    failed(kashin("quantize", source, tmp_path / "q", f"--rules={nothing}"), 1, "copy")


def test_a_taken_target_is_wrong_use(kashin, source, tmp_path):
    (tmp_path / "file").write_text("")
    failed(kashin("quantize", source, tmp_path, *RTN), 2, "is not empty")
    failed(kashin("quantize", source, source, *RTN), 2, "is the source")


def test_a_dry_run_prints_the_plan_and_writes_nothing(kashin, source, tmp_path):
    before = content(source)
    flags = ["--bits=3.5", "--skip=layers/0/", "--dry-run"]
    code, out, err = kashin("quantize", source, tmp_path / "q", *flags)
    assert (code, err) == (0, "")
    roles, head, *lines, share, left, last = out.splitlines()
    assert roles.startswith("Tensors by the names of `opt`, which runs here: 12 linear")
    rows = [line for line in lines if "stays: " not in line]
    assert len(lines) == 14 and any("stays: skipped by default" in e for e in lines)
    assert sum("stays: skipped by the rules" in line for line in lines) == 6
    assert "50.0% of the weights outside embeddings and heads" in share
    assert "embed_tokens.weight [320 x 64]: skipped by default: embedding" in left
    assert head.split() == [
        "tensor",
        "layer",
        "shape",
        "method",
        "bits/weight",
        "bytes",
    ]
    assert len(rows) == 6 and all("layers/1/" in row for row in rows)
    assert "kashin-joint, 3.5 bits" in rows[0] and "64 x 128" in rows[0]
    assert last.startswith("6 matrices quantized")
    assert not (tmp_path / "q").exists() and content(source) == before


RULES = [
    {"pattern": "fc1", "method": "rtn", "bits": 3, "group_size": 32},
    {"pattern": "layers/1/fc2", "skip": True},
]


@pytest.mark.parametrize("form", ["list", "object"])
def test_a_file_of_rules_says_what_becomes_of_single_layers(
    kashin, source, tmp_path, form
):
    file = tmp_path / "rules.json"
    default = {"method": "rtn", "bits": 2, "group_size": 64}
    whole = {"config": default, "rules": RULES, "skip": ["q_proj"]}
    file.write_text(json.dumps(RULES if form == "list" else whole))
    flags = ["--method=rtn", "--bits=2"] if form == "list" else []
    skips = ["--skip=q_proj"] if form == "list" else ["--skip=k_proj"]
    code, out, _ = kashin(
        "quantize", source, tmp_path / "q", f"--rules={file}", *flags, *skips
    )
    assert code == 0
    checkpoint = open_checkpoint(tmp_path / "q")
    bits = {
        name: checkpoint.described(name).layout.bits for name in checkpoint.descriptions
    }
    assert len(bits) == {"list": 9, "object": 7}[form]
    assert {b for name, b in bits.items() if "fc1" in name} == {3}
    assert {b for name, b in bits.items() if "fc1" not in name} == {2}
    assert not any("layers.1.fc2" in name or "q_proj" in name for name in bits)
    assert f"{out.count('weights quantized')}" == "1"


@pytest.mark.parametrize(
    ("text", "code"),
    [("[{]", 2), ("[" * 9999, 2), ("{", 1), ("3", 1), ('{"rule": []}', 2), ("[3]", 2)],
)
def test_files_of_rules_that_are_none_are_named(kashin, source, tmp_path, text, code):
    file = tmp_path / "rules.json"
    file.write_text(text)
    failed(kashin("quantize", source, tmp_path / "q", f"--rules={file}"), code)
    assert not (tmp_path / "q").exists()


def test_a_method_beside_rules_with_one_is_wrong_use(kashin, source, tmp_path):
    file = tmp_path / "rules.json"
    file.write_text('{"config": {"method": "rtn"}}')
    flags = [f"--rules={file}", "--bits=3"]
    failed(kashin("quantize", source, tmp_path / "q", *flags), 2, "contradict")


@pytest.fixture(scope="module")
def quantized(source):
    target = source.parent / "quantized"
    assert main(["quantize", str(source), str(target), *RTN]) == 0
    return target


def test_inspecting_lists_every_tensor(kashin, quantized):
    code, out, err = kashin("inspect", quantized)
    assert (code, err) == (0, "")
    head, *rows = out.splitlines()
    assert head.startswith("tensor")
    names = open_checkpoint(quantized).names()
    assert [row.split()[0] for row in rows[: len(names)]] == names
    found = inspect_checkpoint(quantized)
    roles, weights, share, left, total, intact = rows[len(names) :]
    assert roles.startswith("Tensors by the names of `opt`, which runs here: 12 linear")
    assert share.startswith("Quantized: 71.4% of the weights") and "embed" in left
    assert f"{found.packed_weights:,} weights quantized, " in weights
    assert f"{found.bits_per_weight:.3f} stored bits each." in weights
    assert f"in {found.disk_bytes:,} bytes" in total
    assert intact == "Every file is as it was written."


def test_inspecting_as_json_tells_the_same(kashin, quantized):
    code, out, _ = kashin("inspect", quantized, "--json")
    found, read = inspect_checkpoint(quantized), json.loads(out)
    assert code == 0
    assert read["bits_per_weight"] == found.bits_per_weight
    assert read["damaged"] == []
    assert read["roles"]["counts"] == found.roles.counts
    assert read["coverage"]["inner"] == found.coverage.inner == 1
    assert read["coverage"]["left"][0]["name"] == "model.decoder.embed_tokens.weight"
    assert [row["name"] for row in read["tensors"]] == [r.name for r in found.tensors]
    assert read["tensors"][0]["shape"] == list(found.tensors[0].shape)


@pytest.mark.parametrize("shape", [None, (0, 4)])
def test_inspecting_a_checkpoint_without_weights(kashin, tmp_path, shape):
    """It divided by the number of weights."""
    tensors = {} if shape is None else {"a.weight": np.zeros(shape, np.float32)}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    code, out, _ = kashin("inspect", tmp_path)
    assert code == 0 and "0 weights in" in out


def test_whatever_stays_dense_is_named(kashin, tmp_path, caplog):
    """Arrays of three axes and float64 were copied without a word."""
    source = tmp_path / "source"
    source.mkdir()
    tensors = {
        "layers.0.attn.q_proj.weight": np.ones((64, 64), np.float32),
        "layers.0.mixer.in_proj": np.ones((16, 64, 64), np.float32),
        "b.weight": np.ones((64, 64), np.float64),
        "c": np.ones((64, 64), np.float32),
    }
    safetensors.numpy.save_file(tensors, source / "model.safetensors")
    code, out, _ = kashin("quantize", source, tmp_path / "q", *RTN)
    assert code == 0 and "Quantized: 5.3% of the weights" in out
    for text in (out, caplog.text):
        assert "layers.0.mixer.in_proj [16 x 64 x 64]: has 3 axes" in text
        assert "b.weight [64 x 64]: its type is float64" in text
        assert "c [64 x 64]: is not called weight" in text


def test_inspecting_reads_the_files_once(kashin, quantized, monkeypatch):
    hashed = []

    def counted(path, *args):
        hashed.append(path.name)
        return hash_file(path, *args)

    monkeypatch.setattr("kashin_jax.io.checkpoint.hash_file", counted)
    assert kashin("inspect", quantized)[0] == 0
    assert hashed == ["model.safetensors"]


def test_inspecting_a_checkpoint_that_is_not_quantized(kashin, source):
    code, out, _ = kashin("inspect", source)
    assert code == 0 and "weights quantized" not in out and "as it was" not in out


def test_dequantizing_prints_what_it_wrote(kashin, quantized, tmp_path):
    code, out, err = kashin("dequantize", quantized, tmp_path / "new")
    assert (code, err) == (0, "") and "weights in" in out
    failed(kashin("dequantize", tmp_path / "new", tmp_path / "x"), 2, "no packed")


def test_ctrl_c_is_exit_code_130_and_the_run_goes_on(
    kashin, source, quantized, tmp_path, monkeypatch
):
    arguments = ["quantize", source, tmp_path / "q", *RTN]
    count, quantize = 0, pipeline_run.quantize_stack

    def interrupted(*args, **kwargs):
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt
        return quantize(*args, **kwargs)

    monkeypatch.setattr(pipeline_run, "quantize_stack", interrupted)
    code, out, err = kashin(*arguments)
    assert (code, err) == (130, "kashin quantize: interrupted.\n")
    assert out.startswith("Tensors by the names of `opt`")
    assert kashin(*arguments)[0] == 0
    again, expected = content(tmp_path / "q"), content(quantized)
    # It holds the seconds that layers took.
    again.pop(".kashin_quantize.json"), expected.pop(".kashin_quantize.json")
    assert again == expected


def test_a_finished_command_is_done_already_and_others_are_told_what_differs(
    kashin, source, tmp_path
):
    arguments = ["quantize", source, tmp_path / "q", *RTN]
    assert kashin(*arguments)[0] == 0
    code, out, _ = kashin(*arguments)
    assert code == 0 and out.startswith("Already done: ")
    failed(kashin(*arguments, "--seed=1"), 2, "other seed (0, not 1)", "--force")
    code, out, _ = kashin(*arguments, "--seed=1", "--force")
    assert code == 0 and "Already" not in out
    failed(kashin(*arguments, "--force", "--restart"), 2, "not allowed with")


@pytest.mark.slow
def test_a_reader_that_has_had_enough_is_no_error(quantized):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "kashin_jax.cli", "inspect", str(quantized)]
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (result.returncode, result.stderr) == (0, "")


def test_every_field_of_a_method_can_be_set(kashin, source, tmp_path):
    """Effort, groups and bases were out of reach but by a file of rules."""
    settings = ["--set=group_size=16", "--set=basis=haar:identity"]
    flags = ["--method=rotate-rtn", "--bits=3", *settings]
    assert kashin("quantize", source, tmp_path / "q", *flags)[0] == 0
    config = open_checkpoint(tmp_path / "q").quantization["rules"]["config"]
    assert config == {
        "method": "rotate-rtn", "bits": 3, "group_size": 16, "basis": "haar:identity"
    }  # fmt: skip
    found = kashin("quantize", source, tmp_path / "r", "--set=sparsity=1")
    failed(found, 2, "no field 'sparsity'")
    assert kashin("quantize", source, tmp_path / "r", "--set=effort")[0] == 2


def test_a_layer_that_is_lost_is_named(kashin, tmp_path, caplog):
    """A grid over one outlier leaves nothing of the rest of the matrix."""
    make_source(tmp_path / "source")

    def spoil(tensors):
        name = next(n for n in sorted(tensors) if n.endswith("fc1.weight"))
        tensors[name] = np.where(np.eye(*tensors[name].shape) > 0, 1.0, 0.01)
        tensors[name] = tensors[name].astype(np.float16)

    edit_tensors(tmp_path / "source", spoil)
    flags = ["--method=uniform", "--bits=1"]
    assert kashin("quantize", tmp_path / "source", tmp_path / "q", *flags)[0] == 0
    assert "layers are lost, with relative errors above 0.5" in caplog.text


def test_curly_quotes_in_rules_are_named(kashin, source, tmp_path):
    file = tmp_path / "rules.json"
    file.write_text(
        "[{\u201cpattern\u201d: \u201cfc1\u201d, \u201cbits\u201d: 3}]", "utf-8"
    )
    found = kashin("quantize", source, tmp_path / "q", f"--rules={file}")
    failed(found, 2, "which a word processor makes")


@pytest.mark.slow
def test_text_that_a_terminal_cannot_show_is_escaped(source, tmp_path):
    file = tmp_path / "rules.json"
    file.write_text("[{\u201cpattern\u201d: 1}]", "utf-8")
    command = [
        sys.executable,
        "-m",
        "kashin_jax.cli",
        "quantize",
        source,
        tmp_path / "q",
    ]
    done = subprocess.run(
        [*command, f"--rules={file}"], capture_output=True, text=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii:strict"},
    )  # fmt: skip
    assert done.returncode == 2 and "\\u201c" in done.stderr
