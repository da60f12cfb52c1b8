"""The greedy decomposition: the paper's algorithm, its rates, and hostile blocks."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kashin_jax.bases import BasisSpec, make_basis, make_pair
from kashin_jax.decomposition import kashin_decompose
from tests import problems
from tests.oracle_numpy import dense_basis, greedy_matrix, greedy_vector

# Where a block has exact zeros a step gains more than l1^2 / N.
DENSE = ["gaussian", "student_t", "outlier_columns"]

# Compiled once a shape and basis, whatever the limits.
decompose = kashin_decompose


synthesis = jax.jit(lambda basis, v: basis.synthesis(v))
analysis = jax.jit(lambda basis, x: basis.analysis(x))


def pair_for(m, n, text="haar", seed=0):
    return make_pair(BasisSpec.parse(text), jax.random.key(seed), (m, n))


# The algorithm knows nothing of the family; the oracle has these as matrices.
OLDEST = ["identity", "dct", "sign-dct", "hadamard", "haar"]


def remainder(x, basis, result):
    """What the factors miss, relative to the block, in float64."""
    x = np.asarray(x, np.float64)
    mixed = np.asarray(synthesis(basis, result.v), np.float64)
    missed = x - float(result.scale) * (np.asarray(result.u, np.float64) + mixed)
    return np.linalg.norm(missed) / np.linalg.norm(x)


@pytest.mark.parametrize("family", OLDEST)
@pytest.mark.parametrize("n", [60, pytest.param(129, marks=pytest.mark.slow)])
def test_the_vector_form_is_the_papers_algorithm(family, n):
    basis = make_basis(family, jax.random.key(n), n)
    x = problems.gaussian(1, n, seed=n)[0]
    result = decompose(jnp.asarray(x), basis, rtol=1e-3, max_steps=25)
    unit = np.asarray(x, np.float64) / np.linalg.norm(x)
    u, v, residual, steps = greedy_vector(unit, dense_basis(family, basis, n), 1e-3, 25)
    assert int(result.num_steps) == steps
    np.testing.assert_allclose(result.u, u * np.sqrt(n), atol=1e-5)
    np.testing.assert_allclose(result.v, v * np.sqrt(n), atol=1e-5)
    np.testing.assert_allclose(result.residual, np.linalg.norm(residual), rtol=1e-3)


@pytest.mark.parametrize("family", OLDEST)
@pytest.mark.parametrize(
    "other", [None, pytest.param("identity", marks=pytest.mark.slow)]
)
def test_the_matrix_form_is_the_papers_algorithm(family, other):
    m, n = 24, 40
    basis = make_pair(BasisSpec(family, other or family), jax.random.key(1), (m, n))
    x = problems.gaussian(m, n, seed=2)
    result = decompose(jnp.asarray(x), basis, rtol=1e-3, max_steps=25)
    unit = np.asarray(x, np.float64) / np.linalg.norm(x)
    q1 = dense_basis(family, basis.left, m)
    q2 = dense_basis(other or family, basis.right, n)
    u, v, residual, steps = greedy_matrix(unit, q1, q2, 1e-3, 25)
    assert int(result.num_steps) == steps
    np.testing.assert_allclose(result.u, u * np.sqrt(m * n), atol=1e-5)
    np.testing.assert_allclose(result.v, v * np.sqrt(m * n), atol=1e-5)
    np.testing.assert_allclose(result.residual, np.linalg.norm(residual), rtol=1e-3)


@pytest.mark.parametrize("name", problems.ALL)
@pytest.mark.parametrize("text", ["haar", "hadamard"])
def test_reported_residual_and_verdict_are_the_true_ones(name, text):
    x, basis = jnp.asarray(problems.ALL[name](32, 48)), pair_for(32, 48, text)
    result = decompose(x, basis, rtol=1e-6, max_steps=60)
    assert all(np.isfinite(leaf).all() for leaf in result)
    assert bool(result.converged) == bool(result.residual <= 1e-6)
    if name != "zero":
        np.testing.assert_allclose(
            result.residual, remainder(x, basis, result), rtol=0.1, atol=2e-7
        )


@pytest.mark.parametrize("name", problems.HARD)
def test_a_block_that_does_not_converge_is_reported_and_still_decomposed(name):
    x, basis = jnp.asarray(problems.ALL[name](32, 48)), pair_for(32, 48)
    result = decompose(x, basis, rtol=1e-6, max_steps=12)
    assert not result.converged
    assert int(result.num_steps) == 12
    assert 1e-6 < float(result.residual) < 1.0


def test_all_tolerances_and_numbers_of_steps_share_one_program():
    x, basis = jnp.asarray(problems.gaussian(16, 24)), pair_for(16, 24)
    chex.clear_trace_counter()
    counted = jax.jit(chex.assert_max_traces(kashin_decompose, n=1))
    found = [counted(x, basis, rtol=1e-6, max_steps=k) for k in (1, 3, 7)]
    assert [int(each.num_steps) for each in found] == [1, 3, 7]
    loose = counted(x, basis, rtol=0.5, max_steps=7)
    assert loose.converged and int(loose.num_steps) < 7


@pytest.mark.parametrize("name", [*problems.EASY, *problems.HARD])
def test_residual_never_grows(name):
    x, basis = jnp.asarray(problems.ALL[name](32, 48)), pair_for(32, 48)
    by_steps = residuals(x, basis)
    assert np.all(np.diff(by_steps) <= 1e-7)
    assert by_steps[-1] < by_steps[0] < 1.0


def residuals(x, basis):
    return np.array(
        [
            float(decompose(x, basis, rtol=1e-6, max_steps=k).residual)
            for k in (1, 2, 3, 5, 12)
        ]
    )


@pytest.mark.parametrize("name", DENSE)
def test_one_step_lowers_the_squared_residual_by_l1_squared_over_size(name):
    x, basis = problems.ALL[name](32, 48), pair_for(32, 48)
    norm = np.linalg.norm(x)
    coefs = np.asarray(analysis(basis, jnp.asarray(x)))
    l1 = max(np.abs(x).sum(dtype=float), np.abs(coefs).sum(dtype=float)) / norm
    result = decompose(jnp.asarray(x), basis, rtol=1e-6, max_steps=1)
    np.testing.assert_allclose(1 - result.residual**2, l1**2 / x.size, rtol=1e-5)


def test_ties_go_to_v():
    x, basis = jnp.asarray(problems.gaussian(16, 16)), pair_for(16, 16, "identity")
    result = decompose(x, basis, rtol=1e-6, max_steps=20)
    assert not result.u.any()
    assert result.v.any()


def test_a_gaussian_residual_falls_at_the_papers_rate():
    n, count = 1024, 8
    x = jnp.asarray(problems.gaussian(count, n, seed=3))
    keys = jax.random.split(jax.random.key(0), count)
    bases = jax.vmap(lambda key: make_basis("hadamard", key, n))(keys)
    step = jax.jit(
        lambda k: jax.vmap(partial(kashin_decompose, rtol=1e-9, max_steps=k))(x, bases)
    )
    measured = [float(np.mean(step(k).residual)) for k in (1, 2, 4, 6)]
    paper = [0.603, 0.361, 0.130, 0.049]
    np.testing.assert_allclose(measured, paper, rtol=0.06)
    assert abs(measured[0] - np.sqrt(1 - 2 / np.pi)) < 0.01


def test_a_gaussian_matrix_reaches_1e_6_in_about_30_steps():
    x, basis = jnp.asarray(problems.gaussian(768, 768)), pair_for(768, 768, "hadamard")
    result = decompose(x, basis, rtol=1e-6, max_steps=200)
    assert result.converged
    assert 27 <= int(result.num_steps) <= 36
    assert remainder(x, basis, result) <= 1.05e-6
    assert np.abs(result.u).max() < 2.52
    assert np.abs(result.v).max() < 2.52


def test_the_rank_one_counter_example_is_as_slow_as_the_paper_notes():
    basis = pair_for(64, 64, seed=5)
    x = problems.counter_example(64, np.asarray(basis.right.matrix), i=3, j=9)
    measured = [
        float(decompose(jnp.asarray(x), basis, rtol=1e-6, max_steps=k).residual)
        for k in (10, 50, 100, 200)
    ]
    np.testing.assert_allclose(measured, [0.85, 0.38, 0.14, 0.02], atol=0.02)


@settings(max_examples=20, deadline=None)
@given(st.integers(-100, 100))
def test_scaling_by_a_power_of_two_changes_only_the_scale(exponent):
    x, basis = problems.gaussian(24, 40), pair_for(24, 40)
    plain = decompose(jnp.asarray(x), basis, rtol=1e-3, max_steps=60)
    factor = np.float32(2.0**exponent)
    scaled = decompose(jnp.asarray(x * factor), basis, rtol=1e-3, max_steps=60)
    assert np.array_equal(plain.u, scaled.u) and np.array_equal(plain.v, scaled.v)
    assert np.float32(plain.scale) * factor == np.float32(scaled.scale)
    assert plain.num_steps == scaled.num_steps
    assert plain.residual == scaled.residual


@pytest.mark.parametrize("factor", [1e30, 1e-30, 1e-3, -7.0])
def test_scaling_the_block_scales_the_factors(factor):
    x, basis = problems.gaussian(24, 40), pair_for(24, 40)
    plain = decompose(jnp.asarray(x), basis, rtol=1e-3, max_steps=60)
    scaled = decompose(
        jnp.asarray(x * np.float32(factor)), basis, rtol=1e-3, max_steps=60
    )
    assert plain.converged and scaled.converged
    assert int(plain.num_steps) == int(scaled.num_steps)
    np.testing.assert_allclose(scaled.scale, plain.scale * abs(factor), rtol=1e-6)
    sign = np.sign(factor)
    np.testing.assert_allclose(scaled.u, sign * np.asarray(plain.u), atol=1e-5)
    np.testing.assert_allclose(scaled.v, sign * np.asarray(plain.v), atol=1e-5)


@pytest.mark.parametrize("name", problems.ALL)
def test_the_scale_is_the_root_mean_square(name):
    x = problems.ALL[name](32, 48)
    result = decompose(jnp.asarray(x), pair_for(32, 48), rtol=1e-6, max_steps=1)
    rms = np.sqrt(np.mean(np.asarray(x, np.float64) ** 2))
    np.testing.assert_allclose(result.scale, rms, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("factor", [1.0, 2.0**-10, 2.0**12])
def test_half_precision_blocks_are_decomposed_in_float32(dtype, factor):
    x = (jnp.asarray(problems.gaussian(24, 40)) * factor).astype(dtype)
    basis = pair_for(24, 40)
    half = decompose(x, basis, rtol=1e-3, max_steps=60)
    full = decompose(x.astype(jnp.float32), basis, rtol=1e-3, max_steps=60)
    assert half.u.dtype == half.v.dtype == half.scale.dtype == jnp.float32
    assert half.converged
    for one, other in zip(half, full, strict=True):
        assert np.array_equal(one, other)


def test_a_zero_block_takes_no_steps_and_a_constant_one_takes_one():
    basis = pair_for(32, 48)
    zero = decompose(jnp.zeros((32, 48)), basis, rtol=1e-6, max_steps=12)
    assert zero.converged and int(zero.num_steps) == 0
    assert float(zero.scale) == float(zero.residual) == 0.0
    assert not zero.u.any() and not zero.v.any()
    x = jnp.asarray(problems.constant(32, 48))
    constant = decompose(x, basis, rtol=1e-6, max_steps=12)
    assert constant.converged and int(constant.num_steps) == 1
    assert np.array_equal(constant.scale * constant.u, x)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1)])
def test_single_rows_and_columns_and_entries_are_blocks_too(shape):
    x, basis = jnp.asarray(problems.gaussian(*shape)), pair_for(*shape)
    result = decompose(x, basis, rtol=1e-3, max_steps=300)
    assert bool(result.converged) == bool(result.residual <= 1e-3)
    np.testing.assert_allclose(
        result.residual, remainder(x, basis, result), rtol=0.01, atol=2e-7
    )


def test_a_batch_agrees_with_a_loop_over_its_rows():
    names = ["gaussian", "outlier_columns", "zero", "huge"]
    blocks = jnp.stack([jnp.asarray(problems.ALL[name](24, 40)) for name in names])
    basis = pair_for(24, 40)
    solve = lambda block: kashin_decompose(block, basis, rtol=1e-2, max_steps=25)
    batch = jax.jit(jax.vmap(solve))(blocks)
    assert len(set(batch.num_steps.tolist())) == 3
    for i, block in enumerate(blocks):
        single = solve(block)
        assert int(batch.num_steps[i]) == int(single.num_steps)
        assert bool(batch.converged[i]) == bool(single.converged)
        np.testing.assert_allclose(batch.u[i], single.u, atol=1e-4)
        np.testing.assert_allclose(batch.v[i], single.v, atol=1e-4)
        np.testing.assert_allclose(batch.residual[i], single.residual, rtol=1e-2)


def test_a_stack_of_bases_goes_through_vmap():
    x = jnp.asarray(problems.gaussian(24, 40))
    keys = jax.random.split(jax.random.key(0), 4)
    bases = jax.vmap(lambda key: make_pair(BasisSpec("haar", "haar"), key, (24, 40)))(
        keys
    )
    solve = lambda basis: kashin_decompose(x, basis, rtol=1e-4, max_steps=50)
    result = jax.jit(jax.vmap(solve))(bases)
    assert result.u.shape == (4, 24, 40)
    assert result.converged.all()
    assert not np.array_equal(result.u[0], result.u[1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_block_never_counts_as_converged(bad):
    x = jnp.asarray(problems.gaussian(24, 40)).at[3, 4].set(bad)
    assert not decompose(x, pair_for(24, 40), rtol=1e-3, max_steps=60).converged


@pytest.mark.parametrize("rtol", [0.0, -1e-3, float("nan")])
def test_tolerances_that_are_not_positive_are_refused(rtol):
    with pytest.raises(ValueError, match="`rtol` must be positive"):
        kashin_decompose(jnp.ones((4, 4)), pair_for(4, 4), rtol=rtol, max_steps=5)


@pytest.mark.parametrize("max_steps", [0, -1])
def test_step_limits_below_one_are_refused(max_steps):
    with pytest.raises(ValueError, match="`max_steps` must be at least 1"):
        kashin_decompose(
            jnp.ones((4, 4)), pair_for(4, 4), rtol=0.1, max_steps=max_steps
        )
