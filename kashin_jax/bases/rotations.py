"""Plane rotations, many at once: what butterfly and Givens bases are made of."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

__all__ = ["Turn", "permute", "turn_of", "turn_pairs", "wider"]


class Turn(NamedTuple):
    """Cosines and sines of angles."""

    cos: Float[Array, "*shape"]
    sin: Float[Array, "*shape"]

    def inverse(self) -> "Turn":
        """The turn by the opposite angles, which undoes this one."""
        return Turn(self.cos, -self.sin)


def turn_of(angles: Float[Array, "*shape"], dtype: jnp.dtype) -> Turn:
    """Cosines and sines in `dtype`, computed in the wider of both types.

    A float64 array is then rotated to float64 accuracy by float32 angles.
    """
    wide = angles.astype(wider(angles.dtype, dtype))
    return Turn(jnp.cos(wide).astype(dtype), jnp.sin(wide).astype(dtype))


def turn_pairs(
    turn: Turn, first: Float[Array, "b p k"], second: Float[Array, "b p k"]
) -> tuple[Float[Array, "b p k"], Float[Array, "b p k"]]:
    """Multiplies every pair (first, second) by [[cos, -sin], [sin, cos]]."""
    cos, sin = turn.cos[None, :, None], turn.sin[None, :, None]
    return cos * first - sin * second, sin * first + cos * second


def permute(
    x: Float[Array, "b n k"], order: Int32[Array, " n"] | Int[Array, " n"]
) -> Float[Array, "b n k"]:
    """Puts entry `order[i]` of every fibre at place `i`."""
    return x.at[:, order].get(mode="promise_in_bounds", unique_indices=True)


def wider(first: jnp.dtype, second: jnp.dtype) -> jnp.dtype:
    """The floating type of more bits; the first one of two equally long types."""
    return max(first, second, key=lambda dtype: dtype.itemsize)
