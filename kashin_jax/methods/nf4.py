"""NF4: groups on 16 fixed levels, the quantiles of a normal variable."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from kashin_jax.codebooks import assign_scalars
from kashin_jax.methods.base import Encoded, Method, register
from kashin_jax.methods.kmeans import ScalarCode
from kashin_jax.tensors import CodebookTensor
from kashin_jax.tensors.codebook import NF4_LEVELS
from kashin_jax.tensors.grouped import GroupLayout, group_rows

__all__ = ["NF4", "nf4_code"]


@register("nf4")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NF4(Method):
    """NF4 with fp16 scales and no double quantization.

    Attributes:
      bits: Always 4.
      group_size: Weights of one output channel that share a scale.
    """

    bits: int = 4
    group_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits != 4:
            raise ValueError(f"NF4 exists at 4 bits only. Got bits={self.bits}.")

    def encode(self, weight: Float[Array, "m n"], key: Key[Array, ""]) -> Encoded:
        """Encodes without any randomness."""
        layout = GroupLayout.of(weight, self.group_size, self.bits)
        return Encoded(_encode(weight.astype(jnp.float32), layout))


@partial(jax.jit, static_argnames="layout")
def _encode(x: Float[Array, "m n"], layout: GroupLayout) -> CodebookTensor:
    code = nf4_code(group_rows(x, layout.group_size or x.shape[0]))
    scale = code.scale.astype(jnp.float16)
    return CodebookTensor(layout.pack(code.codes), None, scale, None, layout)


@jax.jit
def nf4_code(groups: Float[Array, "g s n"]) -> ScalarCode:
    """NF4: the nearest of 16 fixed levels after division by the group's largest entry.

    The scale is fp16, rounded before the codes are chosen.
    """
    peak = jnp.max(jnp.abs(groups), axis=1, keepdims=True)
    scale = peak.astype(jnp.float16).astype(jnp.float32)
    levels = jnp.asarray(NF4_LEVELS)
    codes = assign_scalars(groups / jnp.where(scale > 0, scale, 1.0), levels)
    return ScalarCode(codes, levels, scale)
