"""`matmul(x, q)` against the dense product with the decoded matrix."""

import inspect
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_matrices import random_words

from kashin_jax import BasisSpec, JointKashin, KashinTensor, dequantize, matmul
from kashin_jax.tensors import prepare
from kashin_jax.tensors.kashin import KashinLayout
from kashin_jax.tensors.kernels.factors import factor_rows
from kashin_jax.tensors.products import MANY_ROWS

PAIRS = ["hadamard", "haar", "dct", "hadamard:identity", "identity:haar"]


def random_tensor(shape, *, block_shape=None, bits=4, basis="hadamard", seed=0):
    """Random codes: every stream of bytes is a matrix, and nothing has to be fitted."""
    rng = np.random.default_rng(seed)
    block_shape = block_shape or shape
    grid = shape[0] // block_shape[0], shape[1] // block_shape[1]
    size = math.ceil(math.prod(shape) * bits / 8)
    return KashinTensor(
        jnp.array(rng.integers(0, 256, size), jnp.uint8),
        jnp.array(rng.normal(size=(2**bits, 2)), jnp.float32),
        jnp.array(rng.uniform(0.5, 2, grid), jnp.float32),
        jnp.array(rng.integers(0, 2**32, 2), jnp.uint32),
        KashinLayout(
            shape=shape,
            block_shape=block_shape,
            bits=bits,
            basis=BasisSpec.parse(basis),
            dtype="float32",
        ),
    )


def activations(shape, seed=1):
    return jnp.array(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def relative(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def dense_product(x, q):
    return np.asarray(x, np.float64) @ np.asarray(q.decode(), np.float64)


@pytest.mark.slow
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    block=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    bits=st.integers(1, 8),
    basis=st.sampled_from(PAIRS),
    batch=st.sampled_from([(), (1,), (3,), (2, 3), (2, 1, 2)]),
    max_tile=st.integers(1, 600),
)
def test_the_product_equals_the_dense_one_for_any_tile(
    block, grid, bits, basis, batch, max_tile
):
    shape = block[0] * grid[0], block[1] * grid[1]
    q = random_tensor(shape, block_shape=block, bits=bits, basis=basis)
    x = activations((*batch, shape[0]))
    y = matmul(x, q, max_tile=max_tile)
    assert y.shape == (*batch, shape[1])
    assert relative(y, dense_product(x, q)) < 1e-5


BLOCKS = (8, 12)
# Every number of rows, tile and kind of blocks, and what they decide together.
QUICK = [
    (1, 96, None), (1, 2**20, BLOCKS), (16, 1, None), (16, 96, BLOCKS),
    (MANY_ROWS - 1, 2**20, BLOCKS), (MANY_ROWS, 1, BLOCKS), (MANY_ROWS, 96, BLOCKS),
    (MANY_ROWS, 2**20, None),
]  # fmt: skip
ALL = itertools.product(
    [1, 16, MANY_ROWS - 1, MANY_ROWS], [1, 96, 2**20], [None, BLOCKS]
)


def slow_but(quick, cases):
    """Cases for `parametrize`, of which only the quick ones are not slow."""
    slow = pytest.mark.slow
    return [
        case if case in quick else pytest.param(*case, marks=slow) for case in cases
    ]


@pytest.mark.parametrize(("rows", "max_tile", "block_shape"), slow_but(QUICK, ALL))
def test_few_and_many_rows_agree_with_the_dense_product(rows, max_tile, block_shape):
    q = random_tensor((24, 36), block_shape=block_shape)
    x = activations((rows, 24))
    y = matmul(x, q, max_tile=max_tile, precision="highest")
    assert relative(y, dense_product(x, q)) < 1e-5


@pytest.mark.parametrize(("rows", "max_tile"), [(2, 2**20), (MANY_ROWS, 16 * 24)])
@pytest.mark.parametrize(
    ("bits",), slow_but([(2,), (2.5,)], [(2,), (2.5,), (3,), (3.5,), (5,)])
)
def test_joint_codes_of_any_width_multiply_like_their_matrix(rows, max_tile, bits):
    q = random_words(JointKashin(bits=bits, block_shape=(16, 8)), (96, 24))
    x = activations((rows, 96), seed=2)
    y = matmul(x, q, max_tile=max_tile, precision="highest")
    assert relative(y, dense_product(x, q)) < 1e-5


@pytest.mark.parametrize(
    ("bits",), slow_but([(1,), (3,), (4,), (8,)], [(bits,) for bits in range(1, 9)])
)
def test_planes_of_codes_are_taken_where_they_lie(bits):
    q = random_tensor((12, 48), block_shape=(6, 8), bits=bits)
    assert factor_rows(q.layout, 2**20) == 6
    assert factor_rows(q.layout, 100) == 2
    x = activations((3, 12))
    y = matmul(x, q, precision="highest")
    assert relative(y, dense_product(x, q)) < 1e-5


def test_codes_whose_rows_end_inside_bytes_are_put_in_order_first():
    assert factor_rows(random_tensor((12, 7), bits=3).layout, 2**20) is None
    assert factor_rows(random_tensor((1021, 8), bits=4).layout, 2**10) is None


def test_a_basis_that_the_caller_keeps_gives_the_same_product():
    q = random_tensor((16, 24))
    x = activations((3, 16))
    kept = matmul(x, prepare(q))
    np.testing.assert_array_equal(kept, matmul(x, q))


@pytest.mark.parametrize("rows", [3, MANY_ROWS])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_activations_give_half_precision_products(rows, dtype):
    q = random_tensor((32, 24))
    x = activations((rows, 32)).astype(dtype)
    y = matmul(x, q)
    assert y.dtype == dtype
    # A few roundings, of W or of x Q1 and of y: 8 bits of mantissa in bfloat16.
    assert relative(y, dense_product(x, q)) < 2 * float(jnp.finfo(dtype).eps)


def test_no_rows_give_no_rows():
    assert matmul(jnp.zeros((0, 16)), random_tensor((16, 24))).shape == (0, 24)


def test_a_stack_of_matrices_multiplies_under_vmap():
    tensors = [random_tensor((16, 24), seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tensors)
    x = activations((2, 16))
    found = jax.jit(jax.vmap(matmul, in_axes=(None, 0)))(x, stacked)
    expected = np.stack([dense_product(x, q) for q in tensors])
    assert relative(found, expected) < 1e-5


@pytest.mark.parametrize("rows", [2, MANY_ROWS])
def test_features_must_match_the_matrix(rows):
    with pytest.raises(ValueError, match=r"`x` has 24 .*\(16, 24\) \[in, out\]"):
        matmul(activations((rows, 24)), random_tensor((16, 24)))


def test_whole_numbers_are_refused_rather_than_truncating_the_matrix():
    # Without the run-time checker of the tests, as users call it.
    call = inspect.unwrap(matmul)
    with pytest.raises(TypeError, match=r"`x` has type int32; cast it to float"):
        call(jnp.ones((2, 16), jnp.int32), random_tensor((16, 24)))


def inner_jaxprs(value):
    if isinstance(value, (tuple, list)):
        return [inner for item in value for inner in inner_jaxprs(item)]
    value = getattr(value, "jaxpr", value)
    return [value] if hasattr(value, "eqns") else []


def largest_float(jaxpr):
    """Elements of the largest floating array that any equation makes."""
    sizes = [0]
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            dtype = getattr(variable.aval, "dtype", None)
            if dtype is not None and jnp.issubdtype(dtype, jnp.floating):
                sizes.append(math.prod(variable.aval.shape))
        for parameter in equation.params.values():
            sizes += map(largest_float, inner_jaxprs(parameter))
    return max(sizes)


@pytest.mark.parametrize("block_shape", [None, (64, 32)])
def test_no_float_array_as_large_as_the_matrix_is_formed(block_shape):
    q = random_tensor((256, 256), block_shape=block_shape)
    x = activations((4, 256))

    def largest(function):
        return largest_float(inner_jaxprs(jax.make_jaxpr(function)(x, q))[0])

    tiled = largest(lambda x, q: matmul(x, q, max_tile=4096))
    assert tiled <= 4096
    assert largest(lambda x, q: x @ q.decode()) >= 256 * 256


def test_the_compiled_product_needs_less_memory_than_the_matrix():
    q = random_tensor((1024, 1024))
    x = activations((4, 1024))
    product = jax.jit(lambda x, q: matmul(x, q, max_tile=2**14))
    memory = product.lower(x, q).compile().memory_analysis()
    # Packed codes and scales are copied once to be cut into tiles.
    assert memory.temp_size_in_bytes < 4 * 1024 * 1024 / 4


@pytest.mark.parametrize("rows", [3, MANY_ROWS])
def test_the_gradient_for_x_is_that_of_the_dense_product(rows):
    q = random_tensor((24, 16), block_shape=(8, 16))
    x, cotangent = activations((rows, 24)), activations((rows, 16), seed=2)
    loss = lambda x: jnp.sum(cotangent * matmul(x, q, max_tile=64))
    gradient = jax.jit(jax.grad(loss))(x)
    expected = np.asarray(cotangent, np.float64) @ np.asarray(q.decode()).T
    assert relative(gradient, expected) < 1e-5


@pytest.mark.parametrize("name", ["centroids", "scale"])
@pytest.mark.parametrize("rows", [3, MANY_ROWS])
def test_gradients_reach_centroids_and_scales(rows, name):
    q = random_tensor((24, 16), block_shape=(8, 16), bits=2)
    x, cotangent = activations((rows, 24)), activations((rows, 16), seed=2)

    def loss(leaf):
        changed = q.replace(**{name: leaf})
        return jnp.sum(cotangent * matmul(x, changed, max_tile=10**4))

    leaf = getattr(q, name)
    gradient = np.asarray(jax.jit(jax.grad(loss))(leaf))
    # The loss is linear in either, so a difference over any step is the derivative.
    steps = np.eye(leaf.size, dtype=np.float32).reshape(leaf.size, *leaf.shape)
    compiled = jax.jit(loss)
    expected = [compiled(leaf + step) - compiled(leaf) for step in steps]
    assert np.isfinite(gradient).all()
    assert relative(gradient.reshape(-1), expected) < 1e-4


def test_dequantize_is_what_matmul_multiplies_by():
    q = random_tensor((16, 24))
    np.testing.assert_allclose(matmul(jnp.eye(16), q), dequantize(q), atol=1e-5)
