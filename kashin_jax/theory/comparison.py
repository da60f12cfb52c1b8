"""The solvers on the frame [I, Q] side by side."""

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int

from kashin_jax.decomposition import Frame, check_limits, kashin_decompose
from kashin_jax.theory.alternating import solve_alternating
from kashin_jax.theory.minimax import solve_minimax
from kashin_jax.theory.solution import FrameSolution, solved, unit_block
from kashin_jax.theory.truncation import solve_truncation

__all__ = ["SOLVERS", "ComparedSolver", "compare_solvers", "solve_greedy"]

GAP = 1e-2
"""Relative gap at which the minimax solver of a comparison stops."""


class ComparedSolver(NamedTuple):
    """One solver on one block.

    Attributes:
      residual: Relative to the block.
      level: `sqrt(N) |.|_inf / |x|_2`, the larger of both factors.
      num_steps: Each costs one analysis and one synthesis.
      converged: By the solver's own criterion.
      seconds: Median of the repeats, compilation excluded.
    """

    residual: float
    level: float
    num_steps: int
    converged: bool
    seconds: float


def solve_greedy(
    x: Float[Array, "*shape"], basis: Frame, *, rtol: float, max_steps: int
) -> FrameSolution:
    """`kashin_decompose` with its level.

    Raises:
      ValueError: If `rtol <= 0` or `max_steps < 1`.
    """
    check_limits(rtol, max_steps)
    return _solve_greedy(x, basis, rtol, max_steps)


@jax.jit
def _solve_greedy(
    x: Float[Array, "*shape"],
    basis: Frame,
    rtol: float | Float[Array, ""],
    max_steps: int | Int[Array, ""],
) -> FrameSolution:
    found = kashin_decompose(x, basis, rtol=rtol, max_steps=max_steps)
    target, _ = unit_block(x)
    solution = solved(
        target, found.u, found.v, basis, scale=found.scale,
        num_steps=found.num_steps, converged=found.converged,
    )  # fmt: skip
    return solution._replace(residual=found.residual)


SOLVERS: Mapping[str, Callable[..., FrameSolution]] = MappingProxyType(
    {
        "greedy": solve_greedy,
        "alternating": lambda *a, **k: solve_alternating(*a, **k).solution,
        "truncation": solve_truncation,
        "minimax": lambda *a, rtol, max_steps: (
            solve_minimax(*a, rtol=GAP, max_steps=max_steps).solution
        ),
    }
)
"""By name, all called as `solver(x, basis, rtol=, max_steps=)`."""


def compare_solvers(
    x: Float[Array, "*shape"],
    basis: Frame,
    *,
    rtol: float = 1e-6,
    max_steps: int = 400,
    repeats: int = 3,
) -> dict[str, ComparedSolver]:
    """Runs every solver on one block, in this process, one after the other.

    Args:
      x: The block.
      basis: Basis of the second factor.
      rtol: Relative tolerance of the residual; that of `minimax` is always rounding,
        and it stops at a gap of `GAP` between its level and the proven bound.
      max_steps: For each solver.
      repeats: Timed runs after one that compiles.

    Raises:
      ValueError: If `rtol <= 0`, `max_steps < 4` or `repeats < 1`.
    """
    if repeats < 1:
        raise ValueError(f"`repeats` must be at least 1. Got {repeats}.")
    compared = {}
    for name, solver in SOLVERS.items():
        run = partial(solver, x, basis, rtol=rtol, max_steps=max_steps)
        solution = jax.block_until_ready(run())
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds.append(time.perf_counter() - start)
        compared[name] = ComparedSolver(
            residual=float(solution.residual),
            level=float(solution.level),
            num_steps=int(solution.num_steps),
            converged=bool(solution.converged),
            seconds=statistics.median(seconds),
        )
    return compared
