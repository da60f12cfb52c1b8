"""Back to the original layout, and shards of any size."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx
from quantized_sources import RTN_RULES, content, edit_json, make_source, method

from kashin_jax import Rule, Rules, dequantize
from kashin_jax.errors import UsageError
from kashin_jax.io import open_checkpoint
from kashin_jax.models.loading import load_opt
from kashin_jax.pipeline import (
    dequantize_checkpoint,
    inspect_checkpoint,
    load_quantized,
    quantize_checkpoint,
)

INDEX = "model.safetensors.index.json"
SIZES = [
    1, 20_000, 10**9, *(pytest.param(s, marks=pytest.mark.slow) for s in (5000, 50_000))
]  # fmt: skip


@nnx.jit
def logits(model, tokens):
    return model(tokens)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("checkpoints") / "source")


@pytest.fixture(scope="module")
def quantized(source):
    rules = Rules(config=method("rtn"), rules=[Rule("fc1", method("nf4"))])
    return quantize_checkpoint(source, source.parent / "quantized", rules).directory


@pytest.fixture(scope="module")
def undone(quantized):
    return dequantize_checkpoint(quantized, quantized.parent / "undone")


def test_what_comes_back_has_the_names_shapes_and_types_of_the_source(source, undone):
    before, after = open_checkpoint(source), open_checkpoint(undone)
    assert sorted(after.names()) == sorted(before.names())
    for name in before.names():
        assert after.spec(name) == before.spec(name)
    assert after.descriptions == {}
    files = {"config.json", "tokenizer.json", "model.safetensors", INDEX}
    assert content(undone).keys() == files


def test_what_comes_back_is_what_the_packed_tensors_decode_to(
    source, quantized, undone
):
    packed = open_checkpoint(quantized)
    with safetensors.safe_open(undone / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        found = {name: file.get_tensor(name) for name in file.keys()}
    for name, value in found.items():
        tensor = packed.load(name)
        if not packed.is_packed(name):
            expected = tensor
        else:
            expected = np.asarray(dequantize(tensor)).T
            original = open_checkpoint(source).load(name)
            lost = np.square(original.astype(np.float32) - value.astype(np.float32))
            assert 0 < lost.sum() < 0.02 * np.square(original.astype(np.float32)).sum()
        assert value.dtype == np.float16
        np.testing.assert_array_equal(value, expected)
    assert len(packed.descriptions) == 12


def test_the_configuration_comes_back_too(source, quantized, undone):
    def read(directory):
        return json.loads((directory / "config.json").read_text())

    assert read(undone) == read(source)
    assert read(quantized).keys() - read(source).keys() == {"quantization_config"}


def test_what_comes_back_loads_as_any_opt(quantized, undone):
    dense = load_opt(undone)
    assert dense.stored_dtype == "float16"
    tokens = jnp.arange(30)[None]
    expected = logits(load_quantized(quantized).model, tokens)
    found = logits(dense.model, tokens)
    # The decoded weights were rounded to half precision once more.
    scale = np.abs(np.asarray(expected)).max()
    assert np.abs(np.asarray(found - expected)).max() < 0.02 * scale


def test_a_checkpoint_without_packed_tensors_is_refused(source, tmp_path):
    with pytest.raises(UsageError, match="no packed tensors"):
        dequantize_checkpoint(source, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def whole(source):
    return quantize_checkpoint(source, source.parent / "whole", RTN_RULES)


def lines(result):
    return {name: report.to_json() for name, report in result.reports.items()}


@pytest.mark.parametrize("size", SIZES)
def test_shards_of_any_size_hold_the_same_tensors(source, whole, tmp_path, size):
    result = quantize_checkpoint(
        source, tmp_path / "cut", RTN_RULES, max_shard_bytes=size
    )
    assert lines(result) == lines(whole)
    expected, found = (
        open_checkpoint(whole.directory),
        open_checkpoint(tmp_path / "cut"),
    )
    assert (len(found.files) > 1) == (size < 10**9)
    assert found.names() == expected.names()
    assert found.verify() == []
    stored = {}
    for shard in found.files:
        stored |= safetensors.numpy.load_file(tmp_path / "cut" / shard)
    reference = safetensors.numpy.load_file(whole.directory / "model.safetensors")
    assert stored.keys() == reference.keys()
    for name, value in reference.items():
        np.testing.assert_array_equal(stored[name], value)
    index = json.loads((tmp_path / "cut" / INDEX).read_text())
    assert index["weight_map"].keys() == reference.keys()
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in reference.values())


@pytest.mark.parametrize("size", [1, 20_000])
def test_no_tensor_straddles_two_shards(source, tmp_path, size):
    quantize_checkpoint(source, tmp_path / "q", RTN_RULES, max_shard_bytes=size)
    checkpoint = open_checkpoint(tmp_path / "q")
    for name in checkpoint.descriptions:
        leaves = [f"{name}.{leaf}" for leaf in checkpoint.described(name).specs]
        assert len(leaves) > 1
        assert set(leaves) <= checkpoint.file_of(name).specs.keys()
    for shard, file in checkpoint.files.items():
        data = sum(spec.size for spec in file.specs.values())
        alone = sum(place == shard for place in checkpoint.places.values()) == 1
        assert data <= size or alone


def test_shards_of_the_source_do_not_matter(source, whole, tmp_path):
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "config.json").write_bytes((source / "config.json").read_bytes())
    names = open_checkpoint(source).names()
    halves = {"model-1.safetensors": names[:15], "model-2.safetensors": names[15:]}
    for file, half in halves.items():
        safetensors.numpy.save_file({n: tensors[n] for n in half}, cut / file)
    weight_map = {name: file for file, half in halves.items() for name in half}
    (cut / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    quantize_checkpoint(cut, tmp_path / "q", RTN_RULES)
    found, expected = (
        safetensors.numpy.load_file(directory / "model.safetensors")
        for directory in (tmp_path / "q", whole.directory)
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_dequantized_shards_hold_the_same_tensors(quantized, undone, tmp_path):
    dequantize_checkpoint(quantized, tmp_path / "cut", max_shard_bytes=30_000)
    found, expected = open_checkpoint(tmp_path / "cut"), open_checkpoint(undone)
    assert len(found.files) > 3
    assert sorted(found.names()) == sorted(expected.names())
    for name in expected.names():
        np.testing.assert_array_equal(found.load(name), expected.load(name))


def test_a_model_with_shards_and_one_without_load_alike(source, quantized, tmp_path):
    rules = Rules(config=method("rtn"), rules=[Rule("fc1", method("nf4"))])
    quantize_checkpoint(source, tmp_path / "cut", rules, max_shard_bytes=9_000)
    tokens = jnp.arange(30)[None]
    np.testing.assert_array_equal(
        logits(load_quantized(tmp_path / "cut").model, tokens),
        logits(load_quantized(quantized).model, tokens),
    )


def test_a_checkpoint_without_a_known_architecture_is_quantized_too(source, tmp_path):
    copied = tmp_path / "copied"
    copied.mkdir()
    for name in ("config.json", "model.safetensors"):
        (copied / name).write_bytes((source / name).read_bytes())
    edit_json(copied / "config.json", lambda c: c.update(model_type="mamba"))
    quantize_checkpoint(copied, tmp_path / "q", RTN_RULES)
    found = inspect_checkpoint(tmp_path / "q")
    assert sum(row.form == "affine" for row in found.tensors) == 12
