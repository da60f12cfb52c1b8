"""The follow-up's two theorems on numbers: the fixed schedule, and random signs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kashin_jax.bases import dense as dense_eagerly
from kashin_jax.bases import make_basis
from kashin_jax.theory import (
    accelerated_constant,
    accelerated_ratio,
    alternating_level,
    check_alternating,
    l1_ratio,
    rate_from_constant,
    round_rate,
    search_worst_case,
    solve_alternating,
    spread,
    structured_starts,
    trace_alternating,
)
from tests import problems

dense, ratio = jax.jit(dense_eagerly, static_argnums=1), jax.jit(l1_ratio)
seeds = st.integers(0, 2**31 - 1)
kinds = st.sampled_from(["gaussian", "heavy", "spike", "comb", "mixed spike"])


def vector(kind, basis, n, seed):
    """Easy and hard vectors: the last three are short in l1 norm on one side."""
    if kind == "gaussian":
        return jnp.asarray(problems.gaussian(1, n, seed)[0])
    if kind == "heavy":
        return jnp.asarray(problems.student_t(1, n, seed)[0])
    x = np.zeros(n, np.float32)
    x[seed % n :: n if kind != "comb" else 4] = 1 + seed % 3
    x = jnp.asarray(x)
    return basis.synthesis(x) if kind == "mixed spike" else x


@settings(max_examples=30, deadline=None)
@given(kinds, st.sampled_from(["sign-dct", "identity"]), seeds)
def test_every_round_obeys_proposition_1(kind, family, seed):
    """Guards the schedule: the rate of a round by the ratio of what it starts from.

    With the identity too, for which steps of v do no more than those of u.
    """
    n = 60
    basis = make_basis(family, jax.random.key(seed), n)
    x = vector(kind, basis, n, seed)
    found = check_alternating(x, basis, rounds=6)
    assert bool(found.counted[0])
    assert 0 <= float(found.rate) <= 1 + 1e-4
    assert 0 < float(found.level) <= 1 + 1e-4
    # The numbers are those of the trace, looked at without the library's sums.
    trace = trace_alternating(x, basis, rounds=6)
    assert float(trace.residuals[0]) == pytest.approx(1, rel=1e-5)
    assert float(trace.ratios[0]) == pytest.approx(float(ratio(basis, x)), rel=1e-5)
    bound = np.sqrt(1 - float(trace.ratios[0]) ** 4 / 36)
    assert float(trace.residuals[1]) <= bound + 1e-4
    assert float(round_rate(trace.ratios[0])) == pytest.approx(bound)


def test_a_schedule_that_forgot_its_second_factor_would_be_caught():
    """Guards the check itself: steps of u alone leave more than a round may."""
    basis = make_basis("sign-dct", jax.random.key(0), 4096)
    x = jnp.zeros(4096).at[7].set(1.0)
    left, start = x, float(ratio(basis, x))
    assert start > 0.5
    for _ in range(2):
        left = left - jnp.mean(jnp.abs(left)) * jnp.sign(left)
    assert float(jnp.linalg.norm(left)) > float(round_rate(start))
    assert float(check_alternating(x, basis, rounds=1).rate) < 1


def test_a_trace_passes_through_the_solutions_of_fewer_rounds():
    basis = make_basis("haar", jax.random.key(2), 60)
    x = vector("heavy", basis, 60, 3) * 1e20
    trace = trace_alternating(x, basis, rounds=3)
    for k in (1, 3):
        found = solve_alternating(x, basis, rtol=1e-9, max_steps=4 * k).solution
        assert float(trace.residuals[k]) == pytest.approx(float(found.residual), 1e-3)
        assert float(trace.levels[k]) == pytest.approx(float(found.level), 1e-4)
    with pytest.raises(ValueError, match="`rounds` must be at least 1. Got 0"):
        trace_alternating(x, basis, rounds=0)


def test_levels_follow_from_rates():
    """4 / beta is above the sum of two steps of every round, 2 / (1 - rate)."""
    for c in (0.1, 0.5, 0.798, 1.0):
        assert float(alternating_level(c)) >= 2 / (1 - float(round_rate(c))) * 0.99
        assert float(round_rate(c)) > rate_from_constant(c)


@pytest.mark.slow
def test_vectors_that_a_sign_dct_spreads_worst_ask_for_no_larger_constant():
    """Theorem 2: c3 of the worst vectors found does not grow with their length."""
    needed = []
    for n in (64, 512):
        basis = make_basis("sign-dct", jax.random.key(n), n)
        starts = structured_starts(basis, n=n, count=2)
        worst = float(search_worst_case(basis, starts, steps=60).ratio)
        assert worst < float(ratio(basis, starts[0]))
        needed.append(accelerated_constant(worst, n))
        # It is the constant with which the theorem promises no more than that.
        assert accelerated_ratio(n, needed[-1]) == pytest.approx(worst)
    assert needed[1] < needed[0]


def test_a_basis_without_a_bound_asks_for_ever_larger_constants():
    """Guards the form of R(N): spikes under the identity grow past all logarithms."""
    needed = [accelerated_constant(1 / np.sqrt(n), n) for n in (2**20, 2**40, 2**60)]
    assert needed[0] < needed[1] < needed[2]


def test_the_spread_of_the_dct_is_the_square_root_of_two():
    basis = make_basis("dct", jax.random.key(0), 48)
    rows = np.asarray(dense(basis, 48))
    assert spread(rows) == pytest.approx(np.sqrt(2), rel=1e-3)
    assert spread(np.eye(48)) == pytest.approx(np.sqrt(48))


def test_constants_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="`n` must be at least 3"):
        accelerated_ratio(2, 1.0)
    with pytest.raises(ValueError, match="must be positive. Got 0.0"):
        accelerated_ratio(64, 0.0)
    with pytest.raises(ValueError, match="`ratio` must be positive. Got nan"):
        accelerated_constant(float("nan"), 64)
