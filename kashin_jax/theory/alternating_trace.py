"""The fixed schedule u, u, v, v round by round, and Proposition 1 checked on it."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kashin_jax.decomposition import Frame
from kashin_jax.theory.alternating import (
    SCHEDULE,
    Rounds,
    alternating_round,
    no_rounds,
)
from kashin_jax.theory.greedy_trace import RESIDUAL_FLOOR
from kashin_jax.theory.l1_bound import l1_ratio
from kashin_jax.theory.solution import root_mean_square, unit_block

__all__ = [
    "AlternatingCheck",
    "AlternatingTrace",
    "alternating_level",
    "check_alternating",
    "round_rate",
    "trace_alternating",
]


class AlternatingTrace(NamedTuple):
    """A decomposition after 0, 1, 2, ... rounds.

    Attributes:
      residuals: Residuals of the factors at that point, relative to the block; the
        first is 1.
      ratios: l1 ratio of what each round starts from; NaN of nothing.
      levels: `sqrt(N) max(|u|_inf, |v|_inf) / |x|_2`.
    """

    residuals: Float[Array, " k"]
    ratios: Float[Array, " k"]
    levels: Float[Array, " k"]


class AlternatingCheck(NamedTuple):
    """Proposition 1 on one block; both numbers are at most 1 where it holds.

    Attributes:
      rate: Largest share of its bound that a round leaves of the residual.
      level: Largest level at any point, as a share of the bound that follows from the
        smallest l1 ratio that was met.
      counted: Which rounds count: those from a residual above `RESIDUAL_FLOOR`.
    """

    rate: Float[Array, ""]
    level: Float[Array, ""]
    counted: Bool[Array, " k"]


def round_rate(ratio: float | Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Bound `sqrt(1 - beta)` of what a round leaves, `beta = ratio^4 / 36`.

    Two steps of u either lower |r|^2 by that share, or move r so little that the first
    step of v does: an l1 ratio of what the round starts from is all it takes.

    Source: Cherniuk et al. (2026), arXiv 2609.11687, Proposition 1, with
    `alpha = ratio^2`.
    """
    return jnp.sqrt(1 - jnp.asarray(ratio) ** 4 / 36)


def alternating_level(ratio: float | Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Bound `4 / beta` of `sqrt(N) |u|_inf / |x|_2` for an l1 ratio of every round.

    Source: Cherniuk et al. (2026), arXiv 2609.11687, Proposition 1.
    """
    return 144 / jnp.asarray(ratio) ** 4


@partial(jax.jit, static_argnames="rounds")
def trace_alternating(
    x: Float[Array, "*shape"], basis: Frame, *, rounds: int
) -> AlternatingTrace:
    """`solve_alternating`, with the course of the residual and of the levels.

    Args:
      x: Block to decompose; not zero.
      basis: Basis of the second factor.
      rounds: Taken whatever the residual is.

    Raises:
      ValueError: If `rounds < 1`. Checked while tracing.

    Source: Cherniuk et al. (2026), arXiv 2609.11687.
    """
    if rounds < 1:
        raise ValueError(f"`rounds` must be at least 1. Got {rounds}.")
    target, _ = unit_block(x)

    def seen(residual: Array, u: Array, v: Array) -> AlternatingTrace:
        level = jnp.maximum(jnp.max(jnp.abs(u)), jnp.max(jnp.abs(v)))
        ratio = l1_ratio(basis, residual)
        return AlternatingTrace(root_mean_square(residual), ratio, level)

    start = no_rounds(target, SCHEDULE)
    first = seen(start.residual, start.u, start.v)

    def step(state: Rounds, _: None) -> tuple[Rounds, AlternatingTrace]:
        following = alternating_round(state, target, basis, SCHEDULE)
        return following, seen(following.residual, following.u, following.v)

    _, course = jax.lax.scan(step, start, length=rounds)
    return jax.tree.map(lambda a, b: jnp.append(a, b), first, course)


@partial(jax.jit, static_argnames="rounds")
def check_alternating(
    x: Float[Array, "*shape"], basis: Frame, *, rounds: int
) -> AlternatingCheck:
    """Measures one block against Proposition 1.

    Every round has a bound of its own, by the l1 ratio of what it starts from, so that
    no constant of the basis needs to be known.

    Raises:
      ValueError: If `rounds < 1`. Checked while tracing.
    """
    trace = trace_alternating(x, basis, rounds=rounds)
    before, after = trace.residuals[:-1], trace.residuals[1:]
    counted, ratios = before > RESIDUAL_FLOOR, trace.ratios[:-1]
    shares = after / before / round_rate(ratios)
    smallest = jnp.min(jnp.where(counted, ratios, jnp.inf))
    return AlternatingCheck(
        rate=jnp.max(jnp.where(counted, shares, 0.0)),
        level=jnp.max(trace.levels) / alternating_level(smallest),
        counted=counted,
    )
