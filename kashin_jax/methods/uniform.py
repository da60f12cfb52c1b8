"""The 2024 paper's "uniform" baseline: one grid for the whole matrix."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from kashin_jax.methods.base import Encoded, Method, register
from kashin_jax.methods.rtn import AffineCode
from kashin_jax.tensors import AffineTensor
from kashin_jax.tensors.grouped import GroupLayout, group_rows

__all__ = ["Uniform", "minmax_code"]


@register("uniform")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform(Method):
    """Min-max grid per tensor, float32 step and offset (the 2024 paper's "uniform").

    Attributes:
      bits: Code width.
    """

    bits: int = 4

    def encode(self, weight: Float[Array, "m n"], key: Key[Array, ""]) -> Encoded:
        """Encodes without any randomness."""
        layout = GroupLayout.of(weight, None, self.bits)
        return Encoded(_encode(weight.astype(jnp.float32), layout))


@partial(jax.jit, static_argnames="layout")
def _encode(x: Float[Array, "m n"], layout: GroupLayout) -> AffineTensor:
    code = minmax_code(group_rows(x, x.shape[0]), layout.bits)
    return AffineTensor(layout.pack(code.codes), code.scale, code.zero, layout)


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
