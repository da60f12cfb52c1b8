"""The smallest level: min max(|u|_inf, |v|_inf) subject to u + Q v = x."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kashin_jax.decomposition import Frame, check_limits
from kashin_jax.theory.solution import (
    FrameSolution,
    remainder,
    solved,
    unit_block,
)

__all__ = ["MinimaxSolution", "solve_minimax"]

_BETWEEN_CHECKS = 10
# Of .01 to 1, in units of N, the best after 100 steps on Gaussian, Student t3 and unit
# vectors of length 256: gaps of .5 to 1.6 percent.
_PENALTY = 0.3


class MinimaxSolution(NamedTuple):
    """A solution and the proof of how good it is.

    Attributes:
      solution: Factors and verdict; its residual is that of rounding.
      lower_bound: No factors of the same block have a level below it.
    """

    solution: FrameSolution
    lower_bound: Float[Array, ""]


class _Point(NamedTuple):
    """A pair of factors, not necessarily of the block."""

    u: Float[Array, "*shape"]
    v: Float[Array, "*shape"]


class _Splitting(NamedTuple):
    point: _Point
    best: _Point
    level: Float[Array, ""]
    lower_bound: Float[Array, ""]
    step: Int[Array, ""]


def solve_minimax(
    x: Float[Array, "*shape"], basis: Frame, *, rtol: float, max_steps: int
) -> MinimaxSolution:
    """Douglas-Rachford splitting (ADMM) with a certificate from the dual.

    As `[I, Q] [I, Q]^T = 2 I`, the projection on the constraint takes one analysis and
    one synthesis. The dual of the linear programme is

        max <x, z> / (|z|_1 + |Q^T z|_1),

    so that any z proves a lower bound; z = x gives .627 for a Gaussian block.

    Args:
      x: Block to decompose, as for `kashin_decompose`.
      basis: Basis of the second factor.
      rtol: Relative gap between the level and its lower bound at which to stop.
      max_steps: Upper bound on the number of steps; rounded up to whole tens.

    Returns:
      The best factors seen and the best lower bound; `converged` says whether
      `level - lower_bound <= rtol * level`.

    Raises:
      ValueError: If `rtol <= 0` or `max_steps < 1`.

    Source: Lyubarskii and Vershynin (2010) for the problem; Eckstein and Bertsekas,
    "On the Douglas-Rachford splitting method", Math. Programming 55 (1992).
    """
    check_limits(rtol, max_steps)
    return _solve(x, basis, rtol, max_steps)


@jax.jit
def _solve(
    x: Float[Array, "*shape"],
    basis: Frame,
    rtol: float | Float[Array, ""],
    max_steps: int | Int[Array, ""],
) -> MinimaxSolution:
    target, scale = unit_block(x)

    def gap_is_closed(state: _Splitting) -> Bool[Array, ""]:
        return state.level - state.lower_bound <= rtol * state.level

    def unfinished(state: _Splitting) -> Array:
        return ~gap_is_closed(state) & (state.step < max_steps)

    def advance(state: _Splitting) -> _Splitting:
        point = jax.lax.fori_loop(
            0, _BETWEEN_CHECKS, lambda _, p: _step(p, target, basis)[0], state.point
        )
        _, capped, slope = _step(point, target, basis)
        state = state._replace(point=point, step=state.step + _BETWEEN_CHECKS)
        return _improved(state, _projected(capped, target, basis), slope, target, basis)

    shortest = _projected(_Point(*[jnp.zeros_like(target)] * 2), target, basis)
    start = _Splitting(
        shortest, shortest, jnp.float32(jnp.inf), jnp.float32(0), jnp.int32(0)
    )
    start = _improved(start, shortest, shortest, target, basis)
    end = jax.lax.while_loop(unfinished, advance, start)
    solution = solved(
        target, *end.best, basis, scale=scale, num_steps=end.step,
        converged=gap_is_closed(end),
    )  # fmt: skip
    return MinimaxSolution(solution, end.lower_bound)


def _projected(point: _Point, target: Array, basis: Frame) -> _Point:
    """The nearest pair that adds up to the block."""
    half = remainder(target, point.u, point.v, basis) / 2
    return _Point(point.u + half, point.v + basis.analysis(half))


def _step(point: _Point, target: Array, basis: Frame) -> tuple[_Point, _Point, _Point]:
    """The next point, the capped pair, and a multiple of a subgradient of its level."""
    feasible = _projected(point, target, basis)
    mirrored = jax.tree.map(lambda a, b: 2 * a - b, feasible, point)
    cap = _cap(mirrored, _PENALTY * target.size)
    capped = jax.tree.map(lambda a: jnp.clip(a, -cap, cap), mirrored)
    following = jax.tree.map(lambda a, b, c: a + b - c, point, capped, feasible)
    return following, capped, jax.tree.map(jnp.subtract, mirrored, capped)


def _cap(point: _Point, excess: float) -> Float[Array, ""]:
    """The level at which clipping takes `excess` off the l1 norm; 0 if it has less."""
    sizes = jnp.abs(jnp.concatenate([point.u.ravel(), point.v.ravel()]))
    falling = jnp.sort(sizes, descending=True)
    counts = jnp.arange(1, falling.size + 1, dtype=jnp.float32)
    caps = (jnp.cumsum(falling) - jnp.float32(excess)) / counts
    # The cap is right where exactly the entries above it are counted: at its maximum.
    return jnp.maximum(jnp.max(caps), 0.0)


def _improved(
    state: _Splitting, candidate: _Point, slope: _Point, target: Array, basis: Frame
) -> _Splitting:
    """Keeps the better of two feasible pairs, and the better of two bounds."""
    level = jnp.maximum(jnp.max(jnp.abs(candidate.u)), jnp.max(jnp.abs(candidate.v)))
    is_better = level < state.level
    best = jax.tree.map(lambda a, b: jnp.where(is_better, a, b), candidate, state.best)
    z = (slope.u + basis.synthesis(slope.v)) / 2
    l1 = jnp.sum(jnp.abs(z)) + jnp.sum(jnp.abs(basis.analysis(z)))
    bound = jnp.sum(target * z) / jnp.where(l1 > 0, l1, 1.0)
    return state._replace(
        best=best,
        level=jnp.minimum(level, state.level),
        lower_bound=jnp.maximum(bound, state.lower_bound),
    )
