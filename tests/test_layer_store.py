"""Finished layers on disk: read back bit for bit, never mistaken for one another."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import quantized_layers
from experiments.common.methods import METHODS
from experiments.common.quantized_layers import LayerStore
from kashin_jax import RTN, BasisSpec, Uniform
from kashin_jax.errors import CheckpointError, NonFiniteError
from kashin_jax.pipeline import path_key

ENVIRONMENT = {"jax_version": "1", "device": "cpu"}
KEY = jax.random.key(3)
CONFIG = Uniform(bits=4)


def kernel(rows=64, columns=64):
    return 0.1 * jax.random.normal(jax.random.key(1), (rows, columns))


@pytest.fixture
def store(tmp_path):
    return LayerStore(tmp_path, ENVIRONMENT)


@pytest.fixture
def computed(monkeypatch):
    """Paths of the layers that were quantized, not read."""
    paths = []
    original = quantized_layers.quantize

    def counting(kernel, config, key, *, path):
        paths.append(path)
        return original(kernel, config, key, path=path)

    monkeypatch.setattr(quantized_layers, "quantize", counting)
    return paths


def assert_equal(found, expected):
    leaves, structure = jax.tree.flatten(expected)
    found_leaves, found_structure = jax.tree.flatten(found)
    assert found_structure == structure
    for a, b in zip(found_leaves, leaves, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_is_read_back_bit_for_bit(store, computed, name):
    with jax.default_matmul_precision("highest"):
        config = METHODS[name].make(4, BasisSpec.parse("hadamard"), 1e-6, 200)
        first = store.quantize("a", kernel(), config, KEY)
        second = store.quantize("a", kernel(), config, KEY)
    assert computed == ["a"]
    assert_equal(second[:2], first[:2])
    assert second.seconds == first.seconds > 0
    assert second.tensor.layout == first.tensor.layout
    assert jnp.array_equal(second.tensor.decode(), first.tensor.decode())


def test_nothing_but_the_finished_file_is_left(store, tmp_path):
    store.quantize("a", kernel(), CONFIG, KEY)
    (file,) = tmp_path.iterdir()
    assert file.suffix == ".safetensors"
    assert not file.name.startswith(".")


@pytest.mark.parametrize(
    "change",
    [
        {"kernel": kernel().at[3, 5].add(1e-7)},
        {"kernel": -kernel()},
        {"kernel": kernel().reshape(32, 128)},
        {"kernel": kernel().astype(jnp.bfloat16)},
        {"config": Uniform(bits=3)},
        {"config": RTN(bits=4)},
        {"key": jax.random.key(4)},
        {"key": path_key(KEY, "b")},
    ],
    ids=str,
)
def test_layers_that_differ_in_anything_are_kept_apart(store, computed, change):
    same = {"kernel": kernel(), "config": CONFIG, "key": KEY}
    store.quantize("a", **same)
    store.quantize("a", **(same | change))
    assert len(computed) == 2


def test_kernels_of_equal_bytes_and_other_shapes_are_kept_apart(store, computed):
    for shape in [(64, 64), (32, 128), (128, 32)]:
        layer = store.quantize("a", jnp.zeros(shape), CONFIG, KEY)
        assert layer.tensor.shape == shape
    assert len(computed) == 3


def test_other_versions_and_devices_do_not_read_each_others_layers(store, computed):
    store.quantize("a", kernel(), CONFIG, KEY)
    other = dataclasses.replace(store, environment=ENVIRONMENT | {"device": "gpu"})
    other.quantize("a", kernel(), CONFIG, KEY)
    assert len(computed) == 2


def test_every_method_and_basis_has_a_file_of_its_own(store, tmp_path):
    configs = {
        method.make(4, BasisSpec.parse(basis), 1e-6, 200)
        for method in METHODS.values()
        for basis in ("hadamard", "hadamard:identity")
    }
    digests = {store._digest(kernel(), config, KEY) for config in configs}
    # Twelve methods. Two rows of the paper's method are one computation, and that,
    # joint coding and the two rotations have one for each basis: 7 + 4 * 2.
    assert len(digests) == len(configs) == 15


@pytest.mark.parametrize("size", [0, 7, 40, 200, -1])
def test_a_truncated_file_is_computed_again(store, computed, tmp_path, size):
    expected = store.quantize("a", kernel(), CONFIG, KEY)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:size])
    assert_equal(store.quantize("a", kernel(), CONFIG, KEY)[:2], expected[:2])
    assert_equal(store.quantize("a", kernel(), CONFIG, KEY)[:2], expected[:2])
    assert len(computed) == 2
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("content", ["no tensors", "no seconds", "a shape", "a type"])
def test_a_file_that_does_not_fit_is_computed_again(store, computed, tmp_path, content):
    import safetensors.numpy

    expected = store.quantize("a", kernel(), CONFIG, KEY)
    (file,) = tmp_path.iterdir()
    tensors = dict(safetensors.numpy.load_file(file))
    metadata = {"path": "a", "seconds": "1.0"}
    if content == "no tensors":
        tensors = {}
    elif content == "no seconds":
        metadata = {}
    elif content == "a shape":
        tensors["0"] = tensors["0"][:-1]
    else:
        tensors["1"] = tensors["1"].astype(np.float64)
    safetensors.numpy.save_file(tensors, file, metadata)
    assert_equal(store.quantize("a", kernel(), CONFIG, KEY)[:2], expected[:2])
    assert len(computed) == 2


def test_a_layer_that_fails_leaves_no_file(store, tmp_path):
    with pytest.raises(NonFiniteError, match="`decoder/fc1`"):
        store.quantize("decoder/fc1", kernel().at[0, 0].set(jnp.nan), CONFIG, KEY)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_file(store, tmp_path, monkeypatch):
    def fail(tensors, path, metadata):
        pathlib.Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        store.quantize("a", kernel(), CONFIG, KEY)
    assert list(tmp_path.iterdir()) == []
