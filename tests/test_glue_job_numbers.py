"""The numbers of GLUE's table, against definitions and dense weights scored by hand."""

import jax
import numpy as np
import pytest
import safetensors.numpy
import scipy.special
import scipy.stats
from tiny_classifier import (
    LINEARS,
    SIDE,
    by_hand,
    copy,
    edit_tensors,
    finished,
    given,
    pick,
    table,
)

from experiments.common.results import read_jsonl
from experiments.glue import main
from kashin_jax import BasisSpec, GreedyKashin, dequantize, quantize
from kashin_jax.models import load_classifier
from kashin_jax.pipeline import path_key, replace_kernels, selected_kernels

__all__ = ["copy", "finished", "given"]  # fixtures

# Quantizing takes longer than compiling does.
# Whole programs on tiny models: their numbers, resumption and files.
pytestmark = [pytest.mark.optimized, pytest.mark.slow]

WEIGHTS = SIDE * SIDE
# Stored bits of one 64 x 64 matrix at 4 bits, codes left out, from the definitions.
OVERHEAD = {
    "uniform": 2 * 32,
    "k-means": 16 * 32 + 32,
    "kashin": 16 * 2 * 32 + 32 + 64,
    "rtn-g128": SIDE * (16 + 4),
    "nf4-g64": SIDE * 16,
    "rotate-k-means": 16 * 32 + 32 + 64,
}


def test_stored_bits_are_what_the_formats_take(finished):
    for name, extra in OVERHEAD.items():
        rows = pick(finished.records, method=name)
        assert {r["stored_bits_per_weight"] for r in rows} == {4 + extra / WEIGHTS}
    full = pick(finished.records, method="full precision")
    assert {(r["bits"], r["stored_bits_per_weight"]) for r in full} == {(32, 32.0)}


def test_model_bits_count_all_other_parameters_as_stored(finished, given):
    quantized = LINEARS["bert"] * WEIGHTS
    for task in ("sst2", "stsb"):
        path = given.root / f"bert-{task}" / "model.safetensors"
        tensors = safetensors.numpy.load_file(path).values()
        parameters = sum(tensor.size for tensor in tensors)
        for record in pick(finished.records, task=task):
            bits = record["stored_bits_per_weight"] * quantized
            expected = (bits + 32 * (parameters - quantized)) / parameters
            assert record["model_bits_per_weight"] == pytest.approx(expected, rel=1e-12)


def accuracy(outputs, labels):
    return 100 * float(np.mean(outputs.argmax(axis=1) == labels))


def log_loss(outputs, labels):
    logs = scipy.special.log_softmax(outputs, axis=1)
    return -np.mean([log[int(label)] for log, label in zip(logs, labels, strict=True)])


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_accuracies_equal_those_of_examples_scored_by_hand(
    given, finished, tmp_path, kind
):
    model = given.root / f"{kind}-sst2"
    flags = ("--tasks=sst2", "--methods=full precision")
    (record,) = table(model, given.data, tmp_path, *flags)
    with jax.default_matmul_precision("highest"):
        outputs, labels = by_hand(load_classifier(model), "sst2", given.data)
    assert record["value"] == pytest.approx(accuracy(outputs, labels), rel=1e-12)
    assert record["log_loss"] == pytest.approx(log_loss(outputs, labels), rel=1e-5)


def test_correlations_equal_those_of_examples_scored_by_hand(finished, given):
    loaded = load_classifier(given.root / "bert-stsb")
    with jax.default_matmul_precision("highest"):
        outputs, labels = by_hand(loaded, "stsb", given.data)
    full = pick(finished.records, task="stsb", method="full precision")
    assert {r["metric"]: r["value"] for r in full} == pytest.approx({
        "pearson": 100 * scipy.stats.pearsonr(outputs[:, 0], labels).statistic,
        "spearman": 100 * scipy.stats.spearmanr(outputs[:, 0], labels).statistic,
    }, rel=1e-4)  # fmt: skip


def test_a_quantized_row_is_the_dense_model_on_decoded_weights(finished, given):
    loaded = load_classifier(given.root / "bert-sst2")
    config = GreedyKashin(
        bits=4, basis=BasisSpec.parse("hadamard"), rtol=1e-6, max_steps=6000
    )
    with jax.default_matmul_precision("highest"):
        kernels, errors = {}, []
        for path, kernel in selected_kernels(loaded.model).items():
            tensor, _ = quantize(kernel, config, path_key(jax.random.key(1), path))
            kernels[path] = dequantize(tensor)
            lost = np.square(np.asarray(kernel - kernels[path], np.float64)).sum()
            errors.append(lost / np.square(np.asarray(kernel, np.float64)).sum())
        usual, labels = by_hand(loaded, "sst2", given.data)
        model = replace_kernels(loaded.model, kernels)
        outputs, _ = by_hand(loaded._replace(model=model), "sst2", given.data)
    (found,) = pick(finished.records, task="sst2", method="kashin", seed=1)
    assert found["value"] == pytest.approx(accuracy(outputs, labels), rel=1e-12)
    assert found["log_loss"] == pytest.approx(log_loss(outputs, labels), rel=1e-4)
    flips = np.mean(outputs.argmax(axis=1) != usual.argmax(axis=1))
    assert found["flip_rate"] == flips
    assert found["relative_error"] == pytest.approx(np.mean(errors), rel=1e-4)
    # The encoder's matrices and the pooler; not embeddings, not the classifier.
    assert len(kernels) == LINEARS["bert"]
    assert "pooler" in kernels
    assert not [path for path in kernels if "classifier" in path]


def test_some_method_changes_answers(finished):
    assert any(r["flip_rate"] for r in finished.records)


# With the identity as basis nothing converges but matrices of constant magnitude.
IDENTITY = (
    "--tasks=sst2", "--basis=identity", "--methods=kashin,kashin-authors",
    "--max_steps=50",
)  # fmt: skip


@pytest.mark.slow
def test_where_no_layer_converges_the_authors_variant_is_full_precision(
    given, tmp_path
):
    records = table(given.root / "bert-sst2", given.data, tmp_path, *IDENTITY)
    full, ours, theirs = records
    assert theirs["method"] == "kashin-authors"
    assert ours["converged_share"] == theirs["converged_share"] == 0
    assert (theirs["flip_rate"], theirs["relative_error"]) == (0, 0)
    assert theirs["log_loss"] == full["log_loss"] != ours["log_loss"]
    assert theirs["stored_bits_per_weight"] == 32


def test_a_layer_that_does_not_converge_stays_in_the_authors_variant(copy, tmp_path):
    hard = "bert.pooler.dense.weight"

    def flatten_the_others(tensors):
        for name, value in tensors.items():
            if value.ndim == 2 and ("encoder" in name):
                tensors[name] = np.where(value < 0, -0.125, 0.125).astype(value.dtype)

    edit_tensors(copy, flatten_the_others)
    assert hard in safetensors.numpy.load_file(copy / "model.safetensors")
    records = table(copy, tmp_path / "glue", tmp_path / "out", *IDENTITY)
    full, ours, theirs = records
    assert ours["converged_share"] == theirs["converged_share"] == 12 / 13
    assert theirs["relative_error"] < 1e-9 < ours["relative_error"]
    assert theirs["stored_bits_per_weight"] == pytest.approx(
        (12 * ours["stored_bits_per_weight"] + 32) / 13, rel=1e-12
    )
    assert theirs["log_loss"] == pytest.approx(full["log_loss"], rel=1e-4)
    assert abs(ours["log_loss"] - full["log_loss"]) > 1e-3


@pytest.mark.slow
def test_the_embedded_checkpoint_scores_what_another_program_measured(tmp_path, capsys):
    """Its SST-2 head on the rated sentences, scored once by a BERT in plain NumPy."""
    assert main(["--methods=full precision", f"--out={tmp_path}"]) == 0
    (file,) = tmp_path.glob("*.jsonl")
    assert file.stem == "table3_glue"
    records = read_jsonl(file)
    values = {(r["task"], r["metric"]): r["value"] for r in records}
    assert values == pytest.approx({
        ("sentiment-amazon", "accuracy"): 85.10,
        ("sentiment-amazon", "pearson"): 80.22,
        ("sentiment-nyt", "accuracy"): 82.80,
        ("sentiment-nyt", "pearson"): 73.48,
    }, abs=0.01)  # fmt: skip
    assert {(r["bits"], r["published"], r["data_source"]) for r in records} == {
        (16, None, "embedded")
    }
    printed = capsys.readouterr().out
    assert "Left out: CoLA, SST-2, RTE, STS-B, MRPC, whose files are not at" in printed
    sizes = "Amazon reviews 1,000; NYT editorials 1,000; at most 128 tokens"
    assert sizes in printed
