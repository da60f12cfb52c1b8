"""Search for the codes of u and v together: x = u + Q v with few levels in each factor.

The nearest word of {u + Q v} is sought by mean-field annealing. At temperature T every
entry of u is the mean of its levels under the weights

    exp(-((h - c)^2 - a (c - u)^2) / 2 T),  h = x - Q v,

then v likewise with h = Q^T (x - u), and T falls. The term with `a`, the repulsion, is
zero at every word, where c = u, and so changes no minimum; it keeps an entry from
settling on the level it leans to before the others have been heard. That is worth more
than a schedule of any length: see `python -m benchmarks.joint` and
`docs/joint-coding.md`, which has the history.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kashin_jax.bases import KroneckerBasis, dense
from kashin_jax.methods.joint.schedules import Plan, Schedule, Split, schedule_for
from kashin_jax.methods.joint.words import (
    Levels,
    Words,
    coarse_rows,
    in_passes,
    nearest_codes,
    polished,
    polished_codes,
)

__all__ = ["anneal", "level_mean"]

LevelList = Sequence[Float[Array, "..."]]

# Weights annealed at a time. On a CPU they stay in its cache; an H100 needs this many
# to be busy (0.85 G weights/s at 50 steps and 1 + 1 bits, 0.25 with a CPU's).
_CPU_PASS, _ACCELERATOR_PASS = 2**17, 2**22
# Up to this side a basis is one dense matrix in the search: on two CPU cores a step
# takes four fifths of the time of two factors, on an H100 a third.
_DENSE_SIDE = 128


def level_mean(
    h: Float[Array, "*b"], levels: LevelList, temperature: Float[Array, ""]
) -> Float[Array, "*b"]:
    """Mean of the levels under the weights exp(-(h - c)^2 / 2 T).

    Args:
      h: Fields.
      levels: Each a number, or an array that broadcasts to the shape of `h`.
      temperature: T, positive.
    """
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


@partial(jax.jit, static_argnames=("split", "steps", "pass_size", "schedule"))
def anneal(
    blocks: Float[Array, "k m n"],
    basis: KroneckerBasis,
    *,
    split: Split,
    steps: int,
    pass_size: int | None = None,
    schedule: Schedule | None = None,
    levels: Levels | None = None,
) -> Words:
    """Finds a word for every block, the levels refitted to all blocks together.

    Deterministic, and each block's search independent of the others.

    Args:
      blocks: Blocks of unit root-mean-square; zero blocks are allowed.
      basis: Basis of one block.
      split: Bits of u and of v, a key of `LONG`.
      steps: Number of steps of the annealing.
      pass_size: Weights that are annealed at a time, which bounds the memory; None
        takes what suits the device.
      schedule: How the search cools; what `schedule_for` gives when None.
      levels: Levels of the words, where they are known; refitted to the blocks when
        None.
    """
    schedule = schedule_for(split, steps) if schedule is None else schedule
    if pass_size is None:
        is_cpu = jax.default_backend() == "cpu"
        pass_size = _CPU_PASS if is_cpu else _ACCELERATOR_PASS
    coarse = schedule.levels_coarse
    searched = Levels(
        u=_mirrored(schedule.levels_u),
        v=_mirrored(schedule.levels_v),
        coarse=_mirrored(coarse) if coarse else None,
    )

    def first(x: Float[Array, "m n"]) -> tuple[Array, Array]:
        v = _soft_v(x, basis, searched, schedule.plan(steps))
        return nearest_codes(x, v, searched if levels is None else levels, basis)

    u, v = in_passes(first, blocks, pass_size)
    if levels is None:
        return polished(blocks, Words(u, v, searched), basis, pass_size)
    return polished_codes(blocks, Words(u, v, levels), basis, pass_size)


def _mirrored(levels: tuple[float, ...]) -> Float[Array, " k"]:
    return jnp.asarray([-c for c in reversed(levels)] + [*levels], jnp.float32)


def _row_levels(levels: Levels, rows: int) -> LevelList:
    """The levels of u; where rows differ, each an array of one value per row.

    A coarse level stands twice, which doubles all weights and moves no mean.
    """
    if levels.coarse is None:
        return [*levels.u]
    coarse = jnp.repeat(levels.coarse, 2)
    is_coarse = coarse_rows(rows)
    return [jnp.where(is_coarse, c, f) for f, c in zip(levels.u, coarse, strict=True)]


def _soft_v(
    x: Float[Array, "m n"], basis: KroneckerBasis, levels: Levels, plan: Plan
) -> Float[Array, "m n"]:
    """The v of one block at the end of the annealing."""
    of_u, of_v = _row_levels(levels, x.shape[0]), [*levels.v]
    analysis, synthesis = _transforms(basis, (x.shape[0], x.shape[1]))

    def mean(
        h: Float[Array, "m n"],
        old: Float[Array, "m n"],
        levels: LevelList,
        a: Any,
        temperature: Any,
    ) -> Float[Array, "m n"]:
        # The weights with repulsion are those without, for another h and T.
        return level_mean((h - a * old) / (1 - a), levels, temperature / (1 - a))

    def step(
        state: tuple[Float[Array, "m n"], Float[Array, "m n"]], now: Plan
    ) -> tuple[tuple[Float[Array, "m n"], Float[Array, "m n"]], None]:
        u, v = state
        d = jnp.asarray(now.damping)
        h = x - synthesis(v)
        u = d * u + (1 - d) * mean(h, u, of_u, now.a_u, now.t_u)
        h = analysis(x - u)
        v = d * v + (1 - d) * mean(h, v, of_v, now.a_v, now.t_v)
        return (u, v), None

    # Zero would be a saddle for symmetric x; a little of x itself is not.
    start = (0.02 * x, jnp.zeros_like(x))
    course = Plan(*(jnp.asarray(values, jnp.float32) for values in plan))
    (_, v), _ = jax.lax.scan(step, start, course)
    return v


def _transforms(
    basis: KroneckerBasis, shape: tuple[int, int]
) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """Analysis and synthesis of one block, as fast as the search may have them."""
    if max(shape) > _DENSE_SIDE:
        return basis.analysis, basis.synthesis
    left, right = dense(basis.left, shape[0]), dense(basis.right, shape[1])
    # A mean of levels needs no more digits than TF32 has: .07172 of mean squared error
    # with it and with float32, 16.8 M weights; the last rounds are exact again.
    product = partial(jnp.matmul, precision=jax.lax.Precision.DEFAULT)
    return (
        lambda x: product(left.T, product(x, right)),
        lambda v: product(left, product(v, right.T)),
    )
