"""The library's greedy decomposition, watched step by step.

The algorithm has no memory but its residual, so a run may stop and go on from there;
the residual is recomputed from the factors at every stop, never carried over it.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kashin_jax import kashin_decompose
from kashin_jax.decomposition import Frame

__all__ = ["Progress", "advance", "begin", "relative_residual", "residual_curve"]

# Never reached: only the number of steps ends a run.
_RTOL = 1e-30


class Progress(NamedTuple):
    """`x = u + synthesis(v) + residual`, all in the units of `x`."""

    x: Float[Array, "*shape"]
    u: Float[Array, "*shape"]
    v: Float[Array, "*shape"]
    residual: Float[Array, "*shape"]


def begin(x: Float[Array, "*shape"]) -> Progress:
    """Nothing taken yet."""
    return Progress(x, jnp.zeros_like(x), jnp.zeros_like(x), x)


@partial(jax.jit, static_argnames="steps")
def advance(progress: Progress, basis: Frame, steps: int) -> Progress:
    """Takes so many greedy steps more."""
    more = kashin_decompose(progress.residual, basis, rtol=_RTOL, max_steps=steps)
    u = progress.u + more.scale * more.u
    v = progress.v + more.scale * more.v
    return Progress(progress.x, u, v, progress.x - u - basis.synthesis(v))


@jax.jit
def relative_residual(progress: Progress) -> Float[Array, ""]:
    """l2 norm of the residual over that of `x`; 0 if that is 0."""
    norm = jnp.linalg.norm(progress.x.reshape(-1))
    left = jnp.linalg.norm(progress.residual.reshape(-1))
    return left / jnp.where(norm > 0, norm, 1.0)


def residual_curve(
    x: Float[Array, "*shape"], basis: Frame, steps: int
) -> Float[Array, " {steps}+1"]:
    """Relative residuals after 0, 1, ..., `steps` greedy steps."""

    def step(progress: Progress, _: None) -> tuple[Progress, Float[Array, ""]]:
        following = advance(progress, basis, 1)
        return following, relative_residual(following)

    start = begin(x)
    _, curve = jax.lax.scan(step, start, length=steps)
    return jnp.concatenate([relative_residual(start)[None], curve])
