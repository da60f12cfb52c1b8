"""What every solver on the frame [I, Q] returns, and the pieces they share.

A solver writes x as u + Q v with both factors of small max-norm. All work on a block of
unit root-mean-square, where a max-norm is `sqrt(N) |u|_inf / |x|_2`: the level that
Kashin's theorem bounds by a constant.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kashin_jax.decomposition import Frame, at_unit_rms, peak_and_rms

__all__ = [
    "FrameSolution",
    "remainder",
    "root_mean_square",
    "sign_step",
    "solved",
    "unit_block",
]


class FrameSolution(NamedTuple):
    """One block as `x = scale * (u + synthesis(v) + residual)`.

    Attributes:
      u: Factor in the standard basis, for a block of unit root-mean-square.
      v: Factor in the coordinates of the basis, in the same units.
      scale: Root-mean-square of the block, in the units of `x`; 0 for a zero block.
      residual: l2 norm of the residual over that of the block, computed from the
        returned factors.
      level: The larger max-norm of the two factors, `sqrt(N) |.|_inf / |x|_2`.
      num_steps: Steps taken; each costs one analysis and one synthesis.
      converged: Whether the solver's own criterion is met.
    """

    u: Float[Array, "*shape"]
    v: Float[Array, "*shape"]
    scale: Float[Array, ""]
    residual: Float[Array, ""]
    level: Float[Array, ""]
    num_steps: Int[Array, ""]
    converged: Bool[Array, ""]


def root_mean_square(x: Float[Array, "*shape"]) -> Float[Array, ""]:
    return jnp.sqrt(jnp.mean(jnp.square(x)))


def unit_block(
    x: Float[Array, "*shape"],
) -> tuple[Float[Array, "*shape"], Float[Array, ""]]:
    """The block in float32 at unit root-mean-square, and what it was divided by."""
    peak, rms = peak_and_rms(x)
    return at_unit_rms(x, peak, rms), peak * rms


def remainder(
    x: Float[Array, "*shape"],
    u: Float[Array, "*shape"],
    v: Float[Array, "*shape"],
    basis: Frame,
) -> Float[Array, "*shape"]:
    """`x - u - Q v`, always from the factors: a carried residual is too optimistic."""
    return x - u - basis.synthesis(v)


def sign_step(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`(|x|_1 / N) sign(x)`, the projection of x on its sign vector."""
    return jnp.mean(jnp.abs(x)) * jnp.sign(x)


def solved(
    x: Float[Array, "*shape"],
    u: Float[Array, "*shape"],
    v: Float[Array, "*shape"],
    basis: Frame,
    *,
    scale: Float[Array, ""],
    num_steps: Int[Array, ""],
    converged: Bool[Array, ""],
) -> FrameSolution:
    """Adds what is measured on the factors of the unit block `x`."""
    return FrameSolution(
        u=u,
        v=v,
        scale=scale,
        residual=root_mean_square(remainder(x, u, v, basis)),
        level=jnp.maximum(jnp.max(jnp.abs(u)), jnp.max(jnp.abs(v))),
        num_steps=num_steps,
        converged=converged,
    )
