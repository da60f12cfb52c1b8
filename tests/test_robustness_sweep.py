"""The vmapped sweep: what a loop and plain NumPy find, in one compiled program."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compiled_programs

from experiments.common.seeds import stack_bases
from experiments.robustness import convergence_of, draw_matrices, draw_matrix, sweep
from kashin_jax import BasisSpec, kashin_decompose, make_pair
from tests import oracle_numpy
from tests.oracle_numpy import dense_basis

# A whole program on small matrices; its parts have tests of their own.
pytestmark = pytest.mark.slow

KEY = jax.random.key(11)
N, SEEDS, STEPS = 16, 3, 34
NAMES = ("gaussian", "sparse", "constant")


@pytest.fixture(scope="module")
def matrices():
    return draw_matrices(NAMES, jax.random.split(KEY, SEEDS), N)


def keys():
    return jax.random.split(jax.random.key(2), SEEDS)


alone = jax.jit(partial(kashin_decompose, rtol=1e-3, max_steps=STEPS))


@pytest.mark.parametrize(
    "family",
    [
        "dct",
        "givens",
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("hadamard", "haar")),
    ],
)
def test_a_sweep_is_a_loop_over_seeds_and_matrices(family, matrices):
    bases = stack_bases(family, keys(), (N, N))
    found = sweep(bases, matrices, rtol=1e-3, max_steps=STEPS)
    assert found.steps.shape == (SEEDS, len(NAMES))
    # What is done early has no tail.
    assert np.array_equal(np.isnan(found.tail_rate), found.steps <= STEPS // 2)
    for seed, key in enumerate(keys()):
        pair = make_pair(BasisSpec(family, family), key, (N, N))
        for index in range(len(NAMES)):
            one = alone(matrices[seed, index], pair)
            place = (seed, index)
            assert found.steps[place] == one.num_steps
            assert found.converged[place] == one.converged
            levels = jnp.max(jnp.abs(one.u)), jnp.max(jnp.abs(one.v))
            expected = np.array([one.residual, *levels])
            got = np.array([leaf[place] for leaf in (found[1], found[3], found[4])])
            np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)


def test_every_leaf_agrees_with_a_plain_numpy_greedy():
    x = draw_matrix("gaussian", KEY, N)
    pair = make_pair(BasisSpec("hadamard", "hadamard"), KEY, (N, N))
    found = convergence_of(x, pair, rtol=1e-9, max_steps=12)
    unit = np.asarray(x, float) / N
    q1, q2 = (dense_basis("hadamard", side, N) for side in pair)
    u, v, rest, _ = oracle_numpy.greedy_matrix(unit, q1, q2, 0.0, 12)
    half = np.linalg.norm(oracle_numpy.greedy_matrix(unit, q1, q2, 0.0, 6)[2])
    residual = np.linalg.norm(rest)
    assert not found.converged
    expected = {
        "steps": 12, "residual": residual, "rate": residual ** (1 / 12),
        "tail_rate": (residual / half) ** (1 / 6),
        "u_level": N * np.abs(u).max(), "v_level": N * np.abs(v).max(),
    }  # fmt: skip
    for name, value in expected.items():
        assert float(getattr(found, name)) == pytest.approx(value, rel=1e-3)


def test_zero_takes_no_step_and_a_constant_one():
    bases = stack_bases("dct", keys()[:1], (N, N))
    blocks = jnp.stack([jnp.zeros((N, N)), jnp.ones((N, N))])[None]
    found = sweep(bases, blocks, rtol=1e-6, max_steps=10)
    assert found.steps.tolist() == [[0, 1]]
    assert np.all(found.converged)


def test_a_family_compiles_once_for_all_its_seeds_and_matrices(caplog):
    blocks = jax.random.normal(KEY, (2, 3, 9, 9))  # a shape that no other test has
    families = ("dct", "householder")

    def run():
        for number, key in enumerate((KEY, jax.random.key(8))):
            for family in families:
                bases = stack_bases(family, jax.random.split(key, 2), (9, 9))
                sweep(bases, blocks + number, rtol=1e-3, max_steps=5)

    assert compiled_programs(caplog, run).count("sweep") == len(families)


def test_stacked_bases_are_those_of_their_keys():
    stack = stack_bases("haar", keys(), (N, 8))
    for seed, key in enumerate(keys()):
        own = jax.tree.map(lambda leaf, i=seed: leaf[i], stack)
        expected = make_pair(BasisSpec("haar", "haar"), key, (N, 8))
        np.testing.assert_allclose(own.left.matrix, expected.left.matrix, atol=1e-5)
        np.testing.assert_allclose(own.right.matrix, expected.right.matrix, atol=1e-5)


@pytest.mark.parametrize(
    ("rtol", "steps", "says"),
    [(1e-3, 1, "`max_steps` must be at least 2"), (0.0, 5, "`rtol` must be positive")],
)
def test_limits_that_cannot_work_are_refused(rtol, steps, says):
    bases = stack_bases("dct", keys()[:1], (4, 4))
    with pytest.raises(ValueError, match=says):
        sweep(bases, jnp.ones((1, 1, 4, 4)), rtol=rtol, max_steps=steps)
