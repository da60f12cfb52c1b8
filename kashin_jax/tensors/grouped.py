"""What matrices coded in groups have in common: layout, decoding, rows.

Groups run along the input axis of a Flax kernel `[in, out]`, each output channel on
its own, as everybody's groups do (torch weights are `[out, in]`).
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from kashin_jax.bases import BasisSpec, key_from_seed, make_pair
from kashin_jax.packing import (
    pack_matrix,
    rows_of_bytes,
    unpack_codes,
    unpack_matrix,
)
from kashin_jax.tensors.base import Bases, QuantizedTensor
from kashin_jax.tensors.partitioning import INPUTS, OUTPUTS, Axes

__all__ = ["GroupLayout", "GroupedTensor", "group_rows", "ungroup_rows"]


def group_rows(x: Float[Array, "m n"], size: int) -> Float[Array, "g s n"]:
    """Splits rows into groups; a short last group is filled with its last row."""
    short = -x.shape[0] % size
    padded = jnp.pad(x, ((0, short), (0, 0)), mode="edge")
    return padded.reshape(-1, size, x.shape[1])


def ungroup_rows(groups: Array, rows: int) -> Array:
    """Inverse of `group_rows`, without the filling."""
    return groups.reshape(-1, groups.shape[-1])[:rows]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupLayout:
    """Shape, widths and groups of a matrix that is coded in groups.

    Attributes:
      shape: Shape of the matrix, `[in, out]`.
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

    @classmethod
    def of(
        cls, weight: Float[Array, "m n"], group_size: int | None, bits: int
    ) -> "GroupLayout":
        """The layout of a matrix that is not rotated."""
        m, n = weight.shape
        dtype = weight.dtype.name
        return cls(shape=(m, n), group_size=group_size, bits=bits, dtype=dtype)

    @property
    def code_axes(self) -> int:
        """Axes of the codes of one matrix: 2 where rows end between bytes, else 1."""
        return 1 if self.shape[1] * self.bits % 8 else 2

    def pack(self, codes: UInt8[Array, "g s n"] | UInt8[Array, "m n"]) -> Array:
        """Codes as bytes, row by row, without those that fill the last group."""
        return _packed(codes, self)

    def unpack(self, packed: UInt8[Array, "..."]) -> UInt8[Array, "g s n"]:
        """Codes by group, those that fill the last group included."""
        m, n = self.shape
        size = self.group_size or m
        groups = -(-m // size)
        # Rows that only fill the last group were not stored: decode them as code 0.
        codes = unpack_matrix(packed, self.bits, (m, n))
        codes = jnp.pad(codes, ((0, groups * size - m), (0, 0)))
        return codes.reshape(groups, size, n)


@partial(jax.jit, static_argnames="layout", inline=True)
def _packed(codes: Array, layout: GroupLayout) -> UInt8[Array, "..."]:
    return pack_matrix(ungroup_rows(codes, layout.shape[0]), layout.bits)


T = TypeVar("T", bound="GroupedTensor")


class GroupedTensor(QuantizedTensor):
    """`W = Q1 (scale * value[code]) Q2^T` in every group, the rotation optional.

    Subclasses say what codes stand for: whole numbers less a zero point, or levels.
    """

    # Of the subclasses, which are dataclasses.
    scale: Any
    seed: Any

    @classmethod
    def from_leaves(cls: type[T], layout: Any, leaves: Mapping[str, Any]) -> T:
        """Of codes as streams, too, as files have them; the rest as in the base."""
        m, n = layout.shape
        row_bits, found = n * layout.bits, dict(leaves)
        found["packed_codes"] = rows_of_bytes(found["packed_codes"], m, row_bits)
        zero = found.get("zero")
        if zero is not None and zero.dtype == jnp.uint8:
            groups = -(-m // (layout.group_size or m))
            found["zero"] = rows_of_bytes(zero, groups, row_bits)
        return super().from_leaves(layout, found)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix, or of the part that a device has, see the base."""
        codes: tuple[int, ...] = getattr(self.packed_codes, "shape", ())
        if len(codes) < 2 or self.layout.code_axes == 1:
            whole: tuple[int, int] = self.layout.shape
            return whole
        return codes[-2], codes[-1] * 8 // self.layout.bits

    def leaf_axes(self) -> dict[str, Axes]:
        """Codes, and scales, zeros and levels of outputs lie as the matrix does."""
        layout = self.layout
        both: Axes = (INPUTS, OUTPUTS)
        groups: Axes = (None,) * 3
        if layout.group_size is not None:
            groups = (INPUTS, None, OUTPUTS)
        leaves, axes = self.leaves(), dict[str, Axes]()
        axes["packed_codes"] = both if layout.code_axes == 2 else (None,)
        axes |= {"scale": groups, "seed": (None,)}
        if (zero := leaves.get("zero")) is not None:
            is_packed = zero.dtype == jnp.uint8
            axes["zero"] = axes["packed_codes"] if is_packed else groups
        if (levels := leaves.get("levels")) is not None:
            stack = len(self.full_shape) - 2
            axes["levels"] = (None, OUTPUTS)[: levels.ndim - stack]
        return axes

    def cuts(self) -> tuple[int, int]:
        """Whole groups along inputs; outputs that fill whole bytes. One if rotated."""
        layout = self.layout
        (m, n), size = layout.shape, layout.group_size or 1
        if layout.basis is not None or layout.code_axes == 1:
            return 1, 1
        return (1 if m % size else m // size), n * layout.bits // math.lcm(
            8, layout.bits
        )

    def float_levels(self) -> Float[Array, " k"] | Float[Array, "k n"] | None:
        """Levels that codes stand for, in float32; None if codes are the numbers."""
        return None

    def float_zero(self) -> Float[Array, "g 1 c"] | None:
        """Zero points in float32, in the shape of the scales; None without."""
        return None

    def derive_bases(self) -> Bases:
        """The rotation of the matrix as a whole, if there is one."""
        basis: BasisSpec | None = self.layout.basis
        if self.seed is None or basis is None:
            return Bases()
        return Bases(make_pair(basis, key_from_seed(self.seed), self.shape))

    def decode(self, bases: Bases | None = None) -> Float[Array, "m n"]:
        """The matrix in float32, given its bases where the caller keeps them."""
        bases = self.derive_bases() if bases is None else bases
        return _decoded(self.fitted(), bases)

    def rows(
        self, index: Int[Array, " t"], bases: Bases | None = None
    ) -> Float[Array, "t n"]:
        """Rows in float32, no others being decoded without a rotation.

        The whole matrix is where it was rotated, and where rows do not end between
        bytes.
        """
        is_whole = self.shape[1] * self.layout.bits % 8 == 0
        if self.seed is None and is_whole:
            return _rows(self.fitted(), index)
        return super().rows(index, bases)

    def describe(self) -> str:
        """Width of the codes, size of the groups and the rotation."""
        layout = self.layout
        size = layout.group_size
        shared = "one scale" if size is None else f"groups of {size}"
        rotated = "" if layout.basis is None else f", rotated by {layout.basis}"
        return f"{layout.bits}-bit {self.kind} codes, {shared}{rotated}"


# `inline`: one program where it is called as it is, and no trace of it in others.
@partial(jax.jit, inline=True)
def _decoded(tensor: GroupedTensor, bases: Bases) -> Float[Array, "m n"]:
    codes = tensor.layout.unpack(tensor.packed_codes)
    levels, zero = tensor.float_levels(), tensor.float_zero()
    if levels is None:
        values = codes.astype(jnp.float32)
    elif levels.ndim == 1:
        values = levels.at[codes].get(mode="clip")
    else:
        values = jnp.take_along_axis(levels[None], codes, axis=1, mode="clip")
    values = values if zero is None else values - zero
    rotated = ungroup_rows(tensor.scale.astype(jnp.float32) * values, tensor.shape[0])
    return rotated if bases.basis is None else bases.basis.synthesis(rotated)


@partial(jax.jit, inline=True)
def _rows(tensor: GroupedTensor, rows: Int[Array, " t"]) -> Float[Array, "t n"]:
    layout = tensor.layout
    m, n = layout.shape
    packed = tensor.packed_codes.reshape(m, -1)[rows]
    codes = jax.vmap(lambda row: unpack_codes(row, bits=layout.bits, count=n))(packed)
    group = rows // (layout.group_size or m)
    scale = tensor.scale.astype(jnp.float32)[group, 0]
    levels, zero = tensor.float_levels(), tensor.float_zero()
    if levels is None:
        values = codes.astype(jnp.float32)
    elif levels.ndim == 1:
        values = levels.at[codes].get(mode="clip")
    else:
        values = jnp.take_along_axis(levels, codes, axis=0, mode="clip")
    return scale * (values if zero is None else values - zero[group, 0])
