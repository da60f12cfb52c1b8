"""Kashin representations by truncation, after Lyubarskii and Vershynin."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kashin_jax.decomposition import Frame, check_limits
from kashin_jax.theory.solution import (
    FrameSolution,
    remainder,
    root_mean_square,
    solved,
    unit_block,
)

__all__ = ["solve_truncation"]


class _Truncation(NamedTuple):
    u: Float[Array, "*shape"]
    v: Float[Array, "*shape"]
    residual: Float[Array, "*shape"]
    limit: Float[Array, ""]
    step: Int[Array, ""]


def solve_truncation(
    x: Float[Array, "*shape"],
    basis: Frame,
    *,
    rtol: float,
    max_steps: int,
    eta: float = 0.7,
    delta: float = 1.0,
) -> FrameSolution:
    """Frame coefficients of the residual, clipped at a limit that shrinks.

    The tight frame is [I, Q] / sqrt(2) with 2 N atoms. If it shortens every vector of
    at most `delta * 2 N` coefficients by `eta`, the residual is at most `eta**k`.
    That is not checked: with an `eta` too small the coefficients left behind no longer
    fit below the limit, and the residual stalls.

    Args:
      x: Block to decompose, as for `kashin_decompose`.
      basis: Basis of the second factor.
      rtol: Relative tolerance of the residual.
      max_steps: Upper bound on the number of steps.
      eta: Factor of the limit from step to step.
      delta: Share of the coefficients that are not clipped at first, roughly.

    Returns:
      The solution, whose level never exceeds `1 / (2 sqrt(delta) (1 - eta))`;
      `converged` says whether `residual <= rtol`.

    Raises:
      ValueError: If `rtol <= 0`, `max_steps < 1`, or `eta` or `delta` is not a share.

    Source: Lyubarskii and Vershynin, "Uncertainty principles and vector quantization",
    IEEE Trans. Inf. Theory 56 (2010).
    """
    check_limits(rtol, max_steps)
    if not 0 < eta < 1:
        raise ValueError(f"`eta` must lie in (0, 1). Got eta={eta}.")
    if not 0 < delta <= 1:
        raise ValueError(f"`delta` must lie in (0, 1]. Got delta={delta}.")
    return _solve(x, basis, rtol, max_steps, eta, 0.5 / delta**0.5)


@jax.jit
def _solve(
    x: Float[Array, "*shape"],
    basis: Frame,
    rtol: float | Float[Array, ""],
    max_steps: int | Int[Array, ""],
    eta: float | Float[Array, ""],
    first_limit: float | Float[Array, ""],
) -> FrameSolution:
    target, scale = unit_block(x)

    def unfinished(state: _Truncation) -> Array:
        above = root_mean_square(state.residual) > rtol
        return above & (state.step < max_steps)

    def clip_and_shrink(state: _Truncation) -> _Truncation:
        clipped = lambda y: jnp.clip(y / 2, -state.limit, state.limit)
        u = state.u + clipped(state.residual)
        v = state.v + clipped(basis.analysis(state.residual))
        residual = remainder(target, u, v, basis)
        return _Truncation(u, v, residual, eta * state.limit, state.step + 1)

    zeros = jnp.zeros_like(target)
    # |x|_2 / sqrt(2 N delta) on coefficients of [I, Q] / sqrt(2), in units of u and v.
    limit = jnp.asarray(first_limit, jnp.float32)
    start = _Truncation(zeros, zeros, target, limit, jnp.int32(0))
    end = jax.lax.while_loop(unfinished, clip_and_shrink, start)
    return solved(
        target, end.u, end.v, basis, scale=scale, num_steps=end.step,
        converged=root_mean_square(end.residual) <= rtol,
    )  # fmt: skip
