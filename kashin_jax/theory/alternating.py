"""Sign steps on the fixed schedule u, u, v, v, with codebooks in closed form."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kashin_jax.decomposition import Frame, check_limits
from kashin_jax.theory.solution import (
    FrameSolution,
    remainder,
    root_mean_square,
    sign_step,
    solved,
    unit_block,
)

__all__ = [
    "SCHEDULE",
    "AlternatingSolution",
    "Rounds",
    "alternating_round",
    "no_rounds",
    "solve_alternating",
]

SCHEDULE = (2, 2)
"""Steps of one round for u and for v: u, u, v, v."""


class AlternatingSolution(NamedTuple):
    """A solution and the few values near which the entries of each factor lie.

    Attributes:
      solution: Factors and verdict.
      u_centres: Ascending, `+-c1 +-c2` with the sizes of the first two u-steps: the
        exact values of `u` after one round, the start of its codebook later on. Of
        more or fewer steps in a round, all sums of their sizes with either sign.
      v_centres: The same for `v`.
    """

    solution: FrameSolution
    u_centres: Float[Array, " a"]
    v_centres: Float[Array, " b"]


class Rounds(NamedTuple):
    """Factors after some rounds, in units of the block.

    Attributes:
      u: Factor in the standard basis.
      v: Factor in the coordinates of the basis.
      residual: What they leave of the block.
      first_sizes: Sizes of the steps of the first round.
      step: Steps so far.
    """

    u: Float[Array, "*shape"]
    v: Float[Array, "*shape"]
    residual: Float[Array, "*shape"]
    first_sizes: Float[Array, " s"]
    step: Int[Array, ""]


def solve_alternating(
    x: Float[Array, "*shape"],
    basis: Frame,
    *,
    rtol: float,
    max_steps: int,
    schedule: tuple[int, int] = SCHEDULE,
) -> AlternatingSolution:
    """Sign steps in turn, two per factor, without asking which is better.

    The adaptive rule loses less per step in the worst case; this one gives both
    factors four clear peaks. A round costs one analysis and one synthesis, whatever
    its steps: those of v are taken in the coordinates of the basis.

    Args:
      x: Block to decompose, as for `kashin_decompose`.
      basis: Basis of the second factor.
      rtol: Relative tolerance of the residual, looked at after each round.
      max_steps: Upper bound on the number of sign steps; rounded down to whole rounds.
      schedule: Steps of a round for u, and then for v; the paper's is two and two.

    Returns:
      The solution; `converged` says whether `residual <= rtol`.

    Raises:
      ValueError: If `rtol <= 0`, a round has no step for a factor, or `max_steps` is
        less than a round.

    Source: Cherniuk et al. (2026), arXiv 2609.11687, fixed schedule and closed-form
    centroids.
    """
    if min(schedule) < 1:
        raise ValueError(
            f"`schedule` must have a step for each factor at least. Got {schedule}."
        )
    check_limits(rtol, max_steps, least=sum(schedule))
    return _solve(x, basis, rtol, max_steps, schedule)


@partial(jax.jit, static_argnames="schedule")
def _solve(
    x: Float[Array, "*shape"],
    basis: Frame,
    rtol: float | Float[Array, ""],
    max_steps: int | Int[Array, ""],
    schedule: tuple[int, int],
) -> AlternatingSolution:
    target, scale = unit_block(x)
    steps = sum(schedule)

    def unfinished(state: Rounds) -> Array:
        above = root_mean_square(state.residual) > rtol
        return above & (state.step <= max_steps - steps)

    start = no_rounds(target, schedule)
    end = jax.lax.while_loop(
        unfinished, lambda s: alternating_round(s, target, basis, schedule), start
    )
    solution = solved(
        target, end.u, end.v, basis, scale=scale, num_steps=end.step,
        converged=root_mean_square(end.residual) <= rtol,
    )  # fmt: skip
    of_u, of_v = jnp.split(end.first_sizes, schedule[:1])
    return AlternatingSolution(solution, _centres(of_u), _centres(of_v))


def no_rounds(target: Float[Array, "*shape"], schedule: tuple[int, int]) -> Rounds:
    """Where the rounds of a block of unit root-mean-square begin."""
    zeros, sizes = jnp.zeros_like(target), jnp.zeros(sum(schedule), jnp.float32)
    return Rounds(zeros, zeros, target, sizes, jnp.int32(0))


def alternating_round(
    state: Rounds,
    target: Float[Array, "*shape"],
    basis: Frame,
    schedule: tuple[int, int],
) -> Rounds:
    """A round further: one analysis and one synthesis, whatever its steps."""
    u, residual, of_u = _descended(state.u, state.residual, schedule[0])
    v, _, of_v = _descended(state.v, basis.analysis(residual), schedule[1])
    residual = remainder(target, u, v, basis)
    first_sizes = jnp.where(
        state.step == 0, jnp.stack([*of_u, *of_v]), state.first_sizes
    )
    return Rounds(u, v, residual, first_sizes, state.step + sum(schedule))


def _descended(
    factor: Array, left: Array, steps: int
) -> tuple[Array, Array, list[Array]]:
    """A factor after sign steps along what is left, the rest, and sizes of steps."""
    sizes = []
    for _ in range(steps):
        sizes.append(jnp.mean(jnp.abs(left)))
        step = sign_step(left)
        factor, left = factor + step, left - step
    return factor, left, sizes


def _centres(sizes: Float[Array, " s"]) -> Float[Array, " k"]:
    sums = jnp.zeros(1, sizes.dtype)
    for size in sizes:
        sums = jnp.concatenate([sums - size, sums + size])
    return jnp.sort(sums)
