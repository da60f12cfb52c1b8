"""Scales of inputs that several matrices have in common."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kashin_jax import RTN, JointKashin, quantize
from kashin_jax.methods.joint.scales import common_input_scale

KEY = jax.random.key(0)
CONFIG = JointKashin(effort="fast")


@pytest.fixture
def kernel():
    return jax.random.normal(jax.random.key(5), (64, 96))


def test_the_common_scale_is_the_geometric_mean_of_those_alone():
    kernels, alone = [], []
    for i, n in enumerate((96, 48, 8)):
        noise = np.asarray(jax.random.normal(jax.random.key(i), (64, n)), np.float64)
        spread = np.asarray(jax.random.normal(jax.random.key(i + 9), (64, 1)))
        kernels.append(np.exp(spread) * noise)
        columns = np.sqrt(np.mean(kernels[-1] ** 2, axis=0))
        alone.append(np.sqrt(np.mean((kernels[-1] / columns) ** 2, axis=1)))
    for balance in (1.0, 0.5):
        relative = [rms**balance / np.mean(rms**balance) for rms in alone]
        expected = np.exp(np.mean(np.log(relative), axis=0))
        # A whole kernel in other units changes nothing, were it beyond float32 squared.
        for factors in ((1, 1, 1), (1, 1e30, 1e-20)):
            scaled = (
                jnp.asarray(f * kernel, jnp.float32)
                for f, kernel in zip(factors, kernels, strict=True)
            )
            found = common_input_scale(scaled, balance)
            assert found.dtype == jnp.float16
            np.testing.assert_allclose(found, expected, rtol=2e-3)


def test_a_scale_of_zeros_is_one():
    zeros = [jnp.zeros((8, 4)), jnp.zeros((8, 2))]
    np.testing.assert_array_equal(common_input_scale(zeros, 1.0), np.ones(8))


def test_equal_kernels_have_the_scale_that_each_has_alone(kernel):
    alone, _ = quantize(kernel, CONFIG, KEY)
    found = common_input_scale([kernel, 2 * kernel], CONFIG.balance)
    np.testing.assert_array_equal(found, alone.in_scale)


@pytest.mark.parametrize(
    ("in_scale", "config", "named"),
    [
        (np.ones(63), CONFIG, "`in_scale` has shape"),
        (np.zeros(64), CONFIG, "must be finite and positive"),
        (np.full(64, 1e6), CONFIG, "must be finite and positive"),
        (np.ones(64), RTN(), "RTN has no use for `in_scale`"),
    ],
)
def test_scales_that_cannot_be_used_are_refused(kernel, in_scale, config, named):
    with pytest.raises((TypeError, ValueError), match=named):
        quantize(kernel, config, KEY, in_scale=in_scale)


def test_importance_and_a_scale_cannot_both_be_given(kernel):
    ones = np.ones(64)
    with pytest.raises(ValueError, match="not both"):
        quantize(kernel, CONFIG, KEY, importance=ones, in_scale=ones)
