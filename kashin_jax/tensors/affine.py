"""`AffineTensor`: a matrix on uniform grids, one for every group."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8, UInt32

from kashin_jax.packing import unpack_matrix
from kashin_jax.tensors.grouped import GroupedTensor, GroupLayout

__all__ = ["AffineTensor"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AffineTensor(GroupedTensor):
    """`W = Q1 (scale * (code - zero)) Q2^T` in every group, the rotation optional.

    Attributes:
      packed_codes: Codes of all weights, row-major, with an axis of rows where these
        end between bytes.
      scale: fp16 per group and output channel, or one float32.
      zero: Per group, packed whole numbers of `bits` bits or fp16; or one float32.
      layout: Static part.
      seed: Gives Q1 and Q2; None without rotation.
    """

    kind: ClassVar[str] = "affine"

    packed_codes: UInt8[Array, " q"] | UInt8[Array, "m q"]
    scale: Float[Array, "g 1 c"]
    zero: UInt8[Array, " z"] | UInt8[Array, "g z"] | Float[Array, "g 1 c"]
    layout: GroupLayout
    seed: UInt32[Array, "2"] | None = None

    def float_zero(self) -> Float[Array, "g 1 c"]:
        """Zero points in float32, in the shape of the scales."""
        zero = self.zero
        if zero.dtype == jnp.uint8:
            groups, _, columns = self.scale.shape
            zero = unpack_matrix(zero, self.layout.bits, (groups, columns))[:, None]
        return zero.astype(jnp.float32)
