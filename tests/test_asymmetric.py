"""Asymmetric calibration: the matrix that gives most of what is to be given."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kashin_jax import RTN
from kashin_jax.methods import asymmetric_target, encode, output_loss

INPUTS, OUTPUTS, TOKENS = 12, 5, 60


def disturbed(seed, size=0.3, gain=0.8):
    """Tokens (x, d): what is read, shrunk and with noise, and what is missing in it."""
    rng = np.random.default_rng(seed)
    wanted = rng.standard_normal((TOKENS, INPUTS)) * rng.uniform(0.3, 3, INPUTS)
    x = gain * wanted + size * rng.standard_normal((TOKENS, INPUTS))
    return x, wanted - x


def moments(x, d):
    both = np.concatenate([x, d], axis=1)
    return jnp.asarray(both.T @ both / len(both), jnp.float32)


def matrix(seed):
    rng = np.random.default_rng(seed + 1)
    return jnp.asarray(rng.standard_normal((INPUTS, OUTPUTS)), jnp.float32)


def lost(given, x, d, weight):
    """Mean square of what is missing of (x + d) W, by hand."""
    missing = (x + d) @ np.asarray(weight, float) - x @ np.asarray(given, float)
    return np.square(missing).sum() / len(x)


def test_the_loss_is_that_of_the_outputs():
    """Guards signs and halves: against products of the tokens themselves."""
    (x, d), weight = disturbed(0), matrix(0)
    tensor, _ = encode(weight, jax.random.key(0), RTN(bits=3, group_size=4))
    out = np.random.default_rng(2).standard_normal((OUTPUTS, 7))
    found = output_loss(weight, moments(x, d), tensor)
    np.testing.assert_allclose(found, lost(tensor.decode(), x, d, weight), rtol=1e-4)
    whole = output_loss(weight, moments(x, d))
    np.testing.assert_allclose(whole, lost(0 * weight, x, d, weight), rtol=1e-4)
    g = jnp.asarray(out @ out.T, jnp.float32)
    missing = (x + d) @ np.asarray(weight, float) - x @ np.asarray(tensor.decode())
    np.testing.assert_allclose(
        output_loss(weight, moments(x, d), tensor, out_moments=g),
        np.square(missing @ out).sum() / len(x),
        rtol=1e-4,
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 2), st.floats(-1, 2))
def test_held_out_tokens_lose_no_more(seed, size, gain):
    """Guards a regression that would be trusted where it does not hold."""
    weight, half = matrix(seed), TOKENS // 2
    x, d = disturbed(seed, size, gain)
    learned, held_out = moments(x[:half], d[:half]), moments(x[half:], d[half:])
    target = asymmetric_target(weight, learned, held_out)
    before = lost(weight, x[half:], d[half:], weight)
    after = lost(target, x[half:], d[half:], weight)
    assert after <= before * (1 + 1e-4) + 1e-4


def test_what_is_shrunk_is_stretched_half_of_the_way():
    weight = matrix(3)
    x, d = disturbed(3, size=0.0, gain=0.5)
    target = asymmetric_target(weight, moments(x, d), moments(x, d))
    given = np.asarray(target, float)
    # All of the way, without a ridge, would be twice the matrix.
    expected = 1.5 * np.asarray(weight)
    assert np.square(given - expected).sum() < 0.02 * np.square(expected).sum()


def test_the_matrix_itself_where_there_is_nothing_to_make_up_for():
    """Guards first layers, inputs of zeros, and tokens that say the opposite."""
    weight = matrix(4)
    x, d = disturbed(4)
    zeros = jnp.zeros((2 * INPUTS, 2 * INPUTS))
    for learned, held_out in (
        (moments(x, 0 * d), moments(x, 0 * d)),
        (zeros, zeros),
        (moments(x, d), moments(x, -d)),
    ):
        target = asymmetric_target(weight, learned, held_out)
        np.testing.assert_array_equal(target, weight)
