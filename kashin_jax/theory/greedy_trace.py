"""The greedy decomposition step by step, and Theorem 1 checked on it."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kashin_jax.decomposition import Frame
from kashin_jax.theory.solution import (
    remainder,
    root_mean_square,
    sign_step,
    unit_block,
)

__all__ = [
    "RESIDUAL_FLOOR",
    "GreedyTrace",
    "TheoremCheck",
    "check_theorem",
    "trace_greedy",
]

RESIDUAL_FLOOR = 1e-6
"""Relative residuals below it are rounding in float32."""


class GreedyTrace(NamedTuple):
    """A decomposition after 0, 1, 2, ... steps.

    Attributes:
      residuals: Residuals of the factors at that point, relative to the block; the
        first is 1.
      u_levels: `sqrt(N) |u|_inf / |x|_2`.
      v_levels: `sqrt(N) |v|_inf / |x|_2`; v is Q^T of the second summand.
    """

    residuals: Float[Array, " k"]
    u_levels: Float[Array, " k"]
    v_levels: Float[Array, " k"]


class TheoremCheck(NamedTuple):
    """The constants of Theorem 1, measured on one block.

    Attributes:
      gamma: The smallest number with `residual_k <= gamma**k` for every step k.
      slowest_step: Largest factor of the residual in a single step.
      level: Largest level of either factor at any step.
      level_bound: `1 / (1 - gamma)`, infinite where gamma is 1.
    """

    gamma: Float[Array, ""]
    slowest_step: Float[Array, ""]
    level: Float[Array, ""]
    level_bound: Float[Array, ""]


@partial(jax.jit, static_argnames=("steps",))
def trace_greedy(x: Float[Array, "*shape"], basis: Frame, *, steps: int) -> GreedyTrace:
    """`kashin_decompose`, with the course of the residual and of the levels.

    Args:
      x: Block to decompose, as for `kashin_decompose`; not zero.
      basis: Basis of the second factor.
      steps: Taken whatever the residual is, so `vmap` wastes nothing.

    Raises:
      ValueError: If `steps < 1`. Checked while tracing.

    Source: Merkulov et al. (2024), arXiv 2404.09737, vector and matrix algorithms.
    """
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1. Got {steps}.")
    target, _ = unit_block(x)

    def step(
        factors: tuple[Array, Array], _: None
    ) -> tuple[tuple[Array, Array], GreedyTrace]:
        u, v = factors
        residual = remainder(target, u, v, basis)
        du, dv = sign_step(residual), sign_step(basis.analysis(residual))
        choose_u = jnp.max(jnp.abs(du)) > jnp.max(jnp.abs(dv))
        following = (
            u + jnp.where(choose_u, du, jnp.zeros_like(du)),
            v + jnp.where(choose_u, jnp.zeros_like(dv), dv),
        )
        return following, _seen(residual, u, v)

    zeros = jnp.zeros_like(target)
    (u, v), course = jax.lax.scan(step, (zeros, zeros), length=steps)
    last = _seen(remainder(target, u, v, basis), u, v)
    return jax.tree.map(lambda a, b: jnp.append(a, b), course, last)


def _seen(residual: Array, u: Array, v: Array) -> GreedyTrace:
    largest = lambda y: jnp.max(jnp.abs(y))
    return GreedyTrace(root_mean_square(residual), largest(u), largest(v))


@partial(jax.jit, static_argnames=("steps",))
def check_theorem(
    x: Float[Array, "*shape"], basis: Frame, *, steps: int
) -> TheoremCheck:
    """Measures the constants of Theorem 1 on one block.

    The theorem says that for most Q of any size, and all blocks, gamma is below an
    absolute constant smaller than 1. The bound of the level follows from gamma. Steps
    from a residual below `RESIDUAL_FLOOR` do not count.

    Raises:
      ValueError: If `steps < 1`. Checked while tracing.
    """
    trace = trace_greedy(x, basis, steps=steps)
    before, after = trace.residuals[:-1], trace.residuals[1:]
    counts = before > RESIDUAL_FLOOR
    powers = 1 / jnp.arange(1, steps + 1, dtype=jnp.float32)
    rates = jnp.where(counts, after**powers, jnp.zeros_like(after))
    factors = jnp.where(counts, after / before, jnp.zeros_like(after))
    gamma = jnp.max(rates)
    levels = jnp.maximum(trace.u_levels, trace.v_levels)
    return TheoremCheck(gamma, jnp.max(factors), jnp.max(levels), 1 / (1 - gamma))
