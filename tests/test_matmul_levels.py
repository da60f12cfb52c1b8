"""Products of codes whose codebook is one of products, and of single rows."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_matrices import random_words
from test_matmul import activations, dense_product, random_tensor, relative, slow_but

from kashin_jax import BasisSpec, GreedyKashin, JointKashin, matmul, quantize
from kashin_jax.tensors.kernels.columns import most_columns
from kashin_jax.tensors.kernels.factors import factor_rows
from kashin_jax.tensors.kernels.planes import add_planes, scales_of_tiles
from kashin_jax.tensors.levels import (
    factor_codes,
    factor_levels,
    product_bits,
    select,
    select_levels,
)


def product_tensor(shape, *, v_bits, **options):
    """Random codes of all pairs of a level of u and one of v."""
    q = random_tensor(shape, **options)
    grid = np.array(q.centroids).reshape(-1, 2**v_bits, 2)
    grid[..., 0], grid[..., 1] = grid[:, :1, 0], grid[:1, :, 1]
    layout = dataclasses.replace(q.layout, v_bits=v_bits)
    return q.replace(centroids=jnp.asarray(grid.reshape(-1, 2)), layout=layout)


def as_any_pairs(q):
    return q.replace(layout=dataclasses.replace(q.layout, v_bits=None))


@pytest.mark.parametrize("count", [1, 2, 3, 16, 31, 32, 33, 40])
def test_selects_find_the_levels_that_a_table_holds(count):
    rng = np.random.default_rng(count)
    levels = rng.normal(size=count).astype(np.float32)
    codes = rng.integers(0, count, (25, 7)).astype(np.uint8)
    found = jax.jit(select_levels)(levels, codes)
    np.testing.assert_array_equal(found, levels[codes])


def test_selects_take_a_level_for_every_row():
    rng = np.random.default_rng(0)
    tables = rng.normal(size=(5, 6)).astype(np.float32)
    codes = rng.integers(0, 6, (5, 7)).astype(np.uint8)
    leaves = [tables[:, i : i + 1] for i in range(6)]
    found = jax.jit(select)(leaves, codes)
    np.testing.assert_array_equal(found, np.take_along_axis(tables, codes, axis=1))


@pytest.mark.parametrize("v_bits", [1, 2, 3])
def test_codes_of_a_product_split_into_two_indices(v_bits):
    q = product_tensor((8, 8), v_bits=v_bits, bits=4)
    codes = jnp.arange(16, dtype=jnp.uint8)
    levels = factor_levels(q.centroids, v_bits)
    assert [len(own) for own in levels] == [2 ** (4 - v_bits), 2**v_bits]
    found = [own[i] for own, i in zip(levels, factor_codes(codes, v_bits), strict=True)]
    np.testing.assert_array_equal(jnp.stack(found, axis=1), q.centroids)


@pytest.mark.parametrize(
    ("bits",), slow_but([(2.5,)], [(2,), (2.5,), (3,), (4.5,), (5,)])
)
def test_a_codebook_of_the_joint_coder_is_seen_to_be_a_product(bits):
    config = JointKashin(bits=bits, block_shape=(16, 8), effort="fast")
    q, _ = quantize(activations((32, 24)), config, jax.random.key(0))
    assert q.layout.v_bits == config.split.v
    assert product_bits(q.centroids, q.layout.fine_bits) == q.layout.v_bits
    np.testing.assert_array_equal(q.decode(), as_any_pairs(q).decode())


def test_codebooks_of_any_pairs_are_no_products():
    config = GreedyKashin(bits=3, num_restarts=1, sample=256)
    q, _ = quantize(activations((32, 24)), config, jax.random.key(0))
    assert q.layout.v_bits is None
    assert product_bits(q.centroids, 3) is None
    almost = product_tensor((8, 8), v_bits=1, bits=3).centroids.at[5, 1].add(1e-6)
    assert product_bits(almost, 3) is None


def test_a_stack_of_codebooks_is_a_product_if_all_are():
    good = [product_tensor((8, 8), v_bits=1, seed=s).centroids for s in range(2)]
    assert product_bits(jnp.stack(good), 4) == 1
    assert product_bits(jnp.stack([*good, random_tensor((8, 8)).centroids]), 4) is None


ONE_SIDED, BOTH = "hadamard:identity", "hadamard"
# Levels that are selected, and so many that they are read from a table.
ROWS_QUICK = [
    (3, ONE_SIDED, None), (3, ONE_SIDED, (12, 16)), (3, BOTH, None),
    (6, ONE_SIDED, None),
]  # fmt: skip
ROWS_ALL = itertools.product([1, 3, 4, 5, 6], [ONE_SIDED, BOTH], [None, (12, 16)])


@pytest.mark.parametrize(
    ("bits", "basis", "block_shape"), slow_but(ROWS_QUICK, ROWS_ALL)
)
def test_a_single_row_multiplies_like_many(bits, basis, block_shape):
    options = {"block_shape": block_shape, "bits": bits, "basis": basis}
    tensors = [random_tensor((24, 48), **options)]
    if bits > 1:
        tensors.append(product_tensor((24, 48), v_bits=bits // 2, **options))
    x = activations((1, 24))
    for q in tensors:
        y = matmul(x, q, precision="highest")
        assert relative(y, dense_product(x, q)) < 1e-5


@pytest.mark.parametrize(("bits",), slow_but([(2.5,)], [(2.5,), (3.5,)]))
@pytest.mark.parametrize("rows", [1, 3])
def test_half_widths_with_a_basis_on_one_side_multiply_like_their_matrix(bits, rows):
    config = JointKashin(
        bits=bits,
        block_shape=(16, 8),
        effort="fast",
        basis=BasisSpec("hadamard", "identity"),
    )
    q = random_words(config, (96, 24))
    x = activations((rows, 96), seed=2)
    y = matmul(x, q, precision="highest")
    assert relative(y, dense_product(x, q)) < 1e-5


@pytest.mark.parametrize(("bits",), slow_but([(3,)], [(3,), (4,)]))
@pytest.mark.parametrize("block_shape", [None, (12, 16)])
@pytest.mark.parametrize("max_tile", [24 * 16, 24 * 48, 1])
def test_columns_of_many_rows_are_decoded_apart(bits, block_shape, max_tile):
    q = random_tensor(
        (24, 96), block_shape=block_shape, bits=bits, basis="hadamard:identity"
    )
    x = activations((5, 24))
    y = matmul(x, q, many_rows=1, max_tile=max_tile, precision="highest")
    assert relative(y, dense_product(x, q)) < 1e-5


def test_columns_are_cut_at_whole_planes_and_blocks():
    layout = random_tensor((24, 96), block_shape=(12, 16), bits=3).layout
    assert most_columns(layout, 24 * 96) == 96
    assert most_columns(layout, 24 * 95) == 48
    assert most_columns(layout, 24 * 15) == 8  # eight codes of 3 bits fill bytes
    assert most_columns(layout, 24 * 7) is None
    assert most_columns(random_tensor((8, 7)).layout, 2**20) is None


def test_a_single_row_in_half_precision_loses_no_more_than_its_roundings():
    q = product_tensor((64, 48), v_bits=2, basis="hadamard:identity")
    x = activations((1, 64)).astype(jnp.bfloat16)
    y = matmul(x, q)
    assert y.dtype == jnp.bfloat16
    assert relative(y, dense_product(x, q)) < 2 * float(jnp.finfo(jnp.bfloat16).eps)


@pytest.mark.parametrize("rows", [1, 3])
def test_gradients_leave_a_product_a_product(rows):
    q = product_tensor((24, 16), v_bits=1, bits=3, basis="hadamard:identity")
    x, cotangent = activations((rows, 24)), activations((rows, 16), seed=2)

    @jax.jit
    def loss(centroids):
        y = matmul(x, q.replace(centroids=centroids), precision="highest")
        return jnp.sum(cotangent * y)

    gradient = jax.grad(loss)(q.centroids)
    assert product_bits(q.centroids - 0.1 * gradient, 3) == 1
    # The loss is linear, so a step of all levels of u and v together gives its slope.
    step = product_tensor((24, 16), v_bits=1, bits=3, seed=5).centroids
    change = loss(q.centroids + step) - loss(q.centroids)
    np.testing.assert_allclose(jnp.sum(gradient * step), change, rtol=1e-3)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_planes_of_codes_give_back_the_columns_in_their_order(rows):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (4, 6)).astype(np.uint8)
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).reshape(-1)
    scale = jnp.array([[1.0, 2.0], [3.0, 4.0]])  # of two rows each
    (found,) = add_planes(
        (jnp.ones((1, 6)),),
        jnp.asarray(packed),
        4,
        rows,
        {"scale": scales_of_tiles(scale, 2, rows)},
        lambda part, plane, columns, scaled: (
            scaled(plane.astype(jnp.float32)).sum(0, keepdims=True),
        ),
    )
    tops, bottoms = codes[:2].sum(0), codes[2:].sum(0)
    expected = 1 + tops * np.repeat([1, 2], 3) + bottoms * np.repeat([3, 4], 3)
    np.testing.assert_array_equal(found[0], expected)


def test_tiles_span_whole_blocks_for_many_rows_and_never_for_few():
    layout = random_tensor((24, 96), block_shape=(6, 16), bits=4).layout
    assert factor_rows(layout, 2**20, rows_of_x=1) == 6
    assert factor_rows(layout, 2**20, rows_of_x=100) == 24
    assert factor_rows(layout, 96 * 13, rows_of_x=100) == 12
    assert factor_rows(layout, 96 * 3, rows_of_x=100) == 3
