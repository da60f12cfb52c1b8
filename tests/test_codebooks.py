"""Codebooks: exact sizes, exact assignment, Lloyd's fixed points, degenerate data."""

from functools import partial

import jax
import jax.numpy as jnp
import kmeans1d
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans as SklearnKMeans

from kashin_jax.codebooks import (
    assign_pairs,
    assign_scalars,
    fit_pairs,
    fit_scalars,
    kmeans_plus_plus,
    lloyd_pairs,
)
from kashin_jax.codebooks import lloyd_sorted as lloyd_eagerly

PAIRS = {"rtol": 1e-3, "max_steps": 50, "sample": 2000}
SCALARS = {"rtol": 1e-5, "max_steps": 500}
# Sizes that tests share where they can: each is a program or two to compile.
COUNT, K = 1000, 16
TWO = {"num_restarts": 2, "polish_steps": 3, **PAIRS}
lloyd_sorted = jax.jit(lloyd_eagerly)


KEY = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def peaks(seed, count=3000):
    """Four by four blurred peaks, as u and v have them."""
    rng = np.random.default_rng(seed)
    values = rng.choice([-1.3, -0.4, 0.4, 1.3], (2, count))
    return (values + 0.1 * rng.standard_normal((2, count))).astype(np.float32)


def squared_distances(u, v, centroids):
    points = np.stack([u, v], axis=1).astype(np.float64)
    return ((points[:, None] - np.asarray(centroids, float)) ** 2).sum(-1)


def as_pairs(u, v):
    return jnp.asarray(u), jnp.asarray(v)


def test_codebooks_of_every_width_have_two_to_the_bits_rows():
    x = jax.ShapeDtypeStruct((500,), jnp.float32)
    for k in 2 ** np.arange(1, 9):
        pairs = partial(fit_pairs, k=int(k), **TWO)
        assert jax.eval_shape(pairs, KEY, x, x).centroids.shape == (k, 2)
        line = partial(fit_scalars, k=int(k), num_restarts=2, **SCALARS)
        assert jax.eval_shape(line, KEY, x).levels.shape == (k,)


@pytest.mark.parametrize("bits", [1, 8])
def test_no_two_rows_of_a_codebook_are_equal(bits):
    u, v = as_pairs(*normal(bits, 2, COUNT))
    book = fit_pairs(jax.random.key(0), u, v, 2**bits, **TWO)
    assert np.isfinite(book.centroids).all()
    assert len(np.unique(np.asarray(book.centroids), axis=0)) == 2**bits
    line = fit_scalars(jax.random.key(0), u, 2**bits, num_restarts=2, **SCALARS)
    assert np.all(np.diff(line.levels) > 0)


@pytest.mark.parametrize("k", [1, 16, 17, 256])
def test_pairs_get_their_nearest_centroid(k):
    u, v = normal(k, 2, 1000)
    centroids = normal(k + 1, k, 2)
    codes, distances = assign_pairs(*as_pairs(u, v), jnp.asarray(centroids))
    exact = squared_distances(u, v, centroids)
    assert codes.dtype == jnp.uint8
    assert np.array_equal(codes, exact.argmin(1))
    np.testing.assert_allclose(distances, exact.min(1), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("k", [1, 16, 17, 256])
def test_scalars_get_their_nearest_level(k):
    x = normal(k, 30, 40)
    levels = np.sort(normal(k + 1, k))
    codes = assign_scalars(jnp.asarray(x), jnp.asarray(levels))
    assert codes.dtype == jnp.uint8
    distances = np.abs(x[..., None].astype(np.float64) - levels)
    assert np.array_equal(codes, distances.argmin(-1))


def test_ties_go_to_the_lower_code():
    levels = jnp.array([-1.0, 1.0, 3.0])
    assert assign_scalars(jnp.array([0.0, 2.0]), levels).tolist() == [0, 1]
    codes, _ = assign_pairs(
        jnp.zeros((1,)), jnp.zeros((1,)), jnp.array([[2.0, 2.0], [0.0, 1.0], [1.0, 0]])
    )
    assert codes.tolist() == [1]


def test_lloyd_steps_never_raise_the_inertia():
    u, v = peaks(0)
    start = jnp.asarray(normal(1, 16, 2))
    inertia = [
        float(lloyd_pairs(*as_pairs(u, v), start, rtol=1e-9, max_steps=k).inertia)
        for k in range(8)
    ]
    assert np.all(np.diff(inertia) <= 1e-6)
    assert inertia[-1] < 0.5 * inertia[0]
    x = jnp.asarray(np.sort(normal(2, 2000)))
    first = jnp.asarray(np.linspace(-0.1, 0.1, 16, dtype=np.float32))
    lines = [
        float(lloyd_sorted(x, first, rtol=1e-9, max_steps=k).inertia) for k in range(8)
    ]
    assert np.all(np.diff(lines) <= 1e-6)


@pytest.mark.parametrize("make", [peaks, lambda seed: normal(seed, 2, 3000)])
def test_lloyd_ends_where_scikit_learn_ends_from_the_same_start(make):
    u, v = make(3)
    points = np.stack([u, v], axis=1)
    seeded = jax.jit(kmeans_plus_plus, static_argnums=2)
    start = np.asarray(seeded(jax.random.key(4), jnp.asarray(points), 16))
    ours = lloyd_pairs(*as_pairs(u, v), jnp.asarray(start), rtol=1e-7, max_steps=500)
    theirs = SklearnKMeans(
        16, init=start, n_init=1, algorithm="lloyd", tol=0, max_iter=500
    ).fit(points.astype(np.float64))
    assert ours.converged
    np.testing.assert_allclose(ours.inertia, theirs.inertia_ / len(u), rtol=1e-4)
    np.testing.assert_allclose(ours.centroids, theirs.cluster_centers_, atol=2e-3)


def test_reported_inertia_is_the_mean_squared_distance():
    u, v = normal(0, 2, COUNT)
    book = fit_pairs(jax.random.key(0), *as_pairs(u, v), K, **TWO)
    exact = squared_distances(u, v, book.centroids).min(1).mean()
    np.testing.assert_allclose(book.inertia, exact, rtol=1e-5)
    line = fit_scalars(jax.random.key(0), jnp.asarray(u), K, num_restarts=2, **SCALARS)
    errors = np.abs(u[:, None] - np.asarray(line.levels)).min(1) ** 2
    np.testing.assert_allclose(line.inertia, errors.mean(), rtol=1e-4)


@pytest.mark.parametrize(("k", "excess"), [(2, 1e-3), (16, 0.01), (64, 0.15)])
@pytest.mark.parametrize("name", ["normal", "heavy"])
def test_levels_are_close_to_the_exact_optimum(k, excess, name):
    rng = np.random.default_rng(k)
    x = rng.standard_normal(3000) if name == "normal" else rng.standard_t(3, 3000)
    x = x.astype(np.float32)
    ours = fit_scalars(jax.random.key(1), jnp.asarray(x), k, num_restarts=16, **SCALARS)
    labels, centres = kmeans1d.cluster(x.astype(float), k)
    best = np.mean((x - np.array(centres)[labels]) ** 2)
    assert best * (1 - 1e-4) <= float(ours.inertia) <= (1 + excess) * best


@settings(max_examples=15, deadline=None)
@given(st.integers(-20, 20))
def test_rescaled_points_take_the_same_steps(exponent):
    factor = np.float32(2.0**exponent)
    u, v = peaks(5, 1000)
    start = normal(6, 8, 2)
    plain = lloyd_pairs(*as_pairs(u, v), jnp.asarray(start), rtol=1e-3, max_steps=99)
    scaled = lloyd_pairs(
        *as_pairs(factor * u, factor * v),
        jnp.asarray(factor * start),
        rtol=1e-3,
        max_steps=99,
    )
    assert plain.converged and int(plain.num_steps) == int(scaled.num_steps) > 2
    assert np.array_equal(np.asarray(plain.centroids) * factor, scaled.centroids)
    x = np.sort(u)
    line = lloyd_sorted(jnp.asarray(x), jnp.asarray(x[::125]), rtol=1e-3, max_steps=99)
    longer = lloyd_sorted(
        jnp.asarray(factor * x), jnp.asarray(factor * x[::125]), rtol=1e-3, max_steps=99
    )
    assert int(line.num_steps) == int(longer.num_steps)
    assert np.array_equal(np.asarray(line.levels) * factor, longer.levels)


def test_an_empty_cluster_keeps_its_centroid():
    u, v = as_pairs(*normal(0, 2, 200))
    far = jnp.array([[0.0, 0.0], [50.0, -50.0]])
    book = lloyd_pairs(u, v, far, rtol=1e-6, max_steps=20)
    assert book.converged
    assert book.centroids[1].tolist() == [50.0, -50.0]
    np.testing.assert_allclose(book.centroids[0], [u.mean(), v.mean()], atol=1e-6)
    line = lloyd_sorted(
        jnp.sort(u), jnp.array([-70.0, 0.0, 60.0]), rtol=1e-6, max_steps=9
    )
    np.testing.assert_allclose(line.levels, [-70, u.mean(), 60], atol=1e-6)


@pytest.mark.parametrize("distinct", [1, 2, 5])
def test_fewer_distinct_points_than_centroids_are_coded_without_loss(distinct):
    u, v = normal(distinct, 2, distinct)
    u, v = np.resize(u, COUNT), np.resize(v, COUNT)
    book = fit_pairs(jax.random.key(0), *as_pairs(u, v), K, **TWO)
    assert book.centroids.shape == (K, 2)
    assert np.isfinite(book.centroids).all()
    assert float(book.inertia) < 1e-12
    line = fit_scalars(jax.random.key(0), jnp.asarray(u), K, num_restarts=2, **SCALARS)
    assert np.isfinite(line.levels).all()
    assert float(line.inertia) < 1e-12


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_constant_data_is_its_own_codebook(value):
    x = jnp.asarray(np.full(COUNT, value, np.float32))
    book = fit_pairs(jax.random.key(0), x, x, K, **TWO)
    assert np.array_equal(book.centroids, np.full((K, 2), value))
    assert book.converged and float(book.inertia) == 0.0
    line = fit_scalars(jax.random.key(0), x, K, num_restarts=2, **SCALARS)
    assert np.array_equal(line.levels, np.full(K, value))
    assert line.converged


def test_more_restarts_never_worsen_the_codebook():
    u, v = as_pairs(
        *np.random.default_rng(0).standard_t(3, (2, COUNT)).astype(np.float32)
    )
    line = [
        float(fit_scalars(jax.random.key(2), u, K, num_restarts=r, **SCALARS).inertia)
        for r in (2, 9)
    ]
    assert line[0] >= line[1]
    plane = [
        float(
            fit_pairs(
                jax.random.key(2), u, v, K, num_restarts=r, polish_steps=1, **PAIRS
            ).inertia
        )
        for r in (2, 9)
    ]
    # Polishing goes on from each winner, by less than the tolerance of the search.
    assert plane[0] * 1.001 >= plane[1]


def test_the_same_key_gives_the_same_bytes():
    u, v = as_pairs(*normal(0, 2, COUNT))
    fit = lambda seed: fit_pairs(
        jax.random.key(seed), u, v, K, **TWO
    ).centroids.tobytes()
    line = lambda seed: fit_scalars(
        jax.random.key(seed), u, K, num_restarts=2, **SCALARS
    ).levels.tobytes()
    assert fit(0) == fit(0) != fit(1)
    assert line(0) == line(0)


def test_a_sample_still_brings_in_a_rare_outlier():
    u, v = normal(0, 2, 20000)
    u[777], v[777] = 500, -500
    book = fit_pairs(
        jax.random.key(0), *as_pairs(u, v), 16, num_restarts=2, polish_steps=5, **PAIRS
    )
    _, distances = assign_pairs(*as_pairs(u, v), book.centroids)
    np.testing.assert_allclose(book.inertia, distances.mean(), rtol=1e-4)
    assert np.abs(book.centroids).max() > 5


@pytest.mark.slow
def test_cluster_means_stay_exact_for_tens_of_millions_of_points():
    # A running float32 sum of ones stops growing at 2^24.
    u = jnp.concatenate([jnp.full((20_000_000,), 1.2), jnp.full((20_000_000,), 3.4)])
    start = jnp.array([[1.0, 1.0], [3.0, 3.0]])
    book = lloyd_pairs(u, u, start, rtol=1e-3, max_steps=1)
    np.testing.assert_allclose(book.centroids, [[1.2, 1.2], [3.4, 3.4]], rtol=1e-4)


@pytest.mark.parametrize("k", [0, 257, -1])
def test_sizes_that_do_not_fit_a_byte_are_refused(k):
    x = jnp.ones((10,))
    with pytest.raises(ValueError, match=r"`k` must lie in \[1, 256\]"):
        fit_pairs(jax.random.key(0), x, x, k, num_restarts=1, polish_steps=1, **PAIRS)
    with pytest.raises(ValueError, match=r"`k` must lie in \[1, 256\]"):
        fit_scalars(jax.random.key(0), x, k, num_restarts=1, **SCALARS)


def test_empty_data_is_refused():
    x = jnp.zeros((0,))
    with pytest.raises(ValueError, match="empty"):
        fit_pairs(jax.random.key(0), x, x, 4, num_restarts=1, polish_steps=1, **PAIRS)
    with pytest.raises(ValueError, match="empty"):
        fit_scalars(jax.random.key(0), x, 4, num_restarts=1, **SCALARS)
