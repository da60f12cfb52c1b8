"""Sizes of checkpoints: claimed by the quantizer, counted on the disk, and the same."""

import json
from pathlib import Path

import pytest
from flax import nnx

from experiments import sizes
from experiments.common.results import read_jsonl
from experiments.sizes import SizesConfig, main
from kashin_jax import RTN, Rules
from kashin_jax.models import ClassifierConfig, SequenceClassifier
from kashin_jax.models.opt import OPTConfig, OPTForCausalLM
from kashin_jax.models.saving import save_classifier, save_opt
from kashin_jax.pipeline import inspect_checkpoint, quantize_checkpoint

# A whole program on tiny models; its parts have tests of their own.
pytestmark = pytest.mark.slow

RESULT = Path(__file__).parents[1] / "results" / "sizes.jsonl"
METHODS = "--methods=rtn-g128,nf4-g64"


def make_opt(directory, width):
    config = OPTConfig(
        vocab_size=300, hidden_size=width, num_hidden_layers=1, ffn_dim=4 * width,
        num_attention_heads=4, max_position_embeddings=32,
    )  # fmt: skip
    save_opt(OPTForCausalLM(config, rngs=nnx.Rngs(0)), config, directory)
    return directory


def make_classifier(directory):
    config = ClassifierConfig(
        model_type="bert", vocab_size=100, hidden_size=512, num_hidden_layers=1,
        num_attention_heads=4, intermediate_size=2048, max_position_embeddings=32,
    )  # fmt: skip
    save_classifier(SequenceClassifier(config, rngs=nnx.Rngs(0)), config, directory)
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return make_opt(root / "opt", 512), make_classifier(root / "bert")


def job(models, out, *flags):
    names = ",".join(map(str, models))
    return main([f"--model={names}", "--bits=2,4", METHODS, f"--out={out}", *flags])


@pytest.fixture(scope="module")
def table(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert job(models, out) == 0
    (path,) = out.glob("*.jsonl")
    return read_jsonl(path), out


def test_every_method_has_a_row_where_it_exists(table):
    records, out = table
    assert [(r["model"], r["bits"], r["method"]) for r in records] == [
        (model, bits, method)
        for model in ("opt", "bert")
        for bits in (2, 4)
        for method in ("rtn-g128", "nf4-g64")
        if (bits, method) != (2, "nf4-g64")
    ]
    assert sorted(path.suffix for path in out.iterdir()) == [".jsonl", ".md"]


def test_sizes_are_those_of_the_files_that_kashin_quantize_writes(
    table, models, tmp_path
):
    records, _ = table
    for source in models:
        target = tmp_path / source.name
        quantize_checkpoint(source, target, Rules(config=RTN(bits=4)))
        (row,) = [
            r
            for r in records
            if (r["model"], r["bits"], r["method"]) == (source.name, 4, "rtn-g128")
        ]
        counted = [
            sum(
                (directory / name).stat().st_size
                for name in ("model.safetensors", "config.json", *index)
            )
            for directory, index in (
                (target, ["model.safetensors.index.json"]),
                (source, []),
            )
        ]
        # No file holds a date or a path: equal to the byte.
        assert [row["bytes"], row["source_bytes"]] == counted
        found = inspect_checkpoint(target)
        assert row["stored_bits_per_weight"] == pytest.approx(found.bits_per_weight)
        assert (row["packed_weights"], row["weights"]) == (
            found.packed_weights,
            found.weights,
        )
        assert row["ratio"] == counted[1] / counted[0]


@pytest.mark.slow
def test_no_size_of_joint_coding_depends_on_effort_or_seed(tmp_path, monkeypatch):
    # Headers outweigh tensors as small as these.
    monkeypatch.setattr(sizes, "_ALLOWED", 10)
    tiny = make_opt(tmp_path / "tiny", 32)
    flags = ("--bits=2", "--methods=kashin-joint")
    found = []
    for i, more in enumerate(((), ("--effort=default", "--seed=7"))):
        assert job([tiny], tmp_path / str(i), *flags, *more) == 0
        (path,) = (tmp_path / str(i)).glob("*.jsonl")
        found += read_jsonl(path)
    first, second = found
    assert first["config"] != second["config"]
    assert first["claimed_bytes"] == second["claimed_bytes"]
    # `config.json` says `default` for `fast`.
    assert second["bytes"] - first["bytes"] == len("default") - len("fast")


def test_an_interrupted_run_goes_on_with_the_rows_that_are_missing(
    models, table, tmp_path, monkeypatch
):
    calls = []

    def once(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return quantize_checkpoint(*args, **kwargs)

    monkeypatch.setattr(sizes, "quantize_checkpoint", once)
    assert job(models[1:], tmp_path) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
    assert job(models[1:], tmp_path) == 0
    # One finished, one interrupted; three in all.
    assert len(calls) == 1 + 3
    (path,) = tmp_path.glob("*.jsonl")
    assert read_jsonl(path) == [r for r in table[0] if r["model"] == "bert"]
    assert not (tmp_path / "work").exists()


def test_a_size_that_is_not_as_claimed_is_an_error(tmp_path, capsys):
    # Headers outweigh tensors as small as these.
    tiny = make_opt(tmp_path / "tiny", 32)
    assert job([tiny], tmp_path / "out", "--methods=rtn-g128") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "bytes, but claims" in line
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_a_quantized_model_is_refused(models, tmp_path, capsys):
    quantize_checkpoint(models[0], tmp_path / "q", Rules(config=RTN(bits=4)))
    assert job([tmp_path / "q"], tmp_path / "out") == 2
    assert "is quantized already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--bits=9"], "`--bits`"),
        (["--methods=magic"], "`magic`"),
        (["--effort=much"], "`--effort` must be one of fast"),
        (["--bits=2", "--methods=nf4-g64"], "None of `--methods`=nf4-g64 exists"),
    ],
)
def test_flags_that_cannot_work_end_in_one_line(models, tmp_path, flags, says, capsys):
    assert main([f"--model={models[0]}", f"--out={tmp_path / 'o'}", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not list(tmp_path.rglob("*.jsonl"))


def test_the_committed_sizes_are_complete_and_within_two_percent():
    records = [json.loads(line) for line in RESULT.read_text().splitlines()]
    config = SizesConfig()
    assert {(r["model"], r["bits"], r["method"]) for r in records} == {
        (model, bits, method)
        for model in ("opt-wiki-18m", "minilm-glue")
        for bits in (2, 3, 4)
        for method in config.methods
        if bits == 4 or method != "nf4-g64"
    }
    for record in records:
        assert abs(record["bytes"] / record["claimed_bytes"] - 1) <= 0.02
        claimed = record["model_bits_per_weight"] * record["weights"] / 8
        assert record["claimed_bytes"] == pytest.approx(claimed)
        assert record["bits"] <= record["stored_bits_per_weight"] < record["bits"] + 0.3
        assert record["ratio"] == record["source_bytes"] / record["bytes"] > 1.5
