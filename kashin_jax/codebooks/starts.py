"""Where Lloyd's algorithm starts: random samples and k-means++ seeds."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

__all__ = ["fold_centroids", "kmeans_plus_plus", "sample_indices"]

Carry = TypeVar("Carry")


def fold_centroids(
    count: int, step: Callable[[Int[Array, ""], Carry], Carry], start: Carry
) -> Carry:
    """Runs `step(i, carry)` over the centroids: O(points) memory for any `count`.

    Sixteen steps at a time are one expression, which XLA fuses into a single pass over
    the points without a temporary.
    """
    if count == 0:
        return start  # the loop would still trace a step, which has nothing to index
    return jax.lax.fori_loop(0, count, step, start, unroll=min(count, 16))


def sample_indices(
    key: Key[Array, ""], population: int, count: int
) -> Int[Array, " s"]:
    """At most `count` positions; all of them, in order, when there are no more.

    Drawn with replacement: drawing without sorts all points, and among a few tens of
    thousands the repeats do not matter.
    """
    if population <= count:
        return jnp.arange(population)
    return jax.random.randint(key, (count,), 0, population)


def kmeans_plus_plus(
    key: Key[Array, ""], points: Float[Array, "p d"], k: int
) -> Float[Array, "k d"]:
    """Draws `k` starting centroids, each with probability ~ its squared distance.

    When all points already coincide with a centroid (fewer distinct points than `k`),
    the remaining draws are uniform: rows repeat, but there are always `k`.

    Source: Arthur and Vassilvitskii, "k-means++", SODA 2007.
    """
    first_key, key = jax.random.split(key)
    first = points[jax.random.randint(first_key, (), 0, points.shape[0])]

    def draw(
        distances: Float[Array, " p"], draw_key: Key[Array, ""]
    ) -> tuple[Float[Array, " p"], Float[Array, " d"]]:
        # Inverse of the cumulative distribution: one random number instead of the one
        # per point that `jax.random.categorical` takes.
        mass = jnp.where(jnp.sum(distances) > 0, distances, 1.0)
        cumulative = jnp.cumsum(mass)
        target = jax.random.uniform(draw_key) * cumulative[-1]
        index = jnp.searchsorted(cumulative, target, side="right")
        chosen = points[jnp.minimum(index, points.shape[0] - 1)]
        return jnp.minimum(distances, _squared_distance(points, chosen)), chosen

    start = _squared_distance(points, first)
    _, rest = jax.lax.scan(draw, start, jax.random.split(key, k)[1:])
    return jnp.concatenate([first[None], rest])


def _squared_distance(
    points: Float[Array, "p d"], centroid: Float[Array, " d"]
) -> Float[Array, " p"]:
    return jnp.sum(jnp.square(points - centroid[None]), axis=-1)
