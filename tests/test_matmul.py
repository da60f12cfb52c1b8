"""`matmul(x, q)` against the dense product with the decoded matrix."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kashin_jax import (
    BasisSpec,
    JointConfig,
    QuantizedTensor,
    dequantize,
    matmul,
    quantize,
)
from kashin_jax.quantized import derive_basis
from kashin_jax.quantized.factors import factor_rows
from kashin_jax.quantized.product import many_rows_of_backend
from kashin_jax.quantized.tensor import KashinLayout

MANY_ROWS = many_rows_of_backend()
PAIRS = ["hadamard", "haar", "dct", "hadamard:identity", "identity:haar"]


def random_tensor(shape, *, block_shape=None, bits=4, basis="hadamard", seed=0):
    """Random codes: every stream of bytes is a matrix, and nothing has to be fitted."""
    rng = np.random.default_rng(seed)
    block_shape = block_shape or shape
    grid = shape[0] // block_shape[0], shape[1] // block_shape[1]
    size = math.ceil(math.prod(shape) * bits / 8)
    return QuantizedTensor(
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


@pytest.mark.parametrize("rows", [1, 16, MANY_ROWS - 1, MANY_ROWS])
@pytest.mark.parametrize("max_tile", [1, 96, 2**20])
@pytest.mark.parametrize("block_shape", [None, (8, 12)])
def test_few_and_many_rows_agree_with_the_dense_product(rows, max_tile, block_shape):
    q = random_tensor((24, 36), block_shape=block_shape)
    x = activations((rows, 24))
    y = matmul(x, q, max_tile=max_tile, precision="highest")
    assert relative(y, dense_product(x, q)) < 1e-5


@pytest.mark.parametrize("rows", [2, MANY_ROWS])
@pytest.mark.parametrize("bits", [2, 2.5, 3, 3.5, 5])
def test_joint_codes_of_any_width_multiply_like_their_matrix(rows, bits):
    config = JointConfig(bits=bits, block_shape=(16, 8), effort="fast")
    q, _ = quantize(activations((96, 24)), config, jax.random.key(0))
    x = activations((rows, 96), seed=2)
    for max_tile in (16 * 24, 2**20):
        y = matmul(x, q, max_tile=max_tile, precision="highest")
        assert relative(y, dense_product(x, q)) < 1e-5


@pytest.mark.parametrize("bits", range(1, 9))
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
    kept = matmul(x, q, basis=derive_basis(q))
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
    found = jax.vmap(matmul, in_axes=(None, 0))(x, stacked)
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
    gradient = jax.grad(lambda x: jnp.sum(cotangent * matmul(x, q, max_tile=64)))(x)
    expected = np.asarray(cotangent, np.float64) @ np.asarray(q.decode()).T
    assert relative(gradient, expected) < 1e-5


@pytest.mark.parametrize("name", ["centroids", "scale"])
@pytest.mark.parametrize("rows", [3, MANY_ROWS])
def test_gradients_reach_centroids_and_scales(rows, name):
    q = random_tensor((24, 16), block_shape=(8, 16), bits=2)
    x, cotangent = activations((rows, 24)), activations((rows, 16), seed=2)

    def loss(leaf):
        changed = q._replace(**{name: leaf})
        return jnp.sum(cotangent * matmul(x, changed, max_tile=10**4))

    leaf = getattr(q, name)
    gradient = jax.grad(loss)(leaf)
    # The loss is linear in either, so a difference over any step is the derivative.
    steps = jnp.eye(leaf.size).reshape(leaf.size, *leaf.shape)
    expected = jax.lax.map(lambda step: loss(leaf + step) - loss(leaf), steps)
    assert np.isfinite(gradient).all()
    assert relative(gradient.reshape(-1), expected) < 1e-4


def test_dequantize_is_what_matmul_multiplies_by():
    q = random_tensor((16, 24))
    np.testing.assert_allclose(matmul(jnp.eye(16), q), dequantize(q), atol=1e-5)
