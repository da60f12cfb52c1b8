"""The controls as packed tensors: uniform grids and scalar codebooks.

They share the size count and the interface of `QuantizedTensor`, so a table compares
methods, not bookkeeping.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8, UInt32

from kashin_jax.bases import BasisSpec, key_from_seed, make_pair
from kashin_jax.coding.affine import ungroup_rows
from kashin_jax.coding.scalar import NF4_LEVELS
from kashin_jax.packing import unpack_codes

__all__ = ["AffineTensor", "CodebookTensor", "GroupLayout"]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupLayout:
    """Static part of a control's tensor.

    Attributes:
      shape: Of the matrix, `[in, out]`.
      group_size: Rows of an output channel that share a scale; None for one scale per
        tensor.
      bits: Width of a code.
      basis: Families of the rotation applied before coding; None without rotation.
      dtype: Name of the type that the matrix had.
    """

    shape: tuple[int, int]
    group_size: int | None
    bits: int
    basis: BasisSpec | None = None
    dtype: str

    def unpack(self, packed: UInt8[Array, " q"]) -> UInt8[Array, "g s n"]:
        """Codes by group, those that fill the last group included."""
        m, n = self.shape
        size = self.group_size or m
        groups = -(-m // size)
        # Rows that only fill the last group were not stored: decode them as code 0.
        codes = unpack_codes(packed, bits=self.bits, count=m * n).reshape(m, n)
        codes = jnp.pad(codes, ((0, groups * size - m), (0, 0)))
        return codes.reshape(groups, size, n)


class AffineTensor(NamedTuple):
    """`W = scale * (code - zero)` in every group.

    Attributes:
      packed_codes: Codes of all weights, row-major.
      scale: fp16 per group and output channel, or one float32.
      zero: Packed whole numbers of `bits` bits per group, or one float32.
      layout: Static part.
    """

    packed_codes: UInt8[Array, " q"]
    scale: Float[Array, "g 1 c"]
    zero: UInt8[Array, " z"] | Float[Array, "1 1 1"]
    layout: GroupLayout

    @property
    def shape(self) -> tuple[int, int]:
        return self.layout.shape

    @property
    def dtype(self) -> str:
        return self.layout.dtype

    def decode(self) -> Float[Array, "m n"]:
        """The matrix in float32."""
        zero = self.zero
        if zero.dtype == jnp.uint8:
            codes = unpack_codes(zero, bits=self.layout.bits, count=self.scale.size)
            zero = codes.reshape(self.scale.shape).astype(jnp.float32)
        codes = self.layout.unpack(self.packed_codes).astype(jnp.float32)
        return ungroup_rows(
            self.scale.astype(jnp.float32) * (codes - zero), self.shape[0]
        )


class CodebookTensor(NamedTuple):
    """`W = Q1 (scale * levels[code]) Q2^T`, the rotation optional.

    Attributes:
      packed_codes: Codes of all weights, row-major.
      levels: Learned levels; None for NF4, whose 16 are fixed and not stored.
      scale: fp16 per group and output channel, or one float32.
      seed: Gives Q1 and Q2; None without rotation.
      layout: Static part.
    """

    packed_codes: UInt8[Array, " q"]
    levels: Float[Array, " k"] | None
    scale: Float[Array, "g 1 c"]
    seed: UInt32[Array, "2"] | None
    layout: GroupLayout

    @property
    def shape(self) -> tuple[int, int]:
        return self.layout.shape

    @property
    def dtype(self) -> str:
        return self.layout.dtype

    def decode(self) -> Float[Array, "m n"]:
        """The matrix in float32."""
        levels = jnp.asarray(NF4_LEVELS) if self.levels is None else self.levels
        values = levels.at[self.layout.unpack(self.packed_codes)].get(mode="clip")
        scaled = self.scale.astype(jnp.float32) * values
        rotated = ungroup_rows(scaled, self.shape[0])
        if self.seed is None or self.layout.basis is None:
            return rotated
        pair = make_pair(self.layout.basis, key_from_seed(self.seed), self.shape)
        return pair.synthesis(rotated)
