"""Refinement: codes stay, what decodes them learns, and the bits stay the same."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_finetuning import config_of, write_model, write_tasks

from experiments import refine_glue
from experiments.classification.quantized import load_classifier_packed
from experiments.common.results import read_jsonl
from experiments.finetuning.model import load_start
from experiments.finetuning.run import finetune
from experiments.glue import main as glue
from experiments.refine_glue import main
from kashin_jax import stored_bits
from kashin_jax.errors import UsageError
from kashin_jax.models import load_classifier
from kashin_jax.pipeline import packed_tensors
from kashin_jax.pipeline.refinable import take_apart

pytestmark = pytest.mark.slow

METHODS = ["kashin", "uniform", "rtn-g128", "rotate-k-means"]
FLOATS = {"centroids", "levels", "scale", "zero"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    """A classifier that has learnt the task."""
    directory = tmp_path_factory.mktemp("trained")
    model = write_model(directory / "model")
    config = config_of(
        model=str(model), data_dir=str(data), out=str(directory / "run"), epochs=8.0
    )
    assert finetune(config).metrics["accuracy"] > 90
    return directory / "run" / "hf"


@pytest.fixture(scope="module")
def saved(tmp_path_factory, trained, data):
    """The same, quantized to two bits by several methods."""
    directory = tmp_path_factory.mktemp("saved")
    assert glue([
        f"--model={trained}", f"--data_dir={data}", "--bits=2", "--max_length=24",
        f"--methods={','.join(METHODS)}", f"--save={directory}",
        f"--out={directory / 'out'}",
    ]) == 0  # fmt: skip
    return {
        name: found
        for name in METHODS
        for found in directory.glob(f"sst2-{name}-2bit*")
    }


def refine(quantized, data, out, **changes):
    flags = {"quantized": str(quantized), "data_dir": str(data), "out": str(out)}
    return config_of(**flags | {"learning_rate": 1e-2} | changes)


@pytest.fixture(scope="module")
def refined(tmp_path_factory, saved, data):
    out = tmp_path_factory.mktemp("refined")
    finetune(refine(saved["kashin"], data, out))
    return out


def leaves(tensor):
    names = [field.name for field in dataclasses.fields(tensor)]
    return {name: getattr(tensor, name) for name in names if name != "layout"}


@pytest.mark.parametrize("method", METHODS)
def test_taking_a_model_apart_and_putting_it_together_changes_nothing(saved, method):
    found = load_classifier_packed(saved[method])
    again = packed_tensors(take_apart(found.loaded.model).model())
    for path, tensor in found.tensors.items():
        for name, value in leaves(tensor).items():
            if value is None:
                assert leaves(again[path])[name] is None
                continue
            assert leaves(again[path])[name].dtype == value.dtype
            rtol = 1e-3 if value.dtype == jnp.float16 else 1e-6
            np.testing.assert_allclose(leaves(again[path])[name], value, rtol=rtol)


@pytest.mark.parametrize("method", METHODS)
def test_only_what_decodes_and_vectors_are_trained(saved, method):
    found = load_classifier_packed(saved[method])
    names = set(take_apart(found.loaded.model).names)
    packed = {
        f"{path}/kernel/value/{k}"
        for path, tensor in found.tensors.items()
        for k, v in leaves(tensor).items()
        if k in FLOATS and v is not None and jnp.issubdtype(v.dtype, jnp.floating)
    }
    assert packed and packed < names
    vectors = names - packed
    assert all(name.endswith(("bias/value", "scale/value")) for name in vectors)
    assert "classifier/out_proj/bias/value" in vectors
    assert "classifier/out_proj/kernel/value" not in names


def test_the_gradient_of_a_centroid_is_that_of_finite_differences(saved, data):
    start = load_start(refine(saved["kashin"], data, "o", dropout=0.0))
    ids = jnp.arange(4, 14, dtype=jnp.int32).reshape(2, 5)

    def loss(params):
        return jnp.sum(start.evaluation(params, start.frozen)(ids)[:, 0])

    grads = jax.grad(loss)(start.params)
    names = take_apart(load_classifier_packed(saved["kashin"]).loaded.model).names

    def moved(leaf, index, step):
        changed = [*start.params]
        changed[leaf] = changed[leaf].at[index].add(step)
        return loss(changed)

    decoding = [i for i, name in enumerate(names) if "kernel" in name][:2]
    assert [names[i].rsplit("/", 1)[1] for i in decoding] == ["centroids", "scale"]
    for leaf in decoding:
        index = (0,) * start.params[leaf].ndim
        slope = (moved(leaf, index, 1e-2) - moved(leaf, index, -1e-2)) / 2e-2
        np.testing.assert_allclose(grads[leaf][index], slope, rtol=0.05, atol=1e-3)


def test_codes_seeds_and_sizes_stay_and_centroids_move(saved, refined):
    before = load_classifier_packed(saved["kashin"]).tensors
    after = load_classifier_packed(refined / "quantized").tensors
    assert before.keys() == after.keys()
    for path in before:
        assert before[path].layout == after[path].layout
        assert stored_bits(before[path]) == stored_bits(after[path])
        for name in ("packed_codes", "seed"):
            np.testing.assert_array_equal(
                leaves(before[path])[name], leaves(after[path])[name]
            )
        assert not np.array_equal(before[path].centroids, after[path].centroids)


def test_embeddings_and_the_heads_matrix_stay(saved, refined):
    before = load_classifier_packed(saved["kashin"]).loaded.model
    after = load_classifier_packed(refined / "quantized").loaded.model
    for part in (
        lambda m: m.encoder.embeddings.word_embeddings.embedding,
        lambda m: m.classifier.out_proj.kernel,
    ):
        np.testing.assert_array_equal(part(before)[...], part(after)[...])


def test_the_export_is_what_the_packed_classifier_decodes_to(refined):
    found = load_classifier_packed(refined / "quantized")
    dense = load_classifier(refined / "hf").model
    kernel = found.tensors["encoder/layers/0/query"].decode()
    np.testing.assert_allclose(
        dense.encoder.layers[0].query.kernel[...], kernel, rtol=0, atol=1e-6
    )


def test_the_log_says_what_was_refined_and_from_where(refined):
    content = json.loads((refined / "metrics.json").read_text())
    assert content["quantized"]["method"] == "kashin"
    assert content["before"].keys() == content["metrics"].keys() == {"accuracy"}
    losses = [r["loss"] for r in read_jsonl(refined / "log.jsonl") if "loss" in r]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


def test_a_quantized_classifier_comes_with_its_head():
    with pytest.raises(UsageError, match="`--quantized` comes with its head"):
        config_of(quantized="q", head="stored")


def test_a_dense_checkpoint_is_not_refined(trained, data, tmp_path, capsys):
    from experiments.finetune_glue import main as finetune_main

    arguments = [f"--quantized={trained}", f"--data_dir={data}", "--task=sst2"]
    assert finetune_main([*arguments, f"--out={tmp_path / 'o'}"]) == 1
    assert "is not quantized; name a directory of" in capsys.readouterr().err


def test_a_quantized_model_is_refused_by_what_quantizes_it(
    saved, data, tmp_path, capsys
):
    from experiments.finetune_glue import main as finetune_main

    flags = [f"--model={saved['kashin']}", f"--data_dir={data}", "--task=sst2"]
    for program in (main, finetune_main):
        assert program([*flags, f"--out={tmp_path / 'o'}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "is quantized already; name the original checkpoint" in line
        assert "--quantized=` " in line


def job(trained, data, out, *more):
    return main([
        "--task=sst2", "--bits=1,2", "--methods=kashin,nf4-g64", f"--model={trained}",
        f"--data_dir={data}", "--max_length=24", "--epochs=2", "--batch_size=16",
        "--learning_rate=0.01", f"--out={out}", *more,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def table(tmp_path_factory, trained, data):
    out = tmp_path_factory.mktemp("table")
    assert job(trained, data, out) == 0
    return out


def test_a_table_has_before_and_after_of_every_row_that_exists(table):
    (path,) = table.glob("*.jsonl")
    full, *rows = read_jsonl(path)
    assert full["method"] == "full precision"
    # NF4 exists at four bits only.
    assert [(r["method"], r["bits"]) for r in rows] == [("kashin", 1), ("kashin", 2)]
    for row in rows:
        assert math.isfinite(row["before_accuracy"])
        assert row["after_accuracy"] >= row["before_accuracy"]
        assert row["stored_bits_per_weight"] > row["bits"]
    assert {p.suffix for p in table.iterdir()} == {".jsonl", ".md", ".png"}
    assert "| kashin [" in next(table.glob("*.md")).read_text()


def test_an_interrupted_table_goes_on_with_the_same_numbers(
    table, trained, data, tmp_path, monkeypatch, capsys
):
    calls = []

    def once(config):
        calls.append(config.out)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return finetune(config)

    monkeypatch.setattr(refine_glue, "finetune", once)
    assert job(trained, data, tmp_path) == 130
    assert [p.name for p in tmp_path.iterdir()] == ["work"]
    assert job(trained, data, tmp_path) == 0
    (ours,), (theirs,) = tmp_path.glob("*.jsonl"), table.glob("*.jsonl")
    assert read_jsonl(ours) == read_jsonl(theirs)


@pytest.mark.parametrize(
    "flag", ["--task=mnlii", "--bits=9", "--methods=magic", "--basis=magic"]
)
def test_bad_flags_end_early_in_one_line(flag, tmp_path, capsys):
    arguments = [f"--out={tmp_path / 'o'}"]
    if not flag.startswith("--task"):
        arguments.append("--task=sst2")
    assert main([*arguments, flag]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "o").exists()
