"""Householder, Givens and butterfly bases: factors, angles, costs, no products."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from kashin_jax.bases import FAMILIES, cost, key_from_seed, make_basis
from kashin_jax.bases import dense as dense_eagerly
from kashin_jax.bases.costs import FLOPS
from kashin_jax.bases.givens import make_givens
from kashin_jax.bases.hadamard import fft_order, hadamard_factors
from kashin_jax.bases.householder import make_householder
from tests import oracle_bases
from tests.oracle_bases import butterfly_factors, dense_basis

STRUCTURED = list(oracle_bases.STRUCTURED)
ANGLED = ["butterfly", "butterfly3", "givens"]
FAST = [name for name in FAMILIES if name not in ("identity", "haar")]
LENGTHS = [1, 2, 3, 12, 31, 97]  # where nothing is compiled
KEY = jax.random.key(0)

# Compiled as one program each: op by op every test would take seconds.
dense = jax.jit(dense_eagerly, static_argnames="n")
transform = jax.jit(lambda basis, x: basis.analysis(x))
back = jax.jit(lambda basis, y: basis.synthesis(y))


def abstract_basis(family, n):
    """Shapes and types of a basis, which nothing is compiled for."""
    return jax.eval_shape(lambda key: make_basis(family, key, n), KEY)


def close(actual, desired, atol):
    np.testing.assert_allclose(np.asarray(actual), desired, rtol=0, atol=atol)


def normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape)


@pytest.mark.parametrize("family", STRUCTURED)
def test_dense_is_the_product_of_the_factors(family):
    basis = make_basis(family, KEY, 31)
    close(dense(basis, 31), dense_basis(family, basis, 31), 2e-6)


def test_a_dense_matrix_of_a_wrong_length_is_refused():
    with pytest.raises(ValueError, match="made for 8"):
        dense_eagerly(make_basis("butterfly", KEY, 8), 9)
    with pytest.raises(ValueError, match="at least 1"):
        dense_eagerly(make_basis("dct", KEY, 1), 0)


@pytest.mark.parametrize("family", STRUCTURED)
@pytest.mark.parametrize("n", [31, pytest.param(768, marks=pytest.mark.slow)])
def test_float64_arrays_are_transformed_to_float64_accuracy(family, n):
    basis = make_basis(family, KEY, n)
    with jax.enable_x64(True):
        x = jnp.asarray(normal(2, n))
        y = transform(basis, x)
        z = back(basis, y)
        assert y.dtype == z.dtype == jnp.float64
    close(y, np.asarray(x) @ dense_basis(family, basis, n), 1e-12)
    close(z, x, 1e-12)


@pytest.mark.parametrize("family", STRUCTURED)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_short_floats_stay_short_and_keep_their_accuracy(family, dtype):
    basis, x = make_basis(family, KEY, 48), jnp.asarray(normal(4, 48), dtype)
    y = transform(basis, x)
    assert y.dtype == dtype
    expected = np.asarray(x, float) @ dense_basis(family, basis, 48)
    error = np.linalg.norm(np.asarray(y, float) - expected) / np.linalg.norm(expected)
    assert error < 6 * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stored_seed_gives_the_same_bytes_in_x64_mode(family):
    make = lambda: jax.tree.leaves(make_basis(family, key_from_seed(seed), 31))
    seed = jnp.array([3, 7], jnp.uint32)
    expected = make()
    with jax.enable_x64(True):
        wide = make()
    assert len(expected) == len(wide)
    for a, b in zip(expected, wide, strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)


def test_the_permutations_of_a_stored_seed_never_change():
    seed = jnp.array([0x01234567, 0x89ABCDEF], jnp.uint32)
    key = key_from_seed(seed)
    assert make_basis("butterfly3", key, 16).order.tolist() == BUTTERFLY_ORDER
    assert make_basis("givens", key, 16).order[1].tolist() == GIVENS_ORDER


# Part of the storage format: a matrix saved by one version must decode in the next.
BUTTERFLY_ORDER = [3, 11, 8, 4, 13, 12, 7, 10, 0, 14, 6, 5, 9, 2, 15, 1]
GIVENS_ORDER = [14, 9, 5, 0, 11, 13, 8, 7, 12, 4, 6, 10, 3, 2, 15, 1]


@pytest.mark.parametrize("n", [2, 64])
def test_powers_of_two_have_the_factors_of_the_paper(n):
    basis = make_basis("butterfly", KEY, n)
    theta, q, size = np.asarray(basis.angles, float), np.eye(n), n
    while size > 1:
        half, blocks = size // 2, []
        for j in range(n // size):
            angle = theta[size * j + half - 1]
            turn = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
            blocks.append(np.kron(turn, np.eye(half)))
        q, size = q @ scipy.linalg.block_diag(*blocks), half
    close(dense(basis, n), q, 2e-6)


@pytest.mark.parametrize("n", [*LENGTHS, 768])
def test_a_butterfly_has_n_minus_1_angles_in_log2_n_factors_and_uses_all(n):
    factors = butterfly_factors(n)
    assert len(factors) == int(np.ceil(np.log2(n)))
    assert {r.angle for f in factors for r in f} == set(range(n - 1))
    assert abstract_basis("butterfly", n).angles.shape == (n - 1,)
    for rotations in factors:
        turned = [i for r in rotations for i in (r.first, r.second)]
        assert len(set(turned)) == len(turned)


@pytest.mark.parametrize("n", [2, 3, 12])
def test_every_angle_matters(n):
    basis = make_basis("butterfly", KEY, n)
    turned = np.asarray(basis.angles) + np.eye(n - 1, dtype=np.float32)
    move = lambda angles: dense(basis._replace(angles=angles), n)
    moved = np.stack([move(angles) for angles in turned])
    distances = np.linalg.norm(moved - np.asarray(dense(basis, n)), axis=(1, 2))
    assert np.all(distances > 0.5)


@pytest.mark.parametrize("family", ["butterfly", "givens"])
@pytest.mark.parametrize("n", [1, 31])
def test_without_angles_nothing_moves(family, n):
    basis = make_basis(family, KEY, n)
    still = basis._replace(angles=jnp.zeros_like(basis.angles))
    assert np.array_equal(dense(still, n), np.eye(n))


@pytest.mark.parametrize(
    ("family", "least"), [("butterfly3", 0.7), ("butterfly", 0.3), ("givens", 0.7)]
)
@pytest.mark.parametrize("n", [500, pytest.param(512, marks=pytest.mark.slow)])
def test_unit_vectors_are_spread_over_all_coordinates(family, least, n):
    # A Gaussian matrix has .798, the identity .045.
    q = np.asarray(dense(make_basis(family, KEY, n), n))
    assert np.abs(q).sum(axis=0).mean() / np.sqrt(n) > least


def test_half_the_layers_mix_half_as_well():
    q = np.asarray(dense(make_givens(KEY, 512, layers=9), 512))
    assert np.abs(q).sum(axis=0).mean() / np.sqrt(512) < 0.45


@pytest.mark.parametrize("family", ANGLED)
@pytest.mark.parametrize("n", [1, 7])
def test_the_gradient_of_the_angles_is_that_of_finite_differences(family, n):
    basis = make_basis(family, KEY, n)
    with jax.enable_x64(True):
        angles = jnp.asarray(np.asarray(basis.angles, float))
        x, weights = jnp.asarray(normal(n)), jnp.asarray(normal(n) ** 2)

        @jax.jit
        def energy(angles):
            y = basis._replace(angles=angles).analysis(x)
            return jnp.sum(weights * y**3)

        gradient = np.asarray(jax.jit(jax.grad(energy))(angles))
        differences = np.zeros(angles.shape)
        for index in np.ndindex(*angles.shape):
            step = np.zeros(angles.shape)
            step[index] = 1e-6
            up, down = np.asarray(angles) + step, np.asarray(angles) - step
            differences[index] = (energy(up) - energy(down)) / 2e-6
    np.testing.assert_allclose(gradient, differences, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("n", "reflectors"), [(1, 1), (48, 1), (48, 3)])
def test_normals_have_a_gradient_and_no_length(n, reflectors):
    basis = make_householder(KEY, n, reflectors=reflectors)
    x = jnp.asarray(normal(n), jnp.float32)
    longer = basis._replace(normals=basis.normals * 7)
    close(transform(longer, x), transform(basis, x), 2e-6)
    loss = lambda normals: jnp.sum(jnp.abs(basis._replace(normals=normals).analysis(x)))
    gradient = np.asarray(jax.jit(jax.grad(loss))(basis.normals))
    # Along a normal nothing changes.
    close(
        np.sum(gradient * np.asarray(basis.normals), axis=1), np.zeros(reflectors), 1e-4
    )
    assert np.isfinite(gradient).all() and (n == 1 or gradient.any())


@pytest.mark.parametrize("reflectors", [1, 8])
def test_k_reflections_move_k_directions(reflectors):
    basis = make_householder(KEY, 40, reflectors=reflectors)
    moved = np.linalg.svd(dense_basis("householder", basis, 40) - np.eye(40))[1]
    assert np.sum(moved > 1e-9) == reflectors
    close(dense(basis, 40), dense_basis("householder", basis, 40), 2e-6)
    assert np.linalg.det(np.asarray(dense(basis, 40))) * (-1) ** reflectors > 0


@pytest.mark.parametrize("layers", [1, 3])
def test_givens_layers_can_be_chosen(layers):
    basis = make_givens(KEY, 21, layers=layers)
    assert basis.angles.shape == (layers, 10)
    close(dense(basis, 21), dense_basis("givens", basis, 21), 3e-6)
    # One layer leaves two entries per column, or one.
    if layers == 1:
        assert np.max(np.sum(np.asarray(dense(basis, 21)) != 0, axis=0)) == 2


@pytest.mark.parametrize("count", [0, -1])
def test_a_count_below_one_is_refused(count):
    with pytest.raises(ValueError, match="`reflectors` must be at least 1"):
        make_householder(KEY, 8, reflectors=count)
    with pytest.raises(ValueError, match="`layers` must be at least 1"):
        make_givens(KEY, 8, layers=count)


def largest_array(jaxpr):
    """Entries of the largest value that a traced function computes."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [variable.aval.size for variable in equation.outvars]
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                sizes.append(largest_array(inner))
    return max(sizes)


@pytest.mark.parametrize("family", STRUCTURED)
@pytest.mark.parametrize("method", ["analysis", "synthesis"])
@pytest.mark.parametrize("n", [1000, 1024])
def test_no_transform_builds_a_matrix(family, method, n):
    basis = abstract_basis(family, n)
    traced = jax.make_jaxpr(lambda basis, x: getattr(basis, method)(x))(
        basis, jnp.ones(n)
    )
    # Coordinates times factors or reflectors, at most.
    assert largest_array(getattr(traced, "jaxpr", traced)) <= 10 * n


@pytest.mark.parametrize("method", ["analysis", "synthesis"])
@pytest.mark.parametrize("n", [4093, 2 * 1033])
def test_hadamard_of_a_large_odd_order_is_no_matrix(method, n):
    # A matrix of 4093 x 64 took 1.8 GB to code, which dozens of copies of the basis
    # of its prime side took in the compiled program.
    basis = abstract_basis("hadamard", n)
    traced = jax.make_jaxpr(lambda basis, x: getattr(basis, method)(x))(
        basis, jnp.ones(n)
    )
    consts = [np.size(value) for value in traced.consts]
    assert max([largest_array(traced.jaxpr), *consts]) <= 10 * n
    assert cost("hadamard", n).flops < 200 * n


@pytest.mark.parametrize("n", [1031, 2 * 1033])
def test_hadamard_of_a_large_odd_order_is_the_matrix_that_it_was(n):
    basis = make_basis("hadamard", KEY, n)
    factors = hadamard_factors(n)
    assert fft_order(n) == factors[0].shape[0] and not fft_order(2 * 1021)
    rows = np.eye(n, dtype=np.float32)[[0, 1, 5, n // 2, n - 1]]
    matrix = np.kron(factors[0], factors[1]) if n % 2 == 0 else factors[0]
    matrix = matrix * np.asarray(basis.signs)[:, None]
    close(basis.analysis(jnp.asarray(rows)), rows @ matrix, 1e-6)
    close(basis.synthesis(jnp.asarray(rows)), rows @ matrix.T, 1e-6)
    close(basis.analysis(jnp.asarray(rows.T), 0), (rows @ matrix).T, 1e-6)
    close(basis.synthesis(jnp.asarray(rows.T), 0), (rows @ matrix.T).T, 1e-6)


def test_every_family_has_a_cost():
    assert FLOPS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n", [1, 2, 31, 64])
def test_parameter_bytes_are_those_of_the_arrays(family, n):
    leaves = jax.tree.leaves(abstract_basis(family, n))
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert cost(family, n).parameter_bytes == stored


@pytest.mark.parametrize("n", [*LENGTHS, 768])
def test_flops_of_rotations_are_six_per_pair(n):
    pairs = sum(map(len, butterfly_factors(n)))
    assert cost("butterfly", n).flops == 6 * pairs
    assert cost("butterfly3", n).flops == 18 * pairs
    layers = max(1, 2 * int(np.ceil(np.log2(n))))
    assert cost("givens", n).flops == 6 * (n // 2) * layers


@pytest.mark.parametrize("family", ["haar", "householder", "hadamard"])
@pytest.mark.parametrize("n", [64, 768])
def test_flops_of_products_are_those_that_xla_counts(family, n):
    basis = abstract_basis(family, n)
    counted = transform.lower(basis, jnp.ones((64, n))).compile().cost_analysis()
    assert 64 * cost(family, n).flops == pytest.approx(counted["flops"], rel=0.1)


@pytest.mark.parametrize("family", FAST)
def test_the_arithmetic_of_fast_bases_grows_almost_linearly(family):
    slope = partial(growth, family, 2**10)
    assert slope(2**18) < 1.15


def test_the_arithmetic_of_a_dense_basis_grows_quadratically():
    assert growth("haar", 2**10, 2**18) == pytest.approx(2)


def growth(family, small, large):
    ratio = cost(family, large).flops / cost(family, small).flops
    return np.log(ratio) / np.log(large / small)
