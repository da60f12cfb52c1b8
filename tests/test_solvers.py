"""Rival solvers on the frame [I, Q], against linear programming and their papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from kashin_jax.bases import BasisSpec, make_basis, make_pair
from kashin_jax.bases import dense as dense_eagerly
from kashin_jax.theory import (
    SOLVERS,
    compare_solvers,
    solve_alternating,
    solve_minimax,
    solve_truncation,
)
from tests import problems

seeds = st.integers(0, 2**31 - 1)
LIMITS = {"rtol": 1e-5, "max_steps": 200}
synthesis = jax.jit(lambda basis, v: basis.synthesis(v))
dense = jax.jit(dense_eagerly, static_argnums=1)


def vector(n, seed=0):
    return problems.gaussian(1, n, seed)[0]


def haar(n, seed=0):
    return make_basis("haar", jax.random.key(seed), n)


def least_level(q, x):
    """Min max(|u|, |v|) with u + q v = x, by linear programming in float64."""
    n = len(x)
    cost = np.r_[np.zeros(2 * n), 1]
    below = np.block([np.eye(2 * n), -np.ones((2 * n, 1))])
    above = np.block([-np.eye(2 * n), -np.ones((2 * n, 1))])
    exact = np.block([np.eye(n), q, np.zeros((n, 1))])
    result = scipy.optimize.linprog(
        cost, np.r_[below, above], np.zeros(4 * n), exact, x, bounds=(None, None)
    )
    assert result.success
    return result.fun


def remainder(x, basis, solution):
    """What the factors miss, relative to the block, in float64."""
    x = np.asarray(x, np.float64)
    mixed = np.asarray(synthesis(basis, solution.v), np.float64)
    missed = x - float(solution.scale) * (np.asarray(solution.u, np.float64) + mixed)
    return np.linalg.norm(missed) / np.linalg.norm(x)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["gaussian", "student_t", "huge", "tiny"])
def test_every_solver_reports_its_true_residual_and_level(solver, name):
    x, basis = jnp.asarray(problems.ALL[name](1, 64)[0]), haar(64)
    solution = SOLVERS[solver](x, basis, **LIMITS)
    missed = remainder(x, basis, solution)
    assert float(solution.residual) == pytest.approx(missed, rel=0.05, abs=3e-7)
    assert missed < 1.05e-5
    assert solution.converged
    largest = max(np.abs(solution.u).max(), np.abs(solution.v).max())
    assert float(solution.level) == pytest.approx(largest)
    # No factors of unit mean square have a smaller one.
    assert 0.5 < float(solution.level) < 3
    assert 1 <= int(solution.num_steps) <= 200


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_zero_block_has_zero_factors(solver):
    solution = SOLVERS[solver](jnp.zeros(64), haar(64), **LIMITS)
    assert solution.converged
    assert int(solution.num_steps) == 0
    assert float(solution.level) == float(solution.scale) == 0.0
    assert float(solution.residual) == 0.0


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_takes_matrices_and_kronecker_pairs(solver):
    basis = make_pair(BasisSpec("haar", "hadamard"), jax.random.key(0), (12, 20))
    x = jnp.asarray(problems.gaussian(12, 20))
    solution = SOLVERS[solver](x, basis, **LIMITS)
    assert solution.u.shape == solution.v.shape == (12, 20)
    assert remainder(x, basis, solution) < 1.05e-5


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_batch_agrees_with_single_blocks(solver):
    xs, basis = jnp.asarray(problems.student_t(3, 64)), haar(64)
    batch = jax.jit(jax.vmap(lambda x: SOLVERS[solver](x, basis, **LIMITS)))(xs)
    for i, x in enumerate(xs):
        single = SOLVERS[solver](x, basis, **LIMITS)
        assert float(batch.level[i]) == pytest.approx(float(single.level), rel=0.02)
        assert bool(batch.converged[i]) == bool(single.converged)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_block_never_counts_as_converged(solver, bad):
    x = vector(64)
    x[3] = bad
    assert not SOLVERS[solver](jnp.asarray(x), haar(64), **LIMITS).converged


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_that_runs_out_of_steps_says_so(solver):
    basis = make_basis("identity", jax.random.key(0), 64)
    x = np.zeros(64, np.float32)
    x[[0, 1, 5]] = 1, 0.3, -0.1
    x = jnp.asarray(x)
    solution = SOLVERS[solver](x, basis, rtol=1e-6, max_steps=4)
    assert bool(solution.converged) == (solver == "minimax")
    assert remainder(x, basis, solution) == pytest.approx(
        float(solution.residual), rel=1e-3, abs=3e-7
    )


@settings(max_examples=12, deadline=None)
@given(seeds, st.sampled_from(["haar", "hadamard", "dct", "identity"]))
def test_minimax_is_the_optimum_of_the_linear_programme(seed, family):
    n = 12
    basis = make_basis(family, jax.random.key(seed % 1000), n)
    x = vector(n, seed)
    found = solve_minimax(jnp.asarray(x), basis, rtol=1e-3, max_steps=5000)
    rms = np.sqrt(np.mean(np.square(x, dtype=np.float64)))
    exact = least_level(np.asarray(dense(basis, n), np.float64), x / rms)
    assert found.solution.converged
    assert float(found.lower_bound) <= exact * (1 + 1e-5)
    assert exact * (1 - 1e-5) <= float(found.solution.level) <= exact * 1.0011


def test_a_sparse_block_is_split_to_the_optimum_too():
    n, x = 16, np.eye(16, dtype=np.float32)[3] * 4
    found = solve_minimax(jnp.asarray(x), haar(n), rtol=1e-3, max_steps=5000)
    exact = least_level(np.asarray(dense(haar(n), n), np.float64), x.astype(float))
    assert float(found.solution.level) == pytest.approx(exact, rel=1.1e-3)


def test_with_the_identity_the_optimum_is_half_of_the_largest_entry():
    x = jnp.asarray(vector(64))
    basis = make_basis("identity", jax.random.key(0), 64)
    found = solve_minimax(x, basis, rtol=1e-4, max_steps=1000)
    level = float(found.solution.level * found.solution.scale)
    assert level == pytest.approx(float(jnp.max(jnp.abs(x))) / 2, rel=1e-4)


def test_the_bound_holds_however_few_steps_are_taken():
    x, basis = jnp.asarray(vector(64)), haar(64)
    best = solve_minimax(x, basis, rtol=1e-3, max_steps=3000).solution.level
    levels = []
    for steps in (10, 200):
        found = solve_minimax(x, basis, rtol=1e-9, max_steps=steps)
        assert float(found.lower_bound) <= float(best) * (1 + 1e-5)
        assert float(found.solution.level) >= float(best) * (1 - 1.1e-3)
        assert not found.solution.converged
        assert int(found.solution.num_steps) == steps
        levels.append(float(found.solution.level))
    assert levels == sorted(levels, reverse=True)


@pytest.mark.parametrize("solver", ["greedy", "alternating", "truncation"])
def test_no_solver_has_a_level_below_the_minimax_bound(solver):
    x, basis = jnp.asarray(problems.student_t(1, 64)[0]), haar(64)
    bound = solve_minimax(x, basis, rtol=1e-3, max_steps=3000).lower_bound
    assert float(SOLVERS[solver](x, basis, **LIMITS).level) > float(bound)


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_one_round_leaves_both_factors_on_their_centres(seed):
    x, basis = jnp.asarray(vector(48, seed)), haar(48)
    found = solve_alternating(x, basis, rtol=1e-6, max_steps=4)
    for factor, centres in (
        (found.solution.u, found.u_centres),
        (found.solution.v, found.v_centres),
    ):
        gaps = jnp.abs(factor[:, None] - centres[None, :])
        assert float(jnp.max(jnp.min(gaps, axis=1))) < 1e-5
        assert np.all(np.diff(centres) >= 0)
        np.testing.assert_allclose(centres, -centres[::-1])
    assert int(found.solution.num_steps) == 4


def test_the_centres_are_those_of_the_steps_taken_by_hand():
    x, basis = vector(48, 3), haar(48)
    q = np.asarray(basis.matrix, np.float64)
    r, sizes = x / np.sqrt(np.mean(np.square(x, dtype=np.float64))), []
    for frame in (np.eye(48), np.eye(48), q, q):
        y = frame.T @ r
        sizes.append(np.abs(y).mean())
        r = r - frame @ (sizes[-1] * np.sign(y))
    # More rounds leave the centres as they are.
    found = solve_alternating(jnp.asarray(x), basis, rtol=1e-6, max_steps=40)
    a, b, c, d = sizes
    np.testing.assert_allclose(found.u_centres, [-a - b, b - a, a - b, a + b], 1e-4)
    np.testing.assert_allclose(found.v_centres, [-c - d, d - c, c - d, c + d], 1e-4)


def test_the_fixed_schedule_is_nearly_as_fast_as_the_adaptive_rule():
    x, basis = (
        jnp.asarray(vector(4096)),
        make_basis("sign-dct", jax.random.key(0), 4096),
    )
    limits = {"rtol": 1e-5, "max_steps": 100}
    adaptive, fixed = (SOLVERS[name](x, basis, **limits) for name in list(SOLVERS)[:2])
    assert adaptive.converged and fixed.converged
    assert int(fixed.num_steps) <= int(adaptive.num_steps) + 8


@settings(max_examples=15, deadline=None)
@given(seeds, st.sampled_from([(0.6, 1.0), (0.8, 0.5), (0.9, 0.25)]))
def test_truncation_never_leaves_its_level(seed, parameters):
    eta, delta = parameters
    x = jnp.asarray(problems.student_t(1, 48, seed)[0])
    found = solve_truncation(x, haar(48), rtol=1e-5, max_steps=40, eta=eta, delta=delta)
    bound = 1 / (2 * np.sqrt(delta) * (1 - eta))
    assert float(found.level) <= bound + 1e-5
    assert bool(found.converged) == bool(found.residual <= 1e-5)


def test_truncation_with_a_limit_that_shrinks_too_fast_stalls_and_says_so():
    x = jnp.zeros(256).at[3].set(1)
    hasty = solve_truncation(x, haar(256), rtol=1e-5, max_steps=200, eta=0.5)
    patient = solve_truncation(x, haar(256), rtol=1e-5, max_steps=200, eta=0.8)
    assert not hasty.converged and float(hasty.residual) > 0.1
    assert patient.converged


def test_the_comparison_has_a_row_for_every_solver():
    rows = compare_solvers(jnp.asarray(vector(64)), haar(64), repeats=1)
    assert list(rows) == ["greedy", "alternating", "truncation", "minimax"]
    for row in rows.values():
        assert row.converged and row.residual < 1e-6 and row.num_steps >= 1
        assert 0 < row.seconds < np.inf
    assert min(row.level for row in rows.values()) == rows["minimax"].level


@pytest.mark.parametrize("solver", SOLVERS)
def test_limits_that_cannot_work_are_refused(solver):
    run = lambda **limits: SOLVERS[solver](jnp.ones(4), haar(4), **limits)
    with pytest.raises(ValueError, match="`max_steps` must be at least"):
        run(rtol=0.1, max_steps=0)
    if solver != "minimax":
        with pytest.raises(ValueError, match="`rtol` must be positive. Got rtol=0.0"):
            run(rtol=0.0, max_steps=8)


@pytest.mark.parametrize("rtol", [0.0, -1.0, float("nan")])
def test_minimax_refuses_gaps_that_are_not_positive(rtol):
    with pytest.raises(ValueError, match="`rtol` must be positive"):
        solve_minimax(jnp.ones(4), haar(4), rtol=rtol, max_steps=8)


@pytest.mark.parametrize("name", ["eta", "delta"])
@pytest.mark.parametrize("value", [0.0, 1.5, float("nan")])
def test_truncation_refuses_parameters_that_are_no_shares(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must lie in"):
        solve_truncation(jnp.ones(4), haar(4), rtol=0.1, max_steps=8, **{name: value})


def test_a_comparison_is_timed_at_least_once():
    with pytest.raises(ValueError, match="`repeats` must be at least 1. Got 0"):
        compare_solvers(jnp.ones(4), haar(4), repeats=0)
