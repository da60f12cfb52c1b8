"""What rows of all tables need: layers quantized once, their size, what they lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.common.checkpoints import checkpoint_sha256
from experiments.common.quantized_layers import (
    LayerStore,
    decoded_kernels,
    loss_fields,
    quantize_layers,
    size_fields,
    stored_width,
    unconverged,
)
from kashin_jax import BasisSpec, GreedyKashin, Uniform, quantize
from kashin_jax.pipeline import path_key

KEY = jax.random.key(5)
# One step is far too little for a Gaussian matrix, and enough for one of equal signs.
KASHIN = GreedyKashin(bits=4, basis=BasisSpec.parse("identity"), max_steps=2)
UNIFORM = Uniform(bits=4)


@pytest.fixture(scope="module")
def kernels():
    return {
        "a/easy": jnp.full((32, 32), 0.5),
        "b/hard": jax.random.normal(jax.random.key(0), (32, 64)),
    }


def layers_of(kernels, config, directory):
    with jax.default_matmul_precision("highest"):
        return quantize_layers(LayerStore(directory, {}), kernels, config, KEY, "test")


@pytest.fixture
def kashin(kernels, tmp_path):
    return layers_of(kernels, KASHIN, tmp_path)


def test_each_layer_has_a_key_of_its_path(kernels, kashin):
    assert list(kashin) == list(kernels)
    for path, kernel in kernels.items():
        with jax.default_matmul_precision("highest"):
            tensor, _ = quantize(kernel, KASHIN, path_key(KEY, path))
        found = decoded_kernels(kashin)[path]
        assert jnp.array_equal(found, tensor.decode())


def test_layers_that_missed_the_tolerance_are_told(kashin, kernels, tmp_path):
    assert unconverged(kashin) == {"b/hard"}
    assert unconverged(layers_of(kernels, UNIFORM, tmp_path)) == frozenset()


def test_losses_are_means_over_layers(kashin, kernels):
    def lost(path):
        kernel, found = (
            np.asarray(value, np.float64)
            for value in (kernels[path], decoded_kernels(kashin)[path])
        )
        return np.square(kernel - found).sum() / np.square(kernel).sum()

    fields = loss_fields(KASHIN, kashin)
    expected = (lost("a/easy") + lost("b/hard")) / 2
    assert fields["relative_error"] == pytest.approx(expected, rel=1e-4)
    assert fields["converged_share"] == 0.5
    assert fields["quantize_seconds"] == sum(one.seconds for one in kashin.values())


def test_layers_that_stay_lose_nothing_and_take_what_they_took(kashin):
    model = nnx.Linear(32, 96, rngs=nnx.Rngs(0))
    kept = frozenset({"b/hard"})
    fields = loss_fields(KASHIN, kashin, kept)
    easy = float(kashin["a/easy"].report.relative_squared_error)
    assert fields["relative_error"] == easy / 2
    # 4 bits each, sixteen pairs of float32, a scale and a seed; 2048 kept at 16 bits.
    bits = 4 * 1024 + 16 * 64 + 32 + 64 + 16 * 2048
    sizes = size_fields(model, 16, kashin, kept)
    assert sizes["stored_bits_per_weight"] == bits / 3072
    assert sizes["model_bits_per_weight"] == (bits + 16 * 96) / (3072 + 96)


def test_methods_that_cannot_fail_to_converge_have_no_such_share(kernels, tmp_path):
    fields = loss_fields(UNIFORM, layers_of(kernels, UNIFORM, tmp_path))
    assert fields["converged_share"] is None


@pytest.mark.parametrize(
    ("dtype", "width"), [("float32", 32), ("float16", 16), ("bfloat16", 16)]
)
def test_the_width_of_a_parameter_is_that_of_its_type(dtype, width):
    assert stored_width(dtype) == width


def test_the_hash_of_a_checkpoint_is_that_of_names_and_contents(tmp_path):
    hashes = set()

    def write(name, content):
        (tmp_path / name).write_bytes(content)
        hashes.add(checkpoint_sha256(tmp_path))

    write("config.json", b"{}")
    write("model.safetensors", b"12")
    write("model.safetensors", b"13")
    write("vocab.txt", b"13")
    write("heads.safetensors", b"")
    assert len(hashes) == 5
    write("README.md", b"a page")
    assert len(hashes) == 5
    (tmp_path / "vocab.txt").rename(tmp_path / "merges.txt")
    assert checkpoint_sha256(tmp_path) not in hashes
