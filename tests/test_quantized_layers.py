"""What rows of all tables need: layers quantized once, their size, what they lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from interruptions import quantize as quantize_calls
from tiny_checkpoint import tiny

from experiments.common.checkpoints import checkpoint_sha256
from experiments.common.quantized_layers import (
    QuantizedLayer,
    decoded_kernels,
    loss_fields,
    quantized_copy,
    remove_copies,
    size_fields,
    stored_width,
    unconverged,
)
from kashin_jax import BasisSpec, GreedyKashin, Rules, Uniform, quantize
from kashin_jax.models.loading import load_opt
from kashin_jax.pipeline import path_key, replace_kernels, selected_kernels
from kashin_jax.pipeline.run import reported

__all__ = ["quantize_calls", "tiny"]  # fixtures

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


def layers_of(kernels, config):
    def coded(path):
        key = path_key(KEY, path)
        return reported(path, config, lambda: quantize(kernels[path], config, key))

    return {path: QuantizedLayer(*coded(path)) for path in kernels}


@pytest.fixture(scope="module")
def kashin(kernels):
    return layers_of(kernels, KASHIN)


def copied(directory, work, config=UNIFORM, seed=3, sha256="a hash"):
    rules = Rules(config=config)
    return quantized_copy(load_opt(directory), rules, seed, work, sha256)


@pytest.mark.parametrize(
    "config",
    [pytest.param(KASHIN, marks=pytest.mark.slow), UNIFORM],
    ids=["kashin", "uniform"],
)
def test_a_copy_has_the_codes_of_each_matrix_alone(tiny, tmp_path, config):
    model, layers = copied(tiny, tmp_path, config)
    dense = load_opt(tiny).model
    kernels = selected_kernels(dense)
    assert list(layers) == list(kernels)
    for path, kernel in kernels.items():
        key = path_key(jax.random.key(3), path)
        tensor, report = quantize(kernel, config, key)
        assert layers[path].tensor.layout == tensor.layout
        for ours, alone in zip(
            jax.tree.leaves(layers[path].tensor), jax.tree.leaves(tensor), strict=True
        ):
            assert ours.dtype == alone.dtype and jnp.array_equal(ours, alone)
        error = layers[path].report.relative_squared_error
        assert error == float(report.relative_squared_error)
    tokens = jnp.arange(12)[None]
    decoded = replace_kernels(dense, decoded_kernels(layers))
    np.testing.assert_allclose(model(tokens), decoded(tokens), rtol=1e-3, atol=1e-4)


def test_a_copy_is_made_once_for_all_that_it_depends_on(tiny, tmp_path, quantize_calls):
    first = copied(tiny, tmp_path).layers
    assert quantize_calls.count == len(first)
    again = copied(tiny, tmp_path).layers
    assert quantize_calls.count == len(first)
    for path, layer in first.items():
        assert again[path].report.seconds == layer.report.seconds > 0
    others = ({"seed": 4}, {"sha256": "another"}, {"config": Uniform(bits=3)})
    for number, other in enumerate(others, 2):
        copied(tiny, tmp_path, **other)
        assert quantize_calls.count == number * len(first)
    assert len(list(tmp_path.iterdir())) == 1 + len(others)
    remove_copies(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 7, 40, -1])
def test_a_damaged_copy_is_made_again(tiny, tmp_path, quantize_calls, size):
    first = copied(tiny, tmp_path).layers
    file = sorted(tmp_path.rglob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:size])
    for _ in range(2):
        again = copied(tiny, tmp_path).layers
        assert quantize_calls.count == 2 * len(first)
        for path, layer in first.items():
            pairs = zip(*map(jax.tree.leaves, (layer.tensor, again[path].tensor)),
                        strict=True)  # fmt: skip
            assert all(jnp.array_equal(a, b) for a, b in pairs)


def test_layers_that_missed_the_tolerance_are_told(kashin, kernels):
    assert unconverged(kashin) == {"b/hard"}
    assert unconverged(layers_of(kernels, UNIFORM)) == frozenset()


def test_losses_are_means_over_layers(kashin, kernels):
    def lost(path):
        kernel, found = (
            np.asarray(value, np.float64)
            for value in (kernels[path], decoded_kernels(kashin)[path])
        )
        return np.square(kernel - found).sum() / np.square(kernel).sum()

    fields = loss_fields(kashin)
    expected = (lost("a/easy") + lost("b/hard")) / 2
    assert fields["relative_error"] == pytest.approx(expected, rel=1e-4)
    assert fields["converged_share"] == 0.5
    assert fields["quantize_seconds"] == sum(
        one.report.seconds for one in kashin.values()
    )


def test_layers_that_stay_lose_nothing_and_take_what_they_took(kashin):
    model = nnx.Linear(32, 96, rngs=nnx.Rngs(0))
    kept = frozenset({"b/hard"})
    fields = loss_fields(kashin, kept)
    easy = float(kashin["a/easy"].report.relative_squared_error)
    assert fields["relative_error"] == easy / 2
    # 4 bits each, sixteen pairs of float32, a scale and a seed; 2048 kept at 16 bits.
    bits = 4 * 1024 + 16 * 64 + 32 + 64 + 16 * 2048
    sizes = size_fields(model, 16, kashin, kept)
    assert sizes["stored_bits_per_weight"] == bits / 3072
    assert sizes["model_bits_per_weight"] == (bits + 16 * 96) / (3072 + 96)


def test_methods_that_cannot_fail_to_converge_have_no_such_share(kernels):
    fields = loss_fields(layers_of(kernels, UNIFORM))
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
