"""Theorem 1 on numbers, and the matrix form, for which it does not hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kashin_jax.bases import BasisSpec, make_basis, make_pair
from kashin_jax.bases import dense as dense_eagerly
from kashin_jax.decomposition import kashin_decompose
from kashin_jax.theory import (
    FORMS,
    check_theorem,
    compare_forms,
    l1_ratio,
    rank_one_counter_example,
    rate_from_constant,
    structured_starts,
    trace_greedy,
)
from tests import problems

dense, ratio = jax.jit(dense_eagerly, static_argnums=1), jax.jit(l1_ratio)
families = st.sampled_from(["haar", "hadamard", "identity"])
# Few, as each one is compiled.
sizes = st.sampled_from([2, 7, 16])
seeds = st.integers(0, 2**31 - 1)


def vector(n, seed=0):
    return problems.gaussian(1, n, seed)[0]


@pytest.mark.parametrize("family", ["haar", "hadamard"])
def test_a_trace_passes_through_the_decompositions_of_fewer_steps(family):
    basis = make_basis(family, jax.random.key(2), 60)
    x = jnp.asarray(vector(60)) * 1e20
    trace = trace_greedy(x, basis, steps=6)
    for k in (1, 2, 6):
        result = kashin_decompose(x, basis, rtol=1e-9, max_steps=k)
        np.testing.assert_allclose(trace.residuals[k], result.residual, rtol=1e-4)
        np.testing.assert_allclose(trace.u_levels[k], np.abs(result.u).max(), 1e-4)
        np.testing.assert_allclose(trace.v_levels[k], np.abs(result.v).max(), 1e-4)
    assert trace.residuals.shape == (7,)
    assert float(trace.residuals[0]) == pytest.approx(1)


@settings(max_examples=15, deadline=None)
@given(families, sizes, seeds)
def test_every_step_obeys_the_rate_of_its_residual(family, n, seed):
    basis = make_basis(family, jax.random.key(seed), n)
    x = jnp.asarray(vector(n, seed))
    residuals = trace_greedy(x, basis, steps=1).residuals
    rate = rate_from_constant(min(float(ratio(basis, x)), 1.0))
    assert float(residuals[1]) <= rate + 1e-3


def hostile(basis, n, seed):
    """Easy and hard vectors of one basis."""
    peaks = structured_starts(basis, n=n, count=1)
    heavy = problems.student_t(1, n, seed)[0]
    rows = [vector(n, seed), heavy, np.ones(n, np.float32)]
    return jnp.concatenate([peaks, jnp.asarray(np.stack(rows))])


def checks(family, n):
    basis = make_basis(family, jax.random.key(n), n)
    check = jax.jit(jax.vmap(lambda x: check_theorem(x, basis, steps=60)))
    return check(hostile(basis, n, n))


@pytest.mark.parametrize(
    ("family", "lengths"),
    [
        ("haar", (2**6,)),
        ("sign-dct", (2**13,)),
        pytest.param("haar", (2**9,), marks=pytest.mark.slow),
        pytest.param("sign-dct", (2**9, 2**16), marks=pytest.mark.slow),
    ],
)
def test_theorem_1_rates_and_levels_stay_bounded_while_n_grows(family, lengths):
    results = [checks(family, n) for n in lengths]
    for result in results:
        # The first step on e_i + Q e_j leaves sqrt(1 - 1 / pi) = .826 for large n.
        assert float(jnp.max(result.gamma)) < 0.84
        assert float(jnp.max(result.slowest_step)) < 0.93
        assert float(jnp.max(result.level)) < 3.2
        assert np.all(result.level <= result.level_bound + 1e-3)


def test_the_identity_has_no_rate_that_holds_for_all_sizes():
    gammas = []
    for n in (16, 256, 4096):
        x = np.zeros(n, np.float32)
        x[:2] = 1, 0.5
        basis = make_basis("identity", jax.random.key(0), n)
        gammas.append(float(check_theorem(jnp.asarray(x), basis, steps=60).gamma))
    assert gammas[0] < gammas[1] < gammas[2]
    assert gammas[2] > 0.99


def test_a_block_of_signs_is_done_in_one_step():
    basis = make_basis("haar", jax.random.key(0), 16)
    x = jnp.where(jnp.asarray(vector(16)) > 0, 3.0, -3.0)
    check = check_theorem(x, basis, steps=5)
    assert float(check.gamma) < 1e-6
    assert float(check.level) == pytest.approx(1)


@pytest.mark.parametrize("check", [trace_greedy, check_theorem])
def test_a_course_has_at_least_one_step(check):
    basis = make_basis("haar", jax.random.key(0), 4)
    with pytest.raises(ValueError, match="`steps` must be at least 1. Got 0"):
        check(jnp.ones(4), basis, steps=0)


@pytest.mark.parametrize(
    ("family", "shape"), [("haar", (16, 64)), ("butterfly3", (64, 16))]
)
def test_the_counter_example_is_hard_for_every_pair_of_bases(family, shape):
    basis = make_pair(BasisSpec(family, family), jax.random.key(1), shape)
    x = rank_one_counter_example(basis, shape, 3, 5)
    np.testing.assert_allclose(
        x, problems.counter_example(shape[0], np.asarray(dense(basis.right, shape[1])),
                                    i=3, j=5), atol=1e-6,
    )  # fmt: skip
    assert np.linalg.norm(x) == pytest.approx(1, rel=1e-5)
    assert float(ratio(basis, x)) <= 1 / np.sqrt(min(shape)) + 1e-6


@pytest.mark.parametrize(("i", "j"), [(4, 0), (0, 6), (-1, 0)])
def test_indices_outside_the_block_are_refused(i, j):
    basis = make_pair(BasisSpec("haar", "haar"), jax.random.key(1), (4, 6))
    with pytest.raises(ValueError, match="must be indices of a 4 x 6 block"):
        rank_one_counter_example(basis, (4, 6), i, j)


def test_the_kronecker_form_slows_down_with_n_and_the_vector_forms_do_not():
    courses = compare_forms(jax.random.key(5), (16, 64), steps=30)
    assert [c.form for c in courses] == [*FORMS] * 2
    final = {
        form: [c.residuals[-1] for c in courses if c.form == form] for form in FORMS
    }
    ratio = {form: [c.ratio for c in courses if c.form == form] for form in FORMS}
    kronecker = np.array(final["kronecker"])
    assert np.all(np.diff(kronecker) > 0.1)
    assert kronecker[-1] > 0.5
    assert max(*final["rows"], *final["vector"]) < 1e-3
    assert min(*ratio["rows"], *ratio["vector"]) > 0.7
    for n, value in zip((16, 64), ratio["kronecker"], strict=True):
        assert value <= 1 / np.sqrt(n) + 1e-6


def test_forms_refuse_sizes_and_families_that_do_not_exist():
    with pytest.raises(ValueError, match="Unknown basis `qr`"):
        compare_forms(jax.random.key(0), (4,), steps=2, family="qr")
    with pytest.raises(ValueError, match="`n` of at least 1. Got n=0"):
        compare_forms(jax.random.key(0), (0,), steps=2)
