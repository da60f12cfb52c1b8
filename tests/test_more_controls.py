"""HQQ, rotated round-to-nearest and k-means per channel, against plain NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans as SklearnKMeans

from kashin_jax import (
    HQQ,
    RTN,
    BasisSpec,
    ChannelKMeans,
    KMeans,
    Rotated,
    dequantize,
    encode,
    quantize,
    stored_bits,
)
from kashin_jax.bases import key_from_seed, make_pair
from kashin_jax.errors import NonFiniteError
from kashin_jax.methods.hqq import hqq_code
from kashin_jax.methods.rtn import rtn_code
from kashin_jax.tensors.grouped import group_rows
from tests import problems

KEY = jax.random.key(5)
NEW = [HQQ(), Rotated(RTN(group_size=64)), ChannelKMeans(num_restarts=1)]
WIDE = BasisSpec.parse("haar:sign-dct")


def weight(shape, seed=0):
    # Student's t: heavy tails, as trained weights have. NumPy's needs no compiling.
    drawn = np.random.default_rng(seed).standard_t(3, shape)
    return jnp.asarray(drawn, jnp.float32)


def unpack(packed, bits, count):
    stream = np.unpackbits(np.asarray(packed), bitorder="little")
    return stream[: count * bits].reshape(count, bits) @ (1 << np.arange(bits))


def codes_of(q):
    return unpack(q.packed_codes, q.layout.bits, math.prod(q.shape)).reshape(q.shape)


def by_row(per_group, rows, size):
    grown = np.repeat(np.asarray(per_group, np.float64)[:, 0, :], size, axis=0)
    return grown[:rows]


def relative(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@jax.jit
def images(side, unit):
    return side.synthesis(unit, axis=0)


def rotate_by_hand(q, x):
    m, n = q.shape
    pair = make_pair(q.layout.basis, key_from_seed(q.seed), q.shape)
    left = np.asarray(images(pair.left, jnp.eye(m)), np.float64)
    right = np.asarray(images(pair.right, jnp.eye(n)), np.float64)
    return left @ x @ right.T


@jax.jit
def decode_affine(code):
    return code.scale * (code.codes.astype(jnp.float32) - code.zero)


def hqq_by_hand(x, bits, size):
    """Codes, steps and zero points in float64, from the paper; missing rows are NaN."""
    top = 2**bits - 1
    x = np.asarray(x, np.float64)
    groups = np.pad(x, ((0, -len(x) % size), (0, 0)), constant_values=np.nan)
    groups = groups.reshape(-1, size, x.shape[1])
    low, high = (f(groups, axis=1, keepdims=True) for f in (np.nanmin, np.nanmax))
    step = ((high - low) / top).astype(np.float16).astype(np.float64)

    def encoded(zero):
        return np.clip(np.rint(groups / step + zero), 0, top)

    met = []
    for zero in (-low / step, np.rint(-low / step)):
        beta, error = 10.0, np.inf
        for _ in range(20):
            codes = encoded(zero)
            lost = groups - step * (codes - zero)
            before, error = error, np.nanmean(np.abs(lost))
            met.append((error, zero))
            if error >= before:
                break
            # |e| - |e|^(p - 1) / beta is positive from here on.
            large = np.abs(lost) > beta ** (-1 / 1.3)
            size_of = np.where(large, np.abs(lost), 1)
            shrunk = np.sign(lost) * (size_of - size_of**-0.3 / beta)
            fitted = groups - np.where(large, shrunk, 0)
            zero = np.nanmean(codes - fitted / step, axis=1, keepdims=True)
            beta *= 1.01
    zero = min(met, key=lambda pair: pair[0])[1].astype(np.float16).astype(np.float64)
    return encoded(zero), step, zero


@pytest.mark.parametrize("size", [1.0, 0.02])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", ["gaussian", "student_t", "outlier_columns"])
def test_hqq_is_never_worse_than_round_to_nearest_in_the_same_groups(name, bits, size):
    x = jnp.asarray(problems.ALL[name](256, 96) * np.float32(size))
    groups = jax.jit(group_rows, static_argnums=1)(x, 64)
    nearest = np.abs(groups - decode_affine(rtn_code(groups, bits)))
    fitted = np.abs(groups - decode_affine(hqq_code(x, bits=bits, group_size=64)))
    for power in (0.7, 1.0):
        assert np.mean(fitted**power) < np.mean(nearest**power)


@pytest.mark.parametrize("size", [1.0, 0.02])
@pytest.mark.parametrize(("rows", "bits"), [(64, 2), (64, 3), (70, 4)])
def test_hqq_agrees_with_its_solver_written_in_numpy(rows, bits, size):
    x = weight((rows, 6), bits) * size
    code = hqq_code(x, bits=bits, group_size=32)
    codes, step, zero = hqq_by_hand(x, bits, 32)
    np.testing.assert_array_equal(code.scale, step)
    # One unit in the last place of fp16.
    np.testing.assert_allclose(code.zero, zero, rtol=2e-3, atol=1e-3)
    found, expected = (part.reshape(-1, 6)[:rows] for part in (code.codes, codes))
    assert np.mean(np.asarray(found) == expected) > 0.99
    assert not np.array_equal(zero, np.rint(zero))


@pytest.mark.parametrize(("rows", "bits"), [(128, 4), (200, 3)])
def test_hqq_stores_and_decodes_groups_of_64(rows, bits):
    w = weight((rows, 6))
    q, report = quantize(w, HQQ(bits=bits), KEY)
    assert q.scale.dtype == q.zero.dtype == jnp.float16
    zero, step = (by_row(part, rows, 64) for part in (q.zero, q.scale))
    by_hand = step * (codes_of(q) - zero)
    assert relative(dequantize(q), by_hand) < 1e-6
    assert relative(jax.jit(dequantize)(q), by_hand) < 1e-6
    groups = math.ceil(rows / 64) * 6
    assert stored_bits(q) == math.ceil(rows * 6 * bits / 8) * 8 + 32 * groups
    error = relative(by_hand, w) ** 2
    np.testing.assert_allclose(report.relative_squared_error, error, rtol=1e-4)


@pytest.mark.parametrize(("shape", "basis"), [((128, 24), None), ((70, 15), WIDE)])
def test_rotated_round_to_nearest_decodes_as_in_numpy(shape, basis):
    inner = RTN(bits=3, group_size=64)
    config = Rotated(inner) if basis is None else Rotated(inner, basis)
    q, report = quantize(weight(shape), config, KEY)
    groups = q.scale.size
    zero = unpack(q.zero, 3, groups).reshape(q.scale.shape)
    step = by_row(q.scale, shape[0], 64)
    by_hand = rotate_by_hand(q, step * (codes_of(q) - by_row(zero, shape[0], 64)))
    assert relative(dequantize(q), by_hand) < 2e-6
    assert relative(jax.jit(dequantize)(q), by_hand) < 2e-6
    assert groups == math.ceil(shape[0] / 64) * shape[1]
    codes, zeros = (math.ceil(3 * n / 8) * 8 for n in (math.prod(shape), groups))
    assert stored_bits(q) == codes + zeros + 16 * groups + 64
    error = relative(by_hand, weight(shape)) ** 2
    np.testing.assert_allclose(report.relative_squared_error, error, rtol=1e-4)


@pytest.mark.parametrize("group_size", [64, None])
def test_rotated_round_to_nearest_is_that_of_the_rotated_matrix(group_size):
    w = weight((128, 24))
    q, _ = quantize(w, Rotated(RTN(bits=3, group_size=group_size)), KEY)
    pair = make_pair(q.layout.basis, key_from_seed(q.seed), q.shape)
    config = RTN(bits=3, group_size=group_size)
    plain, _ = quantize(jax.jit(lambda p, x: p.analysis(x))(pair, w), config, KEY)
    assert plain.seed is None
    for name in ("packed_codes", "scale", "zero"):
        np.testing.assert_array_equal(getattr(q, name), getattr(plain, name))


def test_both_rotated_controls_have_the_rotation_of_the_seed():
    w = weight((16, 24))
    rounded, _ = quantize(w, Rotated(RTN(group_size=64)), KEY)
    clustered, _ = quantize(w, Rotated(KMeans(bits=1, num_restarts=1)), KEY)
    assert np.array_equal(rounded.seed, clustered.seed)
    assert rounded.layout.basis == clustered.layout.basis


@pytest.mark.parametrize(("shape", "bits"), [((96, 24), 4), ((41, 7), 2)])
def test_k_means_per_channel_decodes_as_in_numpy(shape, bits):
    w = weight(shape)
    q, report = quantize(w, ChannelKMeans(bits=bits, num_restarts=1), KEY)
    assert q.levels.dtype == jnp.float16 and q.levels.shape == (2**bits, shape[1])
    levels = np.asarray(q.levels, np.float64) * float(q.scale[0, 0, 0])
    by_hand = np.take_along_axis(levels, codes_of(q), axis=0)
    assert relative(dequantize(q), by_hand) < 1e-6
    assert relative(jax.jit(dequantize)(q), by_hand) < 1e-6
    codes = math.ceil(math.prod(shape) * bits / 8) * 8
    assert stored_bits(q) == codes + 16 * 2**bits * shape[1] + 32
    error = relative(by_hand, w) ** 2
    np.testing.assert_allclose(report.relative_squared_error, error, rtol=1e-4)
    # Every weight has the level of its own channel that is nearest.
    gaps = np.abs(np.asarray(w, np.float64)[:, None] - levels[None])
    chosen = np.abs(np.asarray(w, np.float64) - by_hand)
    np.testing.assert_allclose(chosen, gaps.min(axis=1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "bits", [3, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (2, 4))]
)
def test_every_channel_is_clustered_as_well_as_by_scikit_learn(bits):
    w = jax.random.t(jax.random.key(bits), 3.0, (512, 5), jnp.float32)
    q, _ = quantize(w, ChannelKMeans(bits=bits), KEY)
    lost = np.sum(np.square(np.asarray(w - dequantize(q), np.float64)), axis=0)
    for j, column in enumerate(np.asarray(w, np.float64).T):
        fitted = SklearnKMeans(2**bits, n_init=10, random_state=0).fit(column[:, None])
        assert lost[j] < 1.02 * fitted.inertia_


def test_channels_of_different_size_lose_the_same_share():
    column = weight((256, 1))
    powers = np.exp2(np.arange(-6, 7)).astype(np.float32)
    q, _ = quantize(column * powers[None, :], ChannelKMeans(bits=3), KEY)
    lost = np.linalg.norm(dequantize(q) / powers[None, :] - column, axis=0)
    assert lost.max() < 1.05 * lost.min()


@pytest.mark.parametrize("config", NEW, ids=str)
def test_zero_matrices_are_stored_exactly(config):
    q, report = quantize(jnp.zeros((96, 24)), config, KEY)
    assert report.relative_squared_error == 0
    assert not dequantize(q).any()


@pytest.mark.parametrize("value", [-0.37, 1e4, -3e-3, 1e-6])
@pytest.mark.parametrize("config", [NEW[0], NEW[2]], ids=str)
def test_constant_groups_keep_their_value(config, value):
    w = np.array(weight((192, 24))) * np.float32(abs(value))
    w[64:128], w[:, 3] = value, value
    q, _ = quantize(w, config, KEY)
    found = dequantize(q)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[:, 3], value, rtol=0.03)
    if isinstance(config, HQQ):
        np.testing.assert_allclose(found[64:128], value, rtol=1e-3, atol=3e-8)


def test_nearly_equal_entries_far_from_zero_stay_near_them_under_hqq():
    w = 1000 + 1e-3 * weight((64, 4))
    q, _ = quantize(w, HQQ(), KEY)
    assert np.abs(dequantize(q) - w).max() < 0.5


@pytest.mark.parametrize("config", NEW, ids=str)
@pytest.mark.parametrize("size", [3e4, 1e-4])
def test_large_and_small_weights_keep_their_relative_error(config, size):
    w = jnp.clip(weight((96, 24)), -8, 8)
    _, report = quantize(w, config, KEY)
    q, scaled = quantize(w * size, config, KEY)
    assert np.isfinite(dequantize(q)).all()
    assert scaled.relative_squared_error < 1.3 * report.relative_squared_error


def test_weights_that_leave_half_precision_are_refused_or_kept():
    w = weight((96, 24)) * 1e30
    for config in NEW[:2]:
        with pytest.raises(NonFiniteError, match=r"`fc1` reaches \S+e\+3\d.* Rescale"):
            quantize(w, config, KEY, path="fc1")
    _, report = quantize(w, NEW[2], KEY)
    assert report.relative_squared_error < 0.02


@pytest.mark.slow  # `test_quantized.py` asks it of the other methods
@pytest.mark.parametrize("config", NEW, ids=str)
def test_jit_gives_the_same_bytes_and_vmap_the_same_matrices(config):
    batch = jnp.stack([weight((96, 24)), 0.02 * weight((96, 24), 1)])
    keys = jax.random.split(KEY)
    alone = [encode(w, key, config)[0] for w, key in zip(batch, keys, strict=True)]
    jitted, _ = jax.jit(lambda w, key: encode(w, key, config))(batch[0], keys[0])
    assert jitted.layout == alone[0].layout
    assert np.mean(codes_of(jitted) == codes_of(alone[0])) > 0.999
    stacked, _ = jax.vmap(lambda w, key: encode(w, key, config))(batch, keys)
    together = jax.vmap(dequantize)(stacked)
    for found, q in zip(together, alone, strict=True):
        assert relative(found, dequantize(q)) < 0.01


def test_half_precision_weights_are_quantized_as_their_float32_values():
    for config in NEW:
        w = weight((96, 24)).astype(jnp.bfloat16)
        q, _ = quantize(w, config, KEY)
        single, _ = quantize(w.astype(jnp.float32), config, KEY)
        assert np.array_equal(q.packed_codes, single.packed_codes)
        assert dequantize(q).dtype == jnp.bfloat16


@pytest.mark.parametrize("config", [HQQ, RTN])
def test_groups_have_at_least_one_row(config):
    with pytest.raises(ValueError, match=r"`group_size` must be at least 1. Got 0"):
        config(group_size=0)


@pytest.mark.parametrize("config", [HQQ, RTN, ChannelKMeans])
def test_bits_lie_between_one_and_eight(config):
    with pytest.raises(ValueError, match=r"`bits` must lie in \[1, 8\].*bits=9"):
        config(bits=9)
    q, _ = quantize(weight((16, 8)), config(bits=8), KEY)
    assert relative(dequantize(q), weight((16, 8))) < 0.02
