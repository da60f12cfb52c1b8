"""Huge matrices: coded, and measured, part by part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kashin_jax import BasisSpec, JointKashin
from kashin_jax.bases import make_pair
from kashin_jax.methods import encode
from kashin_jax.methods.joint.anneal import anneal
from kashin_jax.methods.joint.coder import joint_code
from kashin_jax.methods.joint.schedules import Split
from kashin_jax.methods.joint.words import decode_words
from kashin_jax.methods.quantize import _relative_squared_error
from kashin_jax.tensors import Bases, Prepared
from kashin_jax.tensors.kashin import cut_rows
from tests.packed_matrices import random_tensor

KEY = jax.random.key(3)
HADAMARD = BasisSpec.parse("hadamard")
SIDE = 32


def weights(shape):
    """Gaussian, outputs and inputs of different strength."""
    strength = np.outer(np.linspace(0.5, 2, shape[0]), np.linspace(1, 3, shape[1]))
    drawn = np.random.default_rng(3).standard_normal(shape)
    return jnp.asarray(drawn * strength, jnp.float32)


def code(weight, part_size, bits=3):
    pair = make_pair(HADAMARD, KEY, (SIDE, SIDE))
    config = JointKashin(bits=bits, effort="fast")
    found = joint_code(weight, pair, None, config, (SIDE, SIDE), part_size=part_size)
    return found, np.asarray(decoded(found, pair))


@jax.jit
def decoded(found, pair):
    u, v = found.centroids[:, 0][found.codes], found.centroids[:, 1][found.codes]
    grid = [n // SIDE for n in found.codes.shape]

    def blocks(x):
        return x.reshape(grid[0], SIDE, grid[1], SIDE).transpose(0, 2, 1, 3)

    unit = blocks(u) + pair.synthesis(blocks(v))
    scaled = unit * found.scale[:, :, None, None]
    whole = scaled.transpose(0, 2, 1, 3).reshape(found.codes.shape)
    return whole * jnp.outer(*map(jnp.float32, (found.in_scale, found.out_scale)))


QUICK = [(2.5, 128 * 64), (2.5, 1)]
ALL = [(bits, size) for bits in (2, 2.5, 3) for size in (128 * 64, 128 * 128, 1)]


@pytest.mark.parametrize(
    ("bits", "part_size"),
    [
        case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow)
        for case in ALL
    ],
)
def test_coding_in_parts_loses_as_little_as_coding_at_once(bits, part_size):
    weight = weights((128, 256))
    whole, decoded = code(weight, weight.size, bits)
    parts, in_parts = code(weight, part_size, bits)
    assert jax.tree.map(jnp.shape, parts) == jax.tree.map(jnp.shape, whole)
    np.testing.assert_array_equal(parts.in_scale, whole.in_scale)
    # The sum over a block may be added in another order.
    np.testing.assert_allclose(parts.scale, whole.scale, rtol=1e-5)
    at_once = np.linalg.norm(weight - decoded)
    # The smallest sample is 4,096 weights, whose levels are those of few blocks.
    assert np.linalg.norm(weight - in_parts) < 1.03 * at_once


def test_levels_of_parts_are_fitted_to_blocks_from_all_over_the_matrix():
    weight = weights((64, 256)).at[:, 128:].set(0)
    parts, decoded = code(weight, 64 * 128)
    # Levels of the first half alone, or of the second alone, would fail one of these.
    assert np.abs(decoded[:, 128:]).max() == 0
    lost = np.sum(np.square(weight - decoded)) / np.sum(np.square(weight))
    assert lost < 0.03
    assert len(np.unique(parts.codes[:, :128])) == 8


def test_given_levels_stay_and_each_block_is_coded_alone():
    x = weights((6 * SIDE, SIDE)).reshape(6, SIDE, SIDE)
    x = x / np.sqrt(np.mean(np.square(x), axis=(1, 2), keepdims=True))
    basis = make_pair(HADAMARD, KEY, (SIDE, SIDE))
    search = {"split": Split(2, 1), "steps": 50}
    refitted = anneal(x, basis, **search)
    levels = jax.tree.map(lambda level: 1.05 * level, refitted.levels)
    search["levels"] = levels
    all_of_them = anneal(x, basis, **search)
    others = np.array(x)
    others[3:], others[0] = 0, -2 * others[0]
    beside_others = anneal(jnp.asarray(others), basis, **search)
    np.testing.assert_array_equal(all_of_them.levels.u, levels.u)
    np.testing.assert_array_equal(all_of_them.levels.v, levels.v)
    np.testing.assert_array_equal(all_of_them.u[2], beside_others.u[2])
    np.testing.assert_array_equal(all_of_them.v[2], beside_others.v[2])
    decode = jax.jit(decode_words)
    error = [
        float(np.mean(np.square(x - decode(words, basis))))
        for words in (refitted, all_of_them)
    ]
    assert error[0] < error[1] < 1.5 * error[0]


@pytest.mark.parametrize(
    "bits", [2.5, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (2, 3, 5))]
)
def test_bands_of_rows_decode_to_the_rows_of_the_matrix(bits):
    config = JointKashin(bits=bits, block_shape=(16, SIDE), effort="fast")
    tensor = random_tensor(config, (96, 64))
    decode_bands = jax.vmap(lambda band: band.decode())
    bands = jax.jit(lambda tensor: decode_bands(cut_rows(tensor, 3)))(tensor)
    # Sums that nearly cancel differ in more than their last bit.
    whole = np.asarray(tensor.decode())
    np.testing.assert_allclose(
        bands.reshape(whole.shape), whole, rtol=1e-5, atol=1e-5 * np.abs(whole).max()
    )


def compiled_memory(shape, config):
    """What coding a matrix and measuring the error take beside it, over its size."""
    spec = jax.ShapeDtypeStruct
    weight = spec(shape, jnp.float32)
    block = (64, 64)
    pair = jax.eval_shape(lambda key: make_pair(HADAMARD, key, block), KEY)
    tensor, _ = jax.eval_shape(lambda w: encode(w, KEY, config), weight)
    stages = (
        joint_code.lower(weight, pair, pair, config, block),
        _relative_squared_error.lower(weight, Prepared(tensor, Bases(pair, pair))),
    )
    used = [stage.compile().memory_analysis() for stage in stages]
    size = 4 * shape[0] * shape[1]
    return [(m.temp_size_in_bytes + m.output_size_in_bytes) / size for m in used]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 2.5, 4])
def test_a_huge_matrix_needs_less_than_twice_its_size_beside_it(bits):
    config = JointKashin(bits=bits, effort="fast")
    assert max(compiled_memory((1024, 1024), config)) < 8
    assert max(compiled_memory((8192, 16384), config)) < 2
