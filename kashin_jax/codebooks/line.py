"""Lloyd's algorithm on sorted scalars: exact steps in O(k log p) each."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from kashin_jax.codebooks.starts import (
    fold_centroids,
    kmeans_plus_plus,
)

__all__ = ["ScalarCodebook", "assign_scalars", "fit_scalars", "lloyd_sorted"]


class ScalarCodebook(NamedTuple):
    """Ascending levels, with how they were reached.

    Attributes:
      levels: Level `c` is what code `c` decodes to.
      inertia: Mean over the points of the squared distance to the nearest level.
      num_steps: Lloyd steps taken.
      converged: Whether the last shift of every level was within tolerance.
    """

    levels: Float[Array, " k"]
    inertia: Float[Array, ""]
    num_steps: Int[Array, ""]
    converged: Bool[Array, ""]


@jax.jit
def assign_scalars(
    x: Float[Array, "*shape"], levels: Float[Array, " k"]
) -> UInt8[Array, "*shape"]:
    """Nearest of ascending `levels` for every entry; ties go to the lower code."""
    middles = _midpoints(levels)

    def above(i: Int[Array, ""], codes: UInt8[Array, "*s"]) -> UInt8[Array, "*s"]:
        return codes + (x > middles[i]).astype(jnp.uint8)

    return fold_centroids(len(middles), above, jnp.zeros(x.shape, jnp.uint8))


def lloyd_sorted(
    ascending: Float[Array, " p"],
    start: Float[Array, " k"],
    *,
    rtol: float | Float[Array, ""],
    max_steps: int | Int[Array, ""],
) -> ScalarCodebook:
    """Fits levels to sorted points: a cluster is a range, its mean two prefix sums.

    Args:
      ascending: Sorted points in any unit, best centred (prefix sums are float32).
      start: Ascending starting levels.
      rtol: Stop when no level moved by more than `rtol` times the root-mean-square of
        the points.
      max_steps: Upper bound on the number of steps.
    """
    tolerance = rtol * jnp.sqrt(jnp.mean(jnp.square(ascending)))
    zero = jnp.zeros((1,), ascending.dtype)
    prefix = jnp.concatenate([zero, jnp.cumsum(ascending)])
    ends = jnp.array([0, ascending.shape[0]], jnp.int32)

    def moving(state: tuple[Array, Array, Array]) -> Bool[Array, ""]:
        _, shift, step = state
        return (shift > tolerance) & (step < max_steps)

    def move(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        levels, _, step = state
        # Points at a midpoint belong below, as in `assign_scalars`.
        cuts = jnp.searchsorted(ascending, _midpoints(levels), side="right")
        cuts = jnp.concatenate([ends[:1], cuts.astype(jnp.int32), ends[1:]])
        counts = jnp.diff(cuts).astype(ascending.dtype)
        means = jnp.diff(prefix[cuts]) / jnp.maximum(counts, 1.0)
        # Sorted again: rounding of a prefix sum can push the mean of a tiny cluster
        # past its neighbour.
        moved = jnp.sort(jnp.where(counts > 0, means, levels))
        return moved, jnp.max(jnp.abs(moved - levels)), step + 1

    infinite = jnp.array(jnp.inf, ascending.dtype)
    levels, shift, step = jax.lax.while_loop(
        moving, move, (start, infinite, jnp.int32(0))
    )
    inertia = jnp.mean(jnp.square(ascending - _nearest(ascending, levels)))
    return ScalarCodebook(levels, inertia, step, shift <= tolerance)


@partial(jax.jit, static_argnames=("k", "num_restarts"))
def fit_scalars(
    key: Key[Array, ""],
    points: Float[Array, " p"],
    k: int,
    *,
    num_restarts: int,
    rtol: float | Float[Array, ""],
    max_steps: int | Int[Array, ""],
) -> ScalarCodebook:
    """Best of two deterministic and `num_restarts` k-means++ starts, on all points.

    The deterministic ones are the quantiles and the high-rate optimal density. All
    starts see all points: on heavy tails a sample misses most of the spread (256 levels
    on Student-t(3) data: 29 times the optimal inertia from k-means++ on 4096 points,
    1.1 times from all).

    Source: Panter and Dite, "Quantization distortion in pulse-count modulation with
    nonuniform spacing of levels", Proc. IRE 39 (1951), for the density.

    Raises:
      ValueError: If `k` is not in 1..256 or there are no points.
    """
    if not 1 <= k <= 256:
        raise ValueError(f"`k` must lie in [1, 256] to fit one byte. Got k={k}.")
    if points.shape[0] == 0:
        raise ValueError("`points` is empty: there is nothing to fit a codebook to.")
    mean = jnp.mean(points)
    ascending = jnp.sort(points - mean)
    # One seed and one fit after the other: a batch would hold `p` distances for each.
    seeds = jax.lax.map(
        lambda seed_key: kmeans_plus_plus(seed_key, ascending[:, None], k)[:, 0],
        jax.random.split(key, num_restarts),
    )
    ranks = (jnp.arange(k, dtype=jnp.float32) + 0.5) / k * points.shape[0]
    quantiles = ascending[ranks.astype(jnp.int32)]
    fixed = jnp.stack([quantiles, _high_rate_levels(ascending, k)])
    starts = jnp.concatenate([fixed, jnp.sort(seeds, axis=-1)])

    def fit(start: Float[Array, " k"]) -> ScalarCodebook:
        return lloyd_sorted(ascending, start, rtol=rtol, max_steps=max_steps)

    fits = jax.lax.map(fit, starts)
    best = jax.tree.map(lambda leaf: leaf[jnp.argmin(fits.inertia)], fits)
    return best._replace(levels=best.levels + mean)


def _high_rate_levels(ascending: Float[Array, " p"], k: int) -> Float[Array, " k"]:
    # Levels of density ~ p(x)^(1/3): where neighbours are d apart, p is ~ 1/d, so that
    # the gap's share of the levels is d * d^(-1/3).
    share = jnp.cumsum(jnp.diff(ascending) ** (2 / 3))
    share = jnp.concatenate([jnp.zeros((1,), share.dtype), share])
    targets = (jnp.arange(k, dtype=share.dtype) + 0.5) / k * share[-1]
    return jnp.interp(targets, share, ascending)


def _midpoints(levels: Float[Array, " k"]) -> Float[Array, " m"]:
    return (levels[1:] + levels[:-1]) / 2


def _nearest(x: Float[Array, " p"], levels: Float[Array, " k"]) -> Float[Array, " p"]:
    middles = _midpoints(levels)

    def climb(i: Int[Array, ""], value: Float[Array, " p"]) -> Float[Array, " p"]:
        return jnp.where(x > middles[i], levels[i + 1], value)

    return fold_centroids(len(middles), climb, jnp.full(x.shape, levels[0]))
