"""k-means++ starts: data points, drawn by squared distance, whatever the data."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kashin_jax.codebooks import kmeans_plus_plus

# Called eagerly it would compile its loop anew each time.
draw = jax.jit(kmeans_plus_plus, static_argnums=2)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1.0, -1.0, 1e15, 3.0]), min_size=6, max_size=6),
    st.integers(0, 99),
)
def test_kmeans_plus_plus_draws_points_and_never_nan(values, seed):
    points = jnp.array(values).reshape(6, 1)
    drawn = np.asarray(draw(jax.random.key(seed), points, 9))[:, 0]
    assert drawn.shape == (9,)
    assert set(drawn) <= set(np.asarray(points)[:, 0])


def test_kmeans_plus_plus_draws_distinct_points_while_there_are_any():
    points = jnp.arange(8.0).reshape(8, 1)
    for seed in range(20):
        drawn = np.asarray(draw(jax.random.key(seed), points, 8))
        assert sorted(drawn[:, 0]) == list(range(8))


def test_kmeans_plus_plus_draws_by_squared_distance():
    points = jnp.array([[0.0], [1.0], [3.0]])
    keys = jax.random.split(jax.random.key(0), 6000)
    drawn = np.asarray(jax.vmap(lambda key: kmeans_plus_plus(key, points, 2))(keys))
    first, second = drawn[:, 0, 0], drawn[:, 1, 0]
    for start, odds in ((0.0, 9 / 10), (1.0, 4 / 5), (3.0, 4 / 13)):
        rows = second[first == start]
        assert abs(len(rows) / 6000 - 1 / 3) < 0.03
        other = 1.0 if start == 3.0 else 3.0
        assert abs(np.mean(rows == other) - odds) < 0.04
