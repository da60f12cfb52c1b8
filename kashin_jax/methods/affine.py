"""Round-to-nearest on uniform grids: per tensor, per channel, in groups.

Groups run along the input axis of a Flax kernel `[in, out]`, each output channel on
its own, as everybody's groups do (torch weights are `[out, in]`).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

__all__ = ["AffineCode", "minmax_code", "rtn_code"]


class AffineCode(NamedTuple):
    """Codes with `w = scale * (code - zero)` in every group.

    Attributes:
      codes: `[groups, size, out]`, rows of the last group padded.
      scale: Step of every group.
      zero: Code that stands for 0; whole for `rtn_code` only.
    """

    codes: UInt8[Array, "g s n"]
    scale: Float[Array, "g 1 n"]
    zero: Float[Array, "g 1 n"]


@partial(jax.jit, static_argnames="bits")
def rtn_code(groups: Float[Array, "g s n"], bits: int) -> AffineCode:
    """Asymmetric round-to-nearest: fp16 step, whole zero point of `bits` bits.

    The range always contains 0, which is then coded exactly: the definition behind
    published "RTN" rows (GPTQ, OmniQuant). A group of zeros has step 0.

    An overflowing fp16 step shows as infinity.
    """
    levels = 2**bits - 1
    low = jnp.minimum(jnp.min(groups, axis=1, keepdims=True), 0.0)
    high = jnp.maximum(jnp.max(groups, axis=1, keepdims=True), 0.0)
    # Rounded to its stored type first, so that the codes fit the step they decode by.
    scale = ((high - low) / levels).astype(jnp.float16).astype(jnp.float32)
    safe = jnp.where(scale > 0, scale, 1.0)
    zero = jnp.clip(jnp.round(-low / safe), 0, levels)
    codes = jnp.clip(jnp.round(groups / safe) + zero, 0, levels)
    return AffineCode(codes.astype(jnp.uint8), scale, zero)


@partial(jax.jit, static_argnames="bits")
def minmax_code(groups: Float[Array, "g s n"], bits: int) -> AffineCode:
    """`2**bits` levels from the least to the largest entry of the whole array.

    The 2024 paper's "uniform" baseline; float32 step and offset.
    """
    levels = 2**bits - 1
    low, high = jnp.min(groups), jnp.max(groups)
    scale = (high - low) / levels
    # A constant array has no range: let one step be its value.
    scale = jnp.where(scale > 0, scale, jnp.where(low != 0, jnp.abs(low), 1.0))
    zero = -low / scale
    codes = jnp.clip(jnp.round(groups / scale + zero), 0, levels)
    return AffineCode(
        codes.astype(jnp.uint8), scale.reshape(1, 1, 1), zero.reshape(1, 1, 1)
    )
