"""Sign steps on the fixed schedule u, u, v, v, with codebooks in closed form."""

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

__all__ = ["AlternatingSolution", "solve_alternating"]

BLOCK = 4
"""Steps of one round: u, u, v, v."""


class AlternatingSolution(NamedTuple):
    """A solution and the four values near which the entries of each factor lie.

    Attributes:
      solution: Factors and verdict.
      u_centres: Ascending, `+-c1 +-c2` with the sizes of the first two u-steps: the
        exact values of `u` after one round, the start of its codebook later on.
      v_centres: The same for `v`.
    """

    solution: FrameSolution
    u_centres: Float[Array, "4"]
    v_centres: Float[Array, "4"]


class _Rounds(NamedTuple):
    u: Float[Array, "*shape"]
    v: Float[Array, "*shape"]
    residual: Float[Array, "*shape"]
    first_sizes: Float[Array, "4"]
    step: Int[Array, ""]


def solve_alternating(
    x: Float[Array, "*shape"], basis: Frame, *, rtol: float, max_steps: int
) -> AlternatingSolution:
    """Sign steps in turn, two per factor, without asking which is better.

    The adaptive rule loses less per step in the worst case; this one gives both
    factors four clear peaks.

    Args:
      x: Block to decompose, as for `kashin_decompose`.
      basis: Basis of the second factor.
      rtol: Relative tolerance of the residual, looked at after each round.
      max_steps: Upper bound on the number of sign steps; rounded down to whole rounds.

    Returns:
      The solution; `converged` says whether `residual <= rtol`.

    Raises:
      ValueError: If `rtol <= 0` or `max_steps < 4`.

    Source: Cherniuk et al. (2026), arXiv 2609.11687, fixed schedule and closed-form
    centroids.
    """
    check_limits(rtol, max_steps, least=BLOCK)
    return _solve(x, basis, rtol, max_steps)


@jax.jit
def _solve(
    x: Float[Array, "*shape"],
    basis: Frame,
    rtol: float | Float[Array, ""],
    max_steps: int | Int[Array, ""],
) -> AlternatingSolution:
    target, scale = unit_block(x)

    def unfinished(state: _Rounds) -> Array:
        above = root_mean_square(state.residual) > rtol
        return above & (state.step <= max_steps - BLOCK)

    zeros = jnp.zeros_like(target)
    start = _Rounds(zeros, zeros, target, jnp.zeros(BLOCK, jnp.float32), jnp.int32(0))
    end = jax.lax.while_loop(unfinished, lambda s: _round(s, target, basis), start)
    solution = solved(
        target, end.u, end.v, basis, scale=scale, num_steps=end.step,
        converged=root_mean_square(end.residual) <= rtol,
    )  # fmt: skip
    return AlternatingSolution(
        solution, _centres(end.first_sizes[:2]), _centres(end.first_sizes[2:])
    )


def _round(state: _Rounds, target: Array, basis: Frame) -> _Rounds:
    u, v, residual, sizes = state.u, state.v, state.residual, []
    for _ in range(2):
        sizes.append(jnp.mean(jnp.abs(residual)))
        u = u + sign_step(residual)
        residual = remainder(target, u, v, basis)
    for _ in range(2):
        coefs = basis.analysis(residual)
        sizes.append(jnp.mean(jnp.abs(coefs)))
        v = v + sign_step(coefs)
        residual = remainder(target, u, v, basis)
    first_sizes = jnp.where(state.step == 0, jnp.stack(sizes), state.first_sizes)
    return _Rounds(u, v, residual, first_sizes, state.step + BLOCK)


def _centres(sizes: Float[Array, "2"]) -> Float[Array, "4"]:
    outer, inner = sizes[0] + sizes[1], jnp.abs(sizes[0] - sizes[1])
    return jnp.stack([-outer, -inner, inner, outer])
