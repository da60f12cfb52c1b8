"""Products with the controls, decoded a tile at a time."""

import jax
import jax.numpy as jnp
import pytest
from packed_matrices import random_tensor
from test_matmul import (
    activations,
    dense_product,
    inner_jaxprs,
    largest_float,
    relative,
    slow_but,
)

from kashin_jax import (
    HQQ,
    NF4,
    RTN,
    AlternatingKashin,
    ChannelKMeans,
    KMeans,
    Rotated,
    Uniform,
    matmul,
)
from kashin_jax.tensors import prepare

CONFIGS = [
    RTN(),
    RTN(group_size=26, bits=3),
    RTN(group_size=16),  # the last group is shorter
    RTN(group_size=5, bits=2),
    RTN(group_size=None),
    HQQ(group_size=4),
    HQQ(group_size=26, bits=2),
    NF4(group_size=32),
    Uniform(bits=8),
    KMeans(bits=3),
    KMeans(bits=6),
    ChannelKMeans(bits=4),
    ChannelKMeans(bits=6),
    Rotated(KMeans(bits=1)),
    Rotated(RTN(group_size=26)),
    AlternatingKashin(),
    AlternatingKashin(bits=3, axis=1),
    Rotated(AlternatingKashin(bits=5)),
    AlternatingKashin(bits=2),
]


# Whole planes in one tile, and codes that end inside bytes in many.
SIZES = [(1, 24, 2**20), (5, 7, 200)]
QUICK = [(config, *SIZES[i % 2]) for i, config in enumerate(CONFIGS)]
ALL = [(config, *sizes) for sizes in SIZES for config in CONFIGS]


@pytest.mark.parametrize("config, rows, columns, max_tile", slow_but(QUICK, ALL))
def test_the_controls_multiply_like_their_decoded_matrices(
    config, rows, columns, max_tile
):
    q = random_tensor(config, (52, columns))
    x = activations((rows, 52), seed=2)
    y = matmul(x, q, max_tile=max_tile, precision="highest")
    assert relative(y, dense_product(x, q)) < 1e-5


@pytest.mark.parametrize("config", CONFIGS[::4], ids=repr)
def test_controls_take_batches_and_half_precision(config):
    q = random_tensor(config, (52, 24))
    x = activations((2, 3, 52), seed=2).astype(jnp.bfloat16)
    y = matmul(x, q)
    assert y.shape == (2, 3, 24) and y.dtype == jnp.bfloat16
    # Weights, activations and outputs are rounded to 8 bits of mantissa.
    assert relative(y, dense_product(x, q)) < 3 * float(jnp.finfo(jnp.bfloat16).eps)


def test_a_rotation_that_the_caller_keeps_gives_the_same_product():
    config = Rotated(RTN(group_size=26))
    q = random_tensor(config, (52, 24))
    x = activations((3, 52), seed=2)
    kept = matmul(x, prepare(q))
    assert relative(kept, matmul(x, q)) < 1e-6


@pytest.mark.parametrize(
    "config, columns",
    [
        (RTN(), 256),
        (RTN(), 255),
        (NF4(), 255),
        (ChannelKMeans(), 256),
        (Rotated(RTN(group_size=64)), 256),
        (Uniform(), 256),
        (AlternatingKashin(), 255),
        (AlternatingKashin(axis=1), 256),
    ],
    ids=repr,
)
def test_no_float_array_as_large_as_a_control_is_formed(config, columns):
    q = random_tensor(config, (256, columns))

    def largest(function):
        traced = jax.make_jaxpr(function)(activations((5, 256)), q)
        return largest_float(inner_jaxprs(traced)[0])

    # Levels of all channels, 16 for each, are leaves of their own size.
    assert largest(lambda x, q: matmul(x, q, max_tile=4096)) <= 16 * 256
    assert largest(lambda x, q: x @ q.decode()) >= 256 * columns
