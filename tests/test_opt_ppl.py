"""The main job end to end: what it prints and writes is complete and true."""

import json
import math
import re
import subprocess
import sys

import pytest
import tokenizers
from tiny_checkpoint import (
    CONTEXT,
    POSITIONS,
    SEEDS,
    copy,
    finished,
    numbers,
    row,
    table,
    tiny,
)

from experiments.common import perplexity as perplexity_rows
from experiments.common.methods import METHODS
from experiments.common.results import read_jsonl
from experiments.opt_ppl import OptPplConfig, main

__all__ = ["copy", "finished", "tiny"]  # fixtures

# Quantizing takes longer than compiling does.
pytestmark = pytest.mark.optimized

SCHEMA = {
    "method", "bits", "stored_bits_per_weight", "model_bits_per_weight", "perplexity",
    "relative_error", "converged_share", "quantize_seconds", "seed", "basis", "model",
    "dataset", "protocol", "context", "stride", "bos", "tokens", "text_sha256",
    "kashin_jax_version", "jax_version", "device", "increase", "note",
    "widths", "rtol", "max_steps", "max_tokens", "weights_sha256", "date",
    "bits_per_byte", "bytes", "bos_token",
}  # fmt: skip


def test_a_table_has_a_row_per_method_and_per_seed_of_random_methods(finished):
    rows = [(r["method"], r["seed"]) for r in finished.records]
    assert rows == [("full precision", None)] + [
        (name, seed)
        for name in METHODS
        for seed in ([0, 1] if METHODS[name].is_random else [None])
    ]


def test_every_record_has_every_field(finished):
    for record in finished.records:
        assert set(record) == SCHEMA
        assert record["max_tokens"] == 8192
        assert record["note"]
        assert math.isfinite(record["perplexity"])


def test_records_say_what_was_scored(finished):
    (identity,) = {
        tuple(record[key] for key in ("model", "dataset", "context", "stride", "bos"))
        for record in finished.records
    }
    assert identity == ("tiny", "text_file:tiny.txt", CONTEXT, CONTEXT, True)


def test_bits_per_byte_are_those_of_the_text_that_was_scored(finished, tiny):
    """By hand: of a window of 32 tokens the first one is not predicted."""
    text = tiny.with_suffix(".txt").read_text("utf-8")
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    # The text begins with a token of no bytes.
    starts = range(CONTEXT - 1, len(ids), CONTEXT)
    left_out = sum(len(tokenizer.decode([ids[i]]).encode()) for i in starts)
    for record in finished.records:
        assert record["bos_token"] == "</s>"
        assert record["bytes"] == len(text.encode()) - left_out
        bits = record["tokens"] * math.log2(record["perplexity"])
        assert record["bits_per_byte"] == pytest.approx(bits / record["bytes"])
    assert "the text begins with </s>" in finished.printed
    assert "bits/byte" in finished.printed


def test_fields_that_mean_nothing_for_a_method_are_null(finished):
    for record in finished.records:
        method = METHODS.get(record["method"])
        is_kashin = record["method"] in ("kashin", "kashin-authors")
        assert (record["converged_share"] is not None) == is_kashin
        assert (record["rtol"], record["max_steps"]) == (
            (1e-6, 200) if is_kashin else (None, None)
        )
        assert (record["basis"] is not None) == (
            method is not None and method.has_basis
        )
        assert (record["increase"] is None) == (method is None)


def test_the_printed_table_has_one_line_per_record(finished):
    body = finished.printed.partition("\n\n")[2]
    lines = body.splitlines()[2:]
    for record, line in zip(finished.records, lines, strict=False):
        assert re.match(rf"{re.escape(record['method'])} \[\d+\]", line)
        assert f"{record['perplexity']:.2f}" in line
    assert lines[len(finished.records)].startswith("[1] ")


def test_results_are_records_a_page_and_a_figure(finished):
    files = {path.suffix: path for path in finished.out.iterdir()}
    assert set(files) == {".jsonl", ".md", ".png"}
    assert files[".png"].read_bytes().startswith(b"\x89PNG")
    page = files[".md"].read_text()
    for record in finished.records:
        assert f"{record['perplexity']:.2f}" in page
    assert "python -m experiments.opt_ppl --bits=4" in page
    for line in files[".jsonl"].read_text().splitlines():
        assert set(json.loads(line)) == SCHEMA


def test_a_text_scored_to_its_end_is_not_called_a_beginning(finished, tiny, tmp_path):
    assert "beginning of the text" not in finished.printed
    table(tiny, tmp_path, "--methods=full precision", "--max_tokens=100")
    (page,) = tmp_path.glob("*.md")
    assert "This is the beginning of the text" in page.read_text()
    assert "'--methods=full precision'" in page.read_text()


@pytest.mark.slow
def test_the_same_command_gives_the_same_numbers_bit_for_bit(finished, tiny, tmp_path):
    assert numbers(table(tiny, tmp_path, SEEDS)) == numbers(finished.records)


def test_each_basis_is_a_row_of_the_methods_that_have_one(finished, tiny, tmp_path):
    records = table(
        tiny, tmp_path, "--basis=hadamard,haar:dct", "--methods=uniform,rotate-k-means"
    )
    assert [(r["method"], r["basis"]) for r in records] == [
        ("full precision", None),
        ("uniform", None),
        ("rotate-k-means", "hadamard"),
        ("rotate-k-means", "haar:dct"),
    ]
    assert records[2]["perplexity"] != records[3]["perplexity"]
    again = row(finished.records, "rotate-k-means", seed=0)
    assert records[2]["perplexity"] == again["perplexity"]


def test_seeds_change_random_methods(finished):
    for name, method in METHODS.items():
        rows = [r["perplexity"] for r in finished.records if r["method"] == name]
        assert len(set(rows)) == len(rows) == (2 if method.is_random else 1)


@pytest.mark.slow
def test_runs_that_differ_in_seed_or_tolerance_keep_their_own_records(tiny, tmp_path):
    for flag in ("--seed=1", "--rtol=1e-2", "--max_steps=3", "--seed=1"):
        assert main([*command(tiny, tmp_path), "--methods=kashin", flag]) == 0
    (path,) = tmp_path.glob("*.jsonl")
    choices = ("method", "seed", "rtol", "max_steps")
    assert [tuple(r[name] for name in choices) for r in read_jsonl(path)] == [
        ("full precision", None, None, None),
        ("kashin", 1, 1e-6, 200),
        ("kashin", 0, 1e-2, 200),
        ("kashin", 0, 1e-6, 3),
    ]


def test_a_method_that_does_not_exist_at_a_width_is_a_dash_and_a_reason(
    tiny, tmp_path, capsys
):
    records = table(tiny, tmp_path, "--bits=4,3", "--methods=nf4-g64,rtn-channel")
    assert [(r["method"], r["bits"]) for r in records] == [
        ("full precision", 16),
        ("rtn-channel", 3),
        ("nf4-g64", 3),
        ("rtn-channel", 4),
        ("nf4-g64", 4),
    ]
    missing = row(records, "nf4-g64", bits=3)
    assert set(missing) == SCHEMA
    assert missing["perplexity"] is None
    printed = capsys.readouterr().out
    (line,) = re.findall(r"^nf4-g64 \[(\d)\] +3((?: +-){8})$", printed, re.MULTILINE)
    assert f"[{line[0]}] NF4 exists at 4 bits only" in printed


@pytest.mark.slow
def test_dense_rows_share_one_compilation_and_packed_rows_one(tiny, tmp_path):
    context = f"--context={CONTEXT // 2}"  # a shape that no other test compiles for
    before = perplexity_rows._nll._cache_size()
    table(tiny, tmp_path / "full", context, "--methods=full precision")
    assert perplexity_rows._nll._cache_size() == before + 1
    dense = "--methods=uniform,rtn-channel,rotate-k-means"
    table(tiny, tmp_path / "dense", context, SEEDS, dense)
    assert perplexity_rows._nll._cache_size() == before + 1
    packed = "--methods=kashin,kashin-authors"
    table(tiny, tmp_path / "packed", context, SEEDS, packed)
    assert perplexity_rows._nll._cache_size() == before + 2


def test_the_context_is_the_models_own_unless_given(tiny, tmp_path):
    flags = ("--methods=full precision", "--context=0")
    (record,) = table(tiny, tmp_path, *flags)
    assert record["context"] == POSITIONS
    (tiny / "asset.json").write_text('{"trained_context": 24}')
    try:
        (record,) = table(tiny, tmp_path / "trained", *flags)
    finally:
        (tiny / "asset.json").unlink()
    assert record["context"] == 24


def command(model, out):
    """A second, plainer spelling of the command line."""
    return [
        f"--model={model}/", f"--out={out}", "--context", str(CONTEXT),
        f"--text_file={model.with_suffix('.txt')}",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_real_command_makes_a_table_of_the_embedded_checkpoint(tmp_path):
    process = subprocess.run(
        [
            sys.executable, "-W", "error", "-m", "experiments.opt_ppl", "--bits=4",
            "--max_tokens=1024", "--methods=kashin,rtn-g128", f"--out={tmp_path}",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stderr.splitlines()[0].startswith("full precision, 16 bits: ")
    (file,) = tmp_path.glob("*.jsonl")
    assert file.stem == "table2_opt"
    records = read_jsonl(file)
    assert [r["method"] for r in records] == ["full precision", "kashin", "rtn-g128"]
    assert {(r["dataset"], r["context"], r["tokens"]) for r in records} == {
        ("wiki_vital", 512, 1022)
    }
    full, ours, rtn = (r["perplexity"] for r in records)
    assert full < rtn < 1.1 * full
    assert full < ours < 1.15 * full
    assert 4.0 < records[1]["stored_bits_per_weight"] < 4.01


@pytest.mark.slow
def test_the_embedded_checkpoint_agrees_with_another_programs_numbers(tmp_path):
    """First 32 windows of 512 tokens, scored once by OPT, RTN and NF4 in NumPy."""
    flags = ["--max_tokens=16384", "--methods=rtn-g128,nf4-g64", f"--out={tmp_path}"]
    assert main(flags) == 0
    (file,) = tmp_path.glob("*.jsonl")
    full, rtn, nf4 = (record["perplexity"] for record in read_jsonl(file))
    assert full == pytest.approx(28.439, abs=0.02)
    assert rtn == pytest.approx(29.163, abs=0.05)
    assert nf4 == pytest.approx(29.184, abs=0.05)


def test_the_plain_command_has_the_documented_defaults():
    config = OptPplConfig()
    assert (config.bits, config.basis, config.seed) == (("4",), ("hadamard",), ("0",))
    assert (config.dataset, config.max_tokens) == ("wiki_vital", "8192")
