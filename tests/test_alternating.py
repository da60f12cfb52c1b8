"""The follow-up's method against an oracle in NumPy, and at its edges."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

from kashin_jax import AlternatingKashin, Rotated, encode, quantize
from kashin_jax.errors import NonFiniteError, UsageError
from kashin_jax.methods import output_loss
from kashin_jax.theory import solve_alternating
from tests import problems

KEY = jax.random.key(5)


def weight(shape, seed=0):
    return jnp.asarray(problems.student_t(*shape, seed), jnp.float32)


def relative(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def mixed(z, signs):
    """P z = IDCT(signs . DCT(z)) along the last axis."""
    return scipy.fft.idct(signs * scipy.fft.dct(z, norm="ortho"), norm="ortho")


def steps_by_hand(x, signs, schedule, rounds):
    """Steps u, u, ..., v, v, ... of the paper, with all their sizes, in float64."""
    left, factors, sizes = np.array(x, np.float64), [0 * x, 0 * x], ([], [])
    for _ in range(rounds):
        for side in (0, 1):
            for _ in range(schedule[side]):
                along = mixed(left, signs) if side else left
                size = np.abs(along).mean()
                sizes[side].append(size)
                step = size * np.sign(along)
                factors[side] = factors[side] + step
                left = left - (mixed(step, signs) if side else step)
    return factors, sizes


def nearest_of_few(factor, sizes, lloyd_steps):
    """Levels from the sums of the first steps, refined symmetrically; the values."""
    sums = [
        sum(np.array(s) * sizes) for s in itertools.product((-1, 1), repeat=len(sizes))
    ]
    levels = np.sort(sums)[len(sums) // 2 :]
    size = np.abs(factor)
    for _ in range(lloyd_steps):
        own = np.abs(size[:, None] - levels).argmin(axis=1)
        levels = np.array([size[own == k].mean() for k in range(len(levels))])
    own = np.abs(size[:, None] - levels).argmin(axis=1)
    return np.where(factor >= 0, levels[own], -levels[own]), levels


@pytest.mark.parametrize(
    ("bits", "axis", "shape"), [(4, 0, (61, 5)), (3, 1, (4, 48)), (2, 0, (32, 6))]
)
def test_vectors_are_coded_as_the_paper_says(bits, axis, shape):
    """Guards order, signs and sizes of the steps, the centres and the refinement."""
    config = AlternatingKashin(bits=bits, axis=axis, rounds=2, lloyd_steps=2)
    w = weight(shape)
    tensor, _ = encode(w, KEY, config)
    signs = np.asarray(tensor.derive_bases().basis[axis].signs, np.float64)
    assert set(signs) == {-1.0, 1.0}
    schedule = bits - bits // 2, bits // 2
    expected, vectors = [], np.asarray(w, np.float64)
    for i, x in enumerate(vectors if axis else vectors.T):
        (u, v), sizes = steps_by_hand(x, signs, schedule, 2)
        u, u_levels = nearest_of_few(u, sizes[0][: schedule[0]], 2)
        v, v_levels = nearest_of_few(v, sizes[1][: schedule[1]], 2)
        np.testing.assert_allclose(tensor.u_levels[:, i], u_levels, rtol=2e-3)
        np.testing.assert_allclose(tensor.v_levels[:, i], v_levels, rtol=2e-3)
        expected.append(u + mixed(v, signs))
    expected = np.array(expected) if axis else np.array(expected).T
    assert relative(tensor.decode(), expected) < 2e-3


@pytest.mark.slow
def test_one_round_without_refinement_is_the_decomposition_itself():
    """Guards the closed form: after u, u, v, v the levels are exact but for fp16."""
    w = weight((96, 3))
    config = AlternatingKashin(rounds=1, lloyd_steps=0)
    tensor, report = encode(w, KEY, config)
    basis = tensor.derive_bases().basis.left
    for i in range(3):
        found = solve_alternating(w[:, i], basis, rtol=1e-6, max_steps=4).solution
        kept = found.scale * (found.u + basis.synthesis(found.v))
        assert relative(tensor.decode()[:, i], kept) < 1e-3
    refined = encode(w, KEY, AlternatingKashin())[1].relative_squared_error
    assert float(refined) < float(report.relative_squared_error)


@pytest.mark.parametrize("axis", [0, 1])
def test_four_bits_take_four_halves_for_a_vector(axis):
    tensor, _ = encode(weight((48, 40)), KEY, AlternatingKashin(axis=axis))
    length = (48, 40)[axis]
    assert tensor.bits_per_weight == pytest.approx(4 + 64 / length + 64 / (48 * 40))
    sizes = np.asarray(tensor.u_levels), np.asarray(tensor.v_levels)
    assert all((s >= 0).all() and (np.diff(s, axis=0) >= 0).all() for s in sizes)
    assert ("output", "input")[axis] in repr(tensor)


@pytest.mark.slow
def test_error_falls_by_the_rate_of_a_sign_step_for_each_bit():
    """sqrt(1 - 2 / pi) for a step and a Gaussian vector: .363 of the energy."""
    w = jnp.asarray(problems.gaussian(512, 8))
    errors = [
        float(encode(w, KEY, AlternatingKashin(bits=b))[1].relative_squared_error)
        for b in (2, 3, 4)
    ]
    np.testing.assert_allclose(errors, [0.363**b for b in (2, 3, 4)], rtol=0.1)


@pytest.mark.parametrize("axis", [0, 1])
def test_hard_vectors_and_prime_lengths_are_coded(axis):
    vectors = np.array(weight((11, 37)))
    vectors[3], vectors[5], vectors[7, 2] = 0.0, -3.0, 4e4
    tensor, report = quantize(
        jnp.asarray(vectors if axis else vectors.T), AlternatingKashin(axis=axis), KEY
    )
    decoded = np.asarray(tensor.decode() if axis else tensor.decode().T)
    assert float(report.relative_squared_error) < 0.05
    # Zeros have no size at all, and a constant vector is one sign step.
    assert not decoded[3].any() and np.abs(decoded[5] + 3).max() < 2e-3
    assert relative(decoded[8], vectors[8]) < 0.3


@pytest.mark.slow
def test_a_stack_is_coded_as_its_matrices_and_types_do_not_matter():
    """Guards `vmap` over experts, `jit`, and bfloat16 weights."""
    stack = jnp.stack([weight((24, 10), seed) for seed in (1, 2)]).astype(jnp.bfloat16)
    keys = jax.random.split(KEY, 2)
    config = AlternatingKashin(bits=3)
    found = jax.jit(jax.vmap(lambda w, k: encode(w, k, config)[0]))(stack, keys)
    for i in range(2):
        alone = encode(stack[i].astype(jnp.float32), keys[i], config)[0]
        np.testing.assert_array_equal(found.packed_codes[i], alone.packed_codes)
        np.testing.assert_array_equal(found.u_levels[i], alone.u_levels)
    assert found.dtype == jnp.bfloat16 and found.full_shape == (2, 24, 10)


@pytest.mark.parametrize(
    "config",
    [
        AlternatingKashin(axis=1),
        pytest.param(Rotated(AlternatingKashin(axis=1)), marks=pytest.mark.slow),
    ],
)
def test_moments_of_the_identity_give_the_codes_without_data(config):
    """Guards targets: with nothing to feed on, each row is coded as it is."""
    w = weight((40, 24))
    free = encode(w, KEY, config)[0]
    fed = config.with_feedback(w, free, 3.0 * jnp.eye(40))
    assert jax.tree.structure(fed) == jax.tree.structure(free)
    # Two programs round differently, and a sign hangs on it here and there.
    assert np.mean(fed.packed_codes == free.packed_codes) > 0.98
    np.testing.assert_array_equal(fed.seed, free.seed)


def test_feedback_is_that_of_rows_coded_by_hand():
    """Guards the levels of a row: those of its target, not of the row itself."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((30, 6)) @ rng.standard_normal((6, 6))
    moments, w = jnp.asarray(x.T @ x / 30, jnp.float32), weight((6, 32))
    config = AlternatingKashin(axis=1)
    free = encode(w, KEY, config)[0]
    fed = config.with_feedback(w, free, moments)
    signs = np.asarray(free.derive_bases().basis.right.signs, np.float64)
    upper = np.linalg.cholesky(np.linalg.inv(np.asarray(moments, np.float64))).T
    left, expected = np.array(w, np.float64), []
    for i in range(6):
        (u, v), sizes = steps_by_hand(left[i], signs, (2, 2), config.rounds)
        u, _ = nearest_of_few(u, sizes[0][:2], config.lloyd_steps)
        v, _ = nearest_of_few(v, sizes[1][:2], config.lloyd_steps)
        expected.append(u + mixed(v, signs))
        error = (left[i] - expected[i]) / upper[i, i]
        left[i:] -= np.outer(upper[i, i:], error)
    # The first rows agree; later ones follow targets that rounding has moved.
    assert relative(fed.decode()[:2], expected[:2]) < 0.02
    losses = [float(output_loss(w, moments, each)) for each in (fed, free)]
    assert losses[0] < 0.7 * losses[1]


def test_what_cannot_be_is_refused_and_says_what_can():
    for bits in (1, 9):
        with pytest.raises(ValueError, match=f"exists at 2 to 8 whole bits.*{bits}"):
            AlternatingKashin(bits=bits)
    with pytest.raises(ValueError, match="`axis` must be 0 or 1. Got 2"):
        AlternatingKashin(axis=2)
    with pytest.raises(ValueError, match="`rounds` must be at least 1. Got 0"):
        AlternatingKashin(rounds=0)
    with pytest.raises(ValueError, match="`lloyd_steps` must be at least 0. Got -1"):
        AlternatingKashin(lloyd_steps=-1)
    w, config = weight((8, 8)), AlternatingKashin()
    with pytest.raises(ValueError, match="take `axis=1`"):
        config.with_feedback(w, encode(w, KEY, config)[0], jnp.eye(8))
    assert config.for_feedback() == AlternatingKashin(axis=1)
    rotated = Rotated(config).for_feedback()
    assert rotated.inner.axis == 1 and rotated.takes_feedback
    with pytest.raises(NonFiniteError, match="too large for what AlternatingKashin"):
        quantize(w * 1e9, config)
    with pytest.raises(UsageError, match="scales of AlternatingKashin"):
        quantize(w * 1e-12, config)
