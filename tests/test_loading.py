"""Checkpoints: every layout loads to the same model, and wrong tensors are named."""

import json
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx, serialization, traverse_util
from opt_checkpoints import (
    EMBEDDING,
    FC1,
    GOLDEN,
    assert_same,
    directory,
    flax_tree,
    message,
    parameters,
    tensors,
    write,
    write_shards,
)

from kashin_jax.errors import NonFiniteError, UsageError
from kashin_jax.models import architecture
from kashin_jax.models.loading import load_opt

__all__ = ["directory", "tensors"]  # fixtures


@pytest.fixture(scope="module")
def expected():
    return parameters(load_opt(str(GOLDEN / "prenorm")).model)


def test_weights_as_pytorch_names_them_load_like_those_of_flax(
    directory, tensors, expected
):
    write(directory, tensors)
    loaded = load_opt(str(directory))
    assert_same(parameters(loaded.model), expected)
    assert loaded.stored_dtype == "float32"
    assert loaded.directory == directory
    assert loaded.config == loaded.model.config
    assert loaded.config.hidden_size == 32


def test_the_leading_model_may_be_absent_and_a_tied_head_present(
    directory, tensors, expected
):
    bare = {name.removeprefix("model."): value for name, value in tensors.items()}
    extra = {"lm_head.weight": tensors[EMBEDDING], "decoder.version": np.ones(1)}
    write(directory, bare | extra)
    assert_same(parameters(load_opt(str(directory)).model), expected)


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_half_precision_is_widened_without_loss(directory, tensors, stored):
    dtype = np.dtype(getattr(ml_dtypes, stored, stored))
    half = {name: value.astype(dtype) for name, value in tensors.items()}
    write(directory, half)
    loaded = load_opt(str(directory))
    assert loaded.stored_dtype == stored
    found = parameters(loaded.model)
    np.testing.assert_array_equal(
        found["decoder", "layers", 1, "fc1", "kernel"], half[FC1].T.astype(np.float32)
    )
    assert {value.dtype.name for value in found.values()} == {"float32"}
    kept = parameters(load_opt(str(directory), dtype=stored).model)
    assert {value.dtype for value in kept.values()} == {dtype}


def test_shards_load_like_one_file(directory, tensors, expected):
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    write_shards(directory, tensors, names)
    assert_same(parameters(load_opt(str(directory)).model), expected)


def test_flax_shards_load_like_one_file(directory, expected):
    flat = traverse_util.flatten_dict(flax_tree(), sep="/")
    weight_map = {}
    for i in (0, 1):
        name = f"flax_model-0000{i + 1}-of-00002.msgpack"
        part = dict(list(flat.items())[i::2])
        content = traverse_util.unflatten_dict(part, sep="/")
        (directory / name).write_bytes(serialization.msgpack_serialize(content))
        weight_map |= dict.fromkeys(part, name)
    # What the index leaves out is in the file that it names for others.
    weight_map.popitem()
    index = directory / "flax_model.msgpack.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_same(parameters(load_opt(str(directory)).model), expected)


def test_safetensors_go_before_msgpack_and_msgpack_before_torch(directory, tensors):
    (directory / "pytorch_model.bin").write_bytes(b"not read")
    shutil.copy(GOLDEN / "prenorm" / "flax_model.msgpack", directory)
    before = parameters(load_opt(str(directory)).model)
    doubled = {name: 2 * value for name, value in tensors.items()}
    write(directory, doubled)
    after = parameters(load_opt(str(directory)).model)
    assert_same(after, {path: 2 * value for path, value in before.items()})


class FakeTensor:
    """What the reader uses of a torch tensor; bfloat16 has no NumPy form there."""

    def __init__(self, value):
        self.value = value
        self.dtype = value.dtype.name

    def view(self, dtype):
        return FakeTensor(self.value.view(dtype))

    def numpy(self):
        assert self.dtype != "bfloat16"
        return self.value


def test_torch_files_are_read_without_running_what_they_contain(
    directory, tensors, expected, monkeypatch
):
    half = {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}
    calls = []

    def load(path, *, map_location, weights_only):
        calls.append((path, map_location, weights_only))
        return {name: FakeTensor(value) for name, value in half.items()}

    torch = types.SimpleNamespace(load=load, bfloat16="bfloat16", int16="int16")
    monkeypatch.setitem(sys.modules, "torch", torch)
    (directory / "pytorch_model.bin").write_bytes(b"")
    loaded = load_opt(str(directory))
    assert calls == [(directory / "pytorch_model.bin", "cpu", True)]
    assert loaded.stored_dtype == "bfloat16"
    write(directory, half)
    assert_same(parameters(loaded.model), parameters(load_opt(str(directory)).model))


def test_without_torch_a_torch_file_says_what_to_install(directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (directory / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin: reading it needs PyTorch; `pip install torch`" in (
        message(directory)
    )


def test_loading_draws_no_random_weights(directory, tensors, monkeypatch):
    write(directory, tensors)
    # What an earlier test has loaded is known already.
    architecture._abstract_state.cache_clear()
    draw, calls = nnx.initializers.normal(0.1), []

    def draw_abstractly(*args):
        value = draw(*args)
        if not calls:  # one is enough; the error is slow to word itself
            with pytest.raises(jax.errors.TracerArrayConversionError):
                np.asarray(value)
        calls.append(value.shape)
        return value

    monkeypatch.setattr(nnx.initializers, "normal", lambda stddev: draw_abstractly)
    load_opt(str(directory))
    assert calls


def test_missing_tensors_are_counted_and_the_first_named(directory, tensors):
    write(directory, {k: v for k, v in tensors.items() if ".1.fc1." not in k})
    text = message(directory)
    assert "2 tensors are missing" in text
    assert "`model.decoder.layers.1.fc1.bias`" in text


@pytest.mark.parametrize(
    "name", ["model.decoder.layers.2.fc1.weight", "bert.pooler.weight", FC1 + "_scale"]
)
def test_a_tensor_too_many_is_named(directory, tensors, name):
    write(directory, tensors | {name: np.zeros((2, 2), np.float32)})
    assert f"model.safetensors: `{name}` is not part of the model" in (
        message(directory)
    )


@pytest.mark.parametrize("name", [FC1, EMBEDDING, "model.decoder.layers.0.fc2.bias"])
def test_a_tensor_of_another_shape_is_named_with_both_shapes(directory, tensors, name):
    wrong = np.zeros((7, *tensors[name].shape[1:]), np.float32)
    write(directory, tensors | {name: wrong})
    text = message(directory)
    assert f"`{name}` has shape {wrong.shape}" in text
    assert f"asks for {tensors[name].shape}" in text


@pytest.mark.parametrize("head", ["shape", "values"])
def test_a_tied_head_that_is_another_matrix_is_refused(directory, tensors, head):
    embedding = tensors[EMBEDDING]
    other = embedding[1:] if head == "shape" else embedding + 1
    write(directory, tensors | {"lm_head.weight": np.ascontiguousarray(other)})
    assert "`lm_head.weight`" in message(directory)


def test_a_tensor_under_two_names_is_refused(directory, tensors):
    twice = {FC1.removeprefix("model."): tensors[FC1]}
    write(directory, tensors | twice)
    assert f"{FC1}` is stored twice" in message(directory).replace(
        "`decoder", "`model.decoder"
    )


def test_integer_weights_are_refused(directory, tensors):
    write(directory, tensors | {FC1: tensors[FC1].astype(np.int8)})
    assert f"`{FC1}` is stored as int8" in message(directory)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named(directory, tensors, bad):
    value = tensors[FC1].copy()
    value[3, 5] = bad
    write(directory, tensors | {FC1: value})
    assert f"`{FC1}` has NaN or infinite values" in message(directory, NonFiniteError)


def test_a_weight_too_large_for_the_dtype_is_named(directory, tensors):
    write(directory, tensors | {FC1: tensors[FC1] + 1e6})
    load_opt(str(directory), dtype=jnp.bfloat16)
    with pytest.raises(NonFiniteError, match=f"`{FC1}` overflows float16"):
        load_opt(str(directory), dtype="float16")
    with pytest.raises(UsageError, match="`dtype` must be one of .* Got int8"):
        load_opt(str(directory), dtype=jnp.int8)


def test_a_checkpoint_of_another_architecture_is_refused(directory, tensors):
    write(directory, tensors)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    assert "config.json: `model_type` is 'gpt2'" in message(directory)
