"""The l1 bound, its value on eigenvectors, and the search for its worst case."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kashin_jax.bases import BasisSpec, make_basis, make_pair
from kashin_jax.bases import dense as dense_eagerly
from kashin_jax.theory import (
    eigenvector_ratios,
    l1_ratio,
    level_from_rate,
    rate_from_constant,
    search_worst_case,
    structured_starts,
)
from tests import problems

GAUSSIAN = np.sqrt(2 / np.pi)
# Few, as each one is compiled.
sizes = st.sampled_from([2, 7, 16])
seeds = st.integers(0, 2**31 - 1)
families = st.sampled_from(["haar", "hadamard", "dct"])


ratio = jax.jit(l1_ratio)
dense = jax.jit(dense_eagerly, static_argnums=1)


def vector(n, seed=0):
    return problems.gaussian(1, n, seed)[0]


def ratio_by_hand(q, x):
    x = np.asarray(x, np.float64)
    largest = max(np.abs(x).sum(), np.abs(np.asarray(q, np.float64).T @ x).sum())
    return largest / np.sqrt(x.size) / np.linalg.norm(x)


@settings(max_examples=15, deadline=None)
@given(families, sizes, seeds, st.floats(-30, 30))
def test_the_l1_ratio_is_the_papers_formula_at_any_scale(family, n, seed, exponent):
    basis = make_basis(family, jax.random.key(seed), n)
    x = vector(n, seed) * np.float32(10**exponent)
    measured = float(ratio(basis, jnp.asarray(x)))
    expected = ratio_by_hand(dense(basis, n), np.asarray(x, np.float64))
    assert measured == pytest.approx(expected, rel=1e-5)
    assert 1 / np.sqrt(n) - 1e-6 <= measured <= 1 + 1e-6


def test_the_l1_ratio_of_a_matrix_is_that_of_the_kronecker_product():
    pair = make_pair(BasisSpec("haar", "haar"), jax.random.key(0), (6, 10))
    x = problems.gaussian(6, 10)
    whole = np.kron(np.asarray(dense(pair.left, 6)), np.asarray(dense(pair.right, 10)))
    expected = ratio_by_hand(whole, x.ravel())
    assert float(ratio(pair, jnp.asarray(x))) == pytest.approx(expected, rel=1e-5)


def test_a_zero_block_has_no_ratio():
    basis = make_basis("haar", jax.random.key(0), 8)
    assert np.isnan(float(ratio(basis, jnp.zeros(8))))


@pytest.mark.parametrize("family", ["haar", "butterfly"])
def test_eigenvector_ratios_are_those_of_eigenvectors(family):
    n = 30
    basis = make_basis(family, jax.random.key(1), n)
    q = np.asarray(dense(basis, n), np.float64)
    found = eigenvector_ratios(basis, n)
    assert found.ratios.shape == (len(found.vectors),)
    assert np.all(np.diff(found.ratios) >= 0)
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1, rtol=1e-9)
    for value, part in zip(found.ratios, found.vectors, strict=True):
        assert value == pytest.approx(ratio_by_hand(q, part), rel=1e-6)
        # Q + Q^T acts on the plane of a conjugate pair as a multiple of the identity.
        turned = (q + q.T) @ part
        np.testing.assert_allclose(turned, (turned @ part) * part, atol=1e-5)


def test_eigenvectors_of_a_rotation_of_two_planes_are_known():
    # [[0, -1], [1, 0]] twice: parts are unit vectors, and Q turns them into others.
    turn = np.kron(np.eye(2), np.array([[0.0, -1], [1, 0]])).astype(np.float32)
    basis = make_basis("haar", jax.random.key(0), 4)._replace(matrix=jnp.asarray(turn))
    found = eigenvector_ratios(basis, 4)
    np.testing.assert_allclose(found.ratios, 0.5, rtol=1e-6)
    assert len(found.ratios) == 4


def test_haar_spreads_its_eigenvectors_and_a_reflection_does_not():
    haar, reflection = (
        eigenvector_ratios(make_basis(family, jax.random.key(0), 128), 128)
        for family in ("haar", "householder")
    )
    assert haar.ratios[0] > 0.7
    assert haar.ratios.mean() == pytest.approx(GAUSSIAN, abs=0.02)
    assert reflection.ratios[0] < 0.2


@pytest.mark.parametrize(
    ("constant", "gamma"), [(GAUSSIAN, 0.6028), (1.0, 0.0), (0.6, 0.8)]
)
def test_rate_and_level_follow_from_the_constant(constant, gamma):
    assert rate_from_constant(constant) == pytest.approx(gamma, abs=1e-4)
    bound = level_from_rate(rate_from_constant(constant))
    assert bound == pytest.approx(1 / (1 - gamma), rel=1e-3)
    assert bound <= 2 / constant**2 + 1e-9
    assert level_from_rate(1.0) == np.inf


search = partial(search_worst_case, steps=200)


@pytest.mark.parametrize(
    "family", ["haar", "butterfly3", pytest.param("sign-dct", marks=pytest.mark.slow)]
)
def test_the_search_returns_a_vector_of_the_ratio_it_reports(family):
    n = 64
    basis = make_basis(family, jax.random.key(3), n)
    starts = jnp.asarray(problems.gaussian(6, n))
    before = [float(ratio(basis, start)) for start in starts]
    found = search(basis, starts)
    by_hand = ratio_by_hand(dense(basis, n), found.x)
    assert float(found.ratio) == pytest.approx(by_hand, rel=1e-5)
    assert float(found.ratio) == pytest.approx(float(found.found.min()), rel=1e-6)
    assert np.all(np.asarray(found.found) < np.array(before) - 0.2)
    assert np.mean(np.square(found.x)) == pytest.approx(1, rel=1e-5)


def test_without_steps_the_starts_are_compared():
    basis = make_basis("haar", jax.random.key(3), 16)
    starts = jnp.asarray(problems.gaussian(5, 16))
    found = search_worst_case(basis, starts, steps=0)
    expected = [ratio_by_hand(dense(basis, 16), start) for start in starts]
    np.testing.assert_allclose(found.found, expected, rtol=1e-5)


def test_a_start_that_is_zero_does_not_count():
    basis = make_basis("haar", jax.random.key(3), 16)
    starts = problems.gaussian(3, 16)
    starts[1] = 0
    found = search(basis, jnp.asarray(starts))
    assert np.isnan(np.asarray(found.found)).tolist() == [False, True, False]
    assert 0.25 <= float(found.ratio) < 0.6


def test_no_start_ends_in_the_zero_vector():
    # Of a comb the gradient is along the comb itself, up to rounding.
    basis = make_basis("hadamard", jax.random.key(0), 64)
    found = search(basis, structured_starts(basis, n=64, count=4))
    assert float(found.ratio) == pytest.approx(64**-0.25, rel=1e-5)


@settings(max_examples=8, deadline=None)
@given(seeds)
def test_in_the_plane_the_search_finds_the_minimum_of_a_fine_grid(seed):
    basis = make_basis("haar", jax.random.key(seed), 2)
    angles = np.linspace(0, np.pi, 20001)
    circle = np.stack([np.cos(angles), np.sin(angles)])
    q = np.asarray(dense(basis, 2), np.float64)
    least = np.maximum(np.abs(circle).sum(0), np.abs(q.T @ circle).sum(0)).min()
    starts = jnp.asarray(circle.T[:: 20000 // 8], jnp.float32)
    found = search_worst_case(basis, starts, steps=200)
    assert float(found.ratio) == pytest.approx(least / np.sqrt(2), abs=2e-3)


@pytest.mark.parametrize("n", [16, 64, 256])
def test_randomised_hadamard_has_no_dimension_free_constant(n):
    basis = make_basis("hadamard", jax.random.key(n), n)
    starts = structured_starts(basis, n=n, count=2)
    assert float(search_worst_case(basis, starts, steps=0).ratio) == pytest.approx(
        n**-0.25, rel=1e-5
    )


def test_the_bound_of_a_haar_basis_stays_while_n_grows():
    found = []
    for n in (32, 256):
        basis = make_basis("haar", jax.random.key(n), n)
        draws = jnp.asarray(problems.gaussian(4, n))
        starts = [draws, structured_starts(basis, n=n, count=2)]
        found.append(float(search(basis, jnp.concatenate(starts)).ratio))
    assert 0.35 < min(found) <= max(found) < 0.5


def test_a_pair_of_peaks_has_the_ratio_one_over_root_pi():
    n = 4096
    basis = make_basis("sign-dct", jax.random.key(0), n)
    pairs = structured_starts(basis, n=n, count=4)[:4]
    found = np.asarray(search_worst_case(basis, pairs, steps=0).found)
    np.testing.assert_allclose(found, 1 / np.sqrt(np.pi), atol=0.02)


def test_the_search_refuses_a_negative_number_of_steps():
    basis = make_basis("haar", jax.random.key(0), 4)
    with pytest.raises(ValueError, match="`steps` must be at least 0. Got -1"):
        search_worst_case(basis, jnp.ones((1, 4)), steps=-1)


# The other families have been seen above.
@pytest.mark.parametrize("family", ["identity", "householder8", "givens"])
def test_weak_families_have_ratios_and_a_search_too(family):
    n = 12
    basis = make_basis(family, jax.random.key(0), n)
    least = 1 / np.sqrt(n) - 1e-6
    assert least <= eigenvector_ratios(basis, n).ratios[0] <= 1
    starts = structured_starts(basis, n=n, count=2)
    found = search_worst_case(basis, starts, steps=20)
    assert least <= float(found.ratio) <= 1
