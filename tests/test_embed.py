"""`QuantizedEmbed` beside the `nnx.Embed` that it replaces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from packed_matrices import random_tensor

from kashin_jax import (
    HQQ,
    NF4,
    RTN,
    AlternatingKashin,
    BasisSpec,
    ChannelKMeans,
    GreedyKashin,
    JointKashin,
    KMeans,
    QuantizedEmbed,
    Rotated,
    Uniform,
    dequantize,
)
from kashin_jax.errors import UsageError
from kashin_jax.tensors import kashin
from kashin_jax.tensors.kashin import KashinLayout, bands_of_rows

JOINT = JointKashin(bits=2, block_shape=(12, 8))
KEY = jax.random.key(0)
METHODS = [
    JOINT,
    JointKashin(bits=2.5, block_shape=(12, 8)),
    GreedyKashin(bits=3, block_shape=(4, 24)),
    GreedyKashin(bits=1),
    RTN(bits=3, group_size=7),
    HQQ(bits=2, group_size=16),
    Uniform(bits=5),
    NF4(group_size=20),
    KMeans(bits=2, num_restarts=1),
    ChannelKMeans(bits=2, num_restarts=1),
    Rotated(RTN(bits=4, group_size=64)),
    AlternatingKashin(bits=3),
    AlternatingKashin(axis=1),
]
VOCABULARY, FEATURES = 48, 24


def table(shape):
    return jax.random.normal(jax.random.key(3), shape)


def pair(config=JOINT, **options):
    """A packed layer, and the dense one on the table that it decodes to."""
    dense = nnx.Embed(VOCABULARY, FEATURES, rngs=nnx.Rngs(1), **options)
    dtype = options.get("param_dtype", jnp.float32)
    tensor = random_tensor(config, (VOCABULARY, FEATURES), dtype=dtype)
    packed = QuantizedEmbed.from_embed(dense, tensor)
    dense.embedding.set_value(packed.embedding)
    return packed, dense


def assert_close(found, expected, tolerance=1e-5):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    known = ~np.isnan(expected)
    np.testing.assert_array_equal(known, ~np.isnan(found))
    error = np.linalg.norm(found[known] - expected[known])
    assert error <= tolerance * np.linalg.norm(expected[known])


@pytest.mark.parametrize("config", METHODS, ids=lambda config: type(config).__name__)
def test_look_ups_and_logits_are_those_of_the_decoded_table(config):
    packed, dense = pair(config)
    tokens = jnp.array([[0, 47, 13], [12, 11, 13]])
    query = table((2, 3, FEATURES))

    @nnx.jit
    def run(layer):
        return layer(tokens), layer.attend(query)

    for found, expected in zip(run(packed), run(dense), strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("config", [JOINT, RTN(group_size=16)])
def test_indices_are_read_as_by_an_embedding(config):
    packed, dense = pair(config)
    for kind in (jnp.int32, jnp.uint8, jnp.int8):
        tokens = jnp.array([0, 47, 48, 100], kind)
        assert_close(packed(tokens), dense(tokens))
    tokens = jnp.array([[-1, -48, -49]])
    assert_close(packed(tokens), dense(tokens))
    assert np.isnan(packed(tokens)[0, 2]).all()
    assert packed(jnp.zeros((0, 2), jnp.int32)).shape == (0, 2, FEATURES)
    assert packed(jnp.int32(5)).shape == (FEATURES,)
    with pytest.raises(ValueError, match="whole numbers"):
        type(packed).__call__.__wrapped__(packed, jnp.ones(3))


def test_a_table_of_one_row_is_that_row_for_everything():
    dense = nnx.Embed(1, 16, rngs=nnx.Rngs(0))
    packed = QuantizedEmbed.from_embed(dense, RTN(), KEY)
    dense.embedding.set_value(packed.embedding)
    tokens = jnp.array([0, 5, -3])
    assert_close(packed(tokens), dense(tokens))


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": jnp.bfloat16},
        {"param_dtype": jnp.float16},
        {"param_dtype": jnp.bfloat16, "dtype": jnp.float32},
    ],
)
def test_types_are_those_of_an_embedding(options):
    packed, dense = pair(**options)
    tokens = jnp.arange(6)
    assert packed.dtype == dense.dtype
    assert_close(packed(tokens), dense(tokens), 1e-2)
    query = table((3, FEATURES))
    assert_close(packed.attend(query), dense.attend(query), 2e-2)


def test_tables_split_merge_and_run_under_jit_vmap_and_grad():
    packed, dense = pair()
    tokens = jnp.arange(12).reshape(3, 4)
    merged = nnx.merge(*nnx.split(packed))
    np.testing.assert_array_equal(merged(tokens), packed(tokens))
    found = nnx.jit(lambda layer, x: layer(x))(packed, tokens)
    assert_close(found, dense(tokens))
    assert_close(jax.vmap(packed)(tokens), dense(tokens))
    query = table((3, FEATURES))
    # Logits reach 100 here: the sine of one would magnify its rounding a hundred times.
    gradient = jax.grad(lambda x: jnp.sum(jnp.square(packed.attend(x))))(query)
    expected = jax.grad(lambda x: jnp.sum(jnp.square(dense.attend(x))))(query)
    assert_close(gradient, expected)


def test_a_table_of_another_shape_is_an_error_that_names_the_layer():
    tensor = random_tensor(RTN(), (24, 48))
    dense = nnx.Embed(VOCABULARY, FEATURES, rngs=nnx.Rngs(1))
    with pytest.raises(UsageError, match=r"`wte/embedding` has shape \(48, 24\)"):
        QuantizedEmbed.from_embed(dense, tensor, path="wte")


def bands(shape, bits, block_shape):
    basis = BasisSpec("hadamard", "hadamard")
    return bands_of_rows(
        KashinLayout(
            shape=shape, block_shape=block_shape, bits=bits, basis=basis, dtype="bf16"
        )
    )


def test_bands_are_whole_blocks_that_end_between_bytes():
    assert bands((24, 8), 3, (2, 8)) == [1, 2, 3, 4, 6, 12]
    # Rows of 15 bits: only every eighth ends with a byte.
    assert bands((24, 5), 3, (2, 5)) == [1, 3]
    # Rows of odd index, of 10 bits, are stored apart: eight of them end with a byte.
    assert bands((48, 5), 2.5, (2, 5)) == [1, 3]
    assert bands((24, 8), 3, (24, 8)) == [1]


def rows_of(tensor, tokens):
    return tensor.rows(tokens)


def logits_of(query, tensor):
    return tensor.transposed_product(query)


def decoded_sizes(function, *args):
    """Sizes of all float arrays that a function makes, inside loops too."""
    sizes = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            for var in equation.outvars:
                if jnp.issubdtype(var.aval.dtype, jnp.floating):
                    sizes.append(var.aval.size)
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(jax.jit(function).trace(*args).jaxpr.jaxpr)
    return sizes


@pytest.mark.parametrize(
    "config",
    [JointKashin(bits=4), RTN(), NF4()],
    ids=lambda config: type(config).__name__,
)
def test_a_look_up_decodes_a_small_part_of_the_table(config):
    tensor = random_tensor(config, (2048, 64))
    tokens = jnp.array([3, 2000])
    assert max(decoded_sizes(rows_of, tensor, tokens)) <= 2048 * 64 // 8
    assert_close(tensor.rows(tokens), dequantize(tensor)[tokens])


def test_many_tokens_and_logits_need_no_more_than_a_tile(monkeypatch):
    monkeypatch.setattr(kashin, "MAX_TILE", 2**13)
    tensor = random_tensor(JointKashin(bits=4), (2048, 64))
    tokens = jax.random.randint(KEY, (500,), 0, 2048)
    sizes = decoded_sizes(rows_of, tensor, tokens)
    assert max(size for size in sizes if size != 500 * 64) <= 2**13
    assert_close(tensor.rows(tokens), dequantize(tensor)[tokens])
    query = table((2, 64))
    assert max(decoded_sizes(logits_of, query, tensor)) <= 2**13
    assert_close(tensor.transposed_product(query), query @ dequantize(tensor).T)


def test_no_queries_have_no_logits():
    packed, dense = pair()
    nothing = jnp.zeros((0, FEATURES))
    assert (
        packed.attend(nothing).shape == dense.attend(nothing).shape == (0, VOCABULARY)
    )
