"""Search for the codes of u and v together: x = u + Q v with few levels in each factor.

The nearest word of {u + Q v} is sought by mean-field annealing. At temperature T every
entry of u is the mean of its levels under the weights

    exp(-((h - c)^2 - a (c - u)^2) / 2 T),  h = x - Q v,

then v likewise with h = Q^T (x - u), and T falls. The term with `a`, the repulsion, is
zero at every word, where c = u, and so changes no minimum; it keeps an entry from
settling on the level it leans to before the others have been heard. That is worth more
than a schedule of any length: at 1 + 1 bits and 200 steps the mean squared error on a
unit Gaussian is .0697 with it and .0776 without, 4096 weights per block
(`python -m benchmarks.joint`; `docs/joint-coding.md` has the history).
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from kashin_jax.bases import KroneckerBasis
from kashin_jax.codebooks import assign_scalars
from kashin_jax.codebooks.gaussian import lloyd_max_levels

__all__ = ["SCHEDULES", "Schedule", "Words", "anneal", "level_mean"]

Levels = Sequence[Float[Array, ""]]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the search cools, for blocks of unit root-mean-square.

    Pairs are first and last values.

    Attributes:
      repulsion: `a` of u, in [0, 1), on a straight line between the two.
      ratio: `a` of v over that of u.
      damping: Share of the old value that is kept in a step.
      temperature: T, geometric; the last in units of 4^-(bits of u and v).
      power: The progress of the temperature is that of the steps to this power.
      spread: Factors on the Lloyd-Max levels of u and of v to begin with.
    """

    repulsion: tuple[float, float]
    ratio: float
    damping: tuple[float, float]
    temperature: tuple[float, float]
    power: float
    spread: tuple[float, float]


# Found by random search at 200 steps on 65,536 Gaussian weights in blocks of 64 x 64.
SCHEDULES = {
    (1, 1): Schedule(
        repulsion=(0.886, 0.128), ratio=1.03, damping=(0.376, 0.225),
        temperature=(0.293, 0.611), power=0.575, spread=(0.837, 0.874),
    ),
    (2, 1): Schedule(
        repulsion=(0.794, 0.133), ratio=1.086, damping=(0.411, 0.124),
        temperature=(0.227, 0.640), power=0.471, spread=(0.832, 0.487),
    ),
    (3, 1): Schedule(
        repulsion=(0.831, 0.116), ratio=1.056, damping=(0.430, 0.176),
        temperature=(0.204, 0.740), power=0.328, spread=(0.880, 0.259),
    ),
    (4, 1): Schedule(
        repulsion=(0.831, 0.116), ratio=1.056, damping=(0.430, 0.176),
        temperature=(0.204, 0.740), power=0.328, spread=(0.950, 0.130),
    ),
}  # fmt: skip
_POLISH_ROUNDS = 12


class Words(NamedTuple):
    """The words that were found for some blocks.

    Attributes:
      u: Index of a level for every entry of u.
      v: The same for v.
      levels_u: Ascending, shared by all blocks.
      levels_v: The same for v.
    """

    u: UInt8[Array, "k m n"]
    v: UInt8[Array, "k m n"]
    levels_u: Float[Array, " ku"]
    levels_v: Float[Array, " kv"]


def level_mean(
    h: Float[Array, "*b"], levels: Levels, temperature: Float[Array, ""]
) -> Float[Array, "*b"]:
    """Mean of the levels under the weights exp(-(h - c)^2 / 2 T)."""
    if len(levels) == 2:
        low, high = levels
        half = (high - low) / 2
        lean = (h - (high + low) / 2) * (half / temperature)
        return (high + low) / 2 + half * jnp.tanh(lean)
    # Relative to the nearest level, so that nothing overflows; levels stay unrolled,
    # since an axis of them would multiply the memory.
    gaps = [jnp.square(h - c) for c in levels]
    least = gaps[0]
    for gap in gaps[1:]:
        least = jnp.minimum(least, gap)
    weights = [jnp.exp((least - gap) / (2 * temperature)) for gap in gaps]
    total, moment = weights[0], weights[0] * levels[0]
    for weight, level in zip(weights[1:], levels[1:], strict=True):
        total, moment = total + weight, moment + weight * level
    return moment / total


def _refit(
    h: Float[Array, "*b"], index: UInt8[Array, "*b"], levels: Float[Array, " k"]
) -> Float[Array, " k"]:
    """The mean of `h` where each level is used; an unused level stays."""

    def one(i: int) -> Float[Array, ""]:
        mine = index == i
        count = jnp.sum(mine).astype(jnp.float32)
        mean = jnp.sum(jnp.where(mine, h, 0.0)) / jnp.maximum(count, 1.0)
        return jnp.where(count > 0, mean, levels[i])

    return jnp.sort(jnp.stack([one(i) for i in range(levels.shape[0])]))


@partial(jax.jit, static_argnames=("bits", "steps", "pass_size", "schedule"))
def anneal(
    blocks: Float[Array, "k m n"],
    basis: KroneckerBasis,
    *,
    bits: tuple[int, int],
    steps: int,
    pass_size: int = 2**17,
    schedule: Schedule | None = None,
) -> Words:
    """Finds a word for every block, the levels refitted to all blocks together.

    Deterministic, and each block's search independent of the others.

    Args:
      blocks: Of unit root-mean-square; zero blocks are allowed.
      basis: Of one block.
      bits: Of u and of v, a key of `SCHEDULES`.
      steps: Of the annealing.
      pass_size: Weights that are annealed at a time, which bounds the memory.
      schedule: That of `SCHEDULES` when None.
    """
    schedule = SCHEDULES[bits] if schedule is None else schedule
    levels = (
        jnp.asarray(lloyd_max_levels(2 ** bits[0]), jnp.float32) * schedule.spread[0],
        jnp.asarray(lloyd_max_levels(2 ** bits[1]), jnp.float32) * schedule.spread[1],
    )

    def soft(block: Float[Array, "m n"]) -> Float[Array, "m n"]:
        return _soft_v(block, basis, levels, schedule, sum(bits), steps)

    size = max(1, pass_size // (blocks.shape[1] * blocks.shape[2]))
    v = jax.lax.map(soft, blocks, batch_size=min(size, blocks.shape[0]))
    return _polished(blocks, v, basis, *levels)


def _soft_v(
    x: Float[Array, "m n"],
    basis: KroneckerBasis,
    levels: tuple[Float[Array, " ku"], Float[Array, " kv"]],
    schedule: Schedule,
    total_bits: int,
    steps: int,
) -> Float[Array, "m n"]:
    """The v of one block at the end of the annealing."""
    of_u, of_v = ([*each] for each in levels)
    (a0, a1), (d0, d1) = schedule.repulsion, schedule.damping
    t0, t1 = schedule.temperature[0], schedule.temperature[1] * 4.0**-total_bits

    def mean(
        h: Float[Array, "m n"],
        old: Float[Array, "m n"],
        levels: Levels,
        a: Float[Array, ""],
        temperature: Float[Array, ""],
    ) -> Float[Array, "m n"]:
        # The weights with repulsion are those without, for another h and T.
        return level_mean((h - a * old) / (1 - a), levels, temperature / (1 - a))

    def step(
        i: Array, state: tuple[Float[Array, "m n"], Float[Array, "m n"]]
    ) -> tuple[Float[Array, "m n"], Float[Array, "m n"]]:
        u, v = state
        done = i.astype(jnp.float32) / max(steps - 1, 1)
        t = t0 * (t1 / t0) ** (done**schedule.power)
        a, d = a0 + (a1 - a0) * done, d0 + (d1 - d0) * done
        u = d * u + (1 - d) * mean(x - basis.synthesis(v), u, of_u, a, t)
        h = basis.analysis(x - u)
        v = d * v + (1 - d) * mean(h, v, of_v, a * schedule.ratio, t)
        return u, v

    # Zero would be a saddle for symmetric x; a little of x itself is not.
    start = (0.02 * x, jnp.zeros_like(x))
    _, v = jax.lax.fori_loop(0, steps, step, start)
    return v


def _polished(
    x: Float[Array, "k m n"],
    v: Float[Array, "k m n"],
    basis: KroneckerBasis,
    levels_u: Float[Array, " ku"],
    levels_v: Float[Array, " kv"],
) -> Words:
    """Rounds, then alternates nearest levels and their means, which never hurts."""
    h = x - basis.synthesis(v)
    u = assign_scalars(h, levels_u)
    v_index = assign_scalars(basis.analysis(x - levels_u[u]), levels_v)

    def round_trip(_: Array, words: Words) -> Words:
        h = x - basis.synthesis(words.levels_v[words.v])
        levels_u = _refit(h, words.u, words.levels_u)
        u = assign_scalars(h, levels_u)
        h = basis.analysis(x - levels_u[u])
        levels_v = _refit(h, words.v, words.levels_v)
        return Words(u, assign_scalars(h, levels_v), levels_u, levels_v)

    first = Words(u, v_index, levels_u, levels_v)
    return jax.lax.fori_loop(0, _POLISH_ROUNDS, round_trip, first)
