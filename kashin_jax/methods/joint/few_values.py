"""Matrices of so few values that each has a code of its own: signs, constants."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from kashin_jax.methods.joint.schedules import Split

__all__ = ["few_values_code"]


@partial(jax.jit, static_argnames="split")
def few_values_code(
    weight: Float[Array, "m n"], values: Float[Array, " k"], split: Split
) -> tuple[UInt8[Array, "m n"], Float[Array, "c 2"]]:
    """Codes and centroids with `u` the values and `v` zero.

    Args:
      weight: The matrix.
      values: All that it holds, ascending.
      split: How wide codes are. Where those of odd rows are a bit narrower, they have
        centroids of their own behind the others.
    """
    fine = 2 ** (split.u + split.v)
    codes = jnp.searchsorted(values, weight.astype(jnp.float32)).astype(jnp.uint8)
    if split.half:
        codes = codes.at[1::2].add(fine)
    sizes = [fine, fine // 2] if split.half else [fine]
    # Zeros, so that a constant is not taken for a product of a level of u and one of v.
    u = jnp.concatenate([jnp.pad(values, (0, size - len(values))) for size in sizes])
    return codes, jnp.stack([u, jnp.zeros_like(u)], axis=1)
