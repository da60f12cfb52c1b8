"""The controls as packed tensors: uniform grids and scalar codebooks.

They share the size count and the interface of `KashinTensor`, so a table compares
methods, not bookkeeping.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8, UInt32

from kashin_jax.bases import BasisSpec, KroneckerBasis, key_from_seed, make_pair
from kashin_jax.packing import unpack_codes

__all__ = [
    "NF4_LEVELS",
    "AffineTensor",
    "CodebookTensor",
    "GroupLayout",
    "control_basis",
    "decode_control",
    "float_levels",
    "group_rows",
    "ungroup_rows",
    "unpacked_zero",
]


# Quantiles of a normal variable, -1, 0 and 1 among them: Dettmers et al., "QLoRA"
# (2023), arXiv 2305.14314, appendix E.
NF4_LEVELS = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


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
    """`W = Q1 (scale * (code - zero)) Q2^T` in every group, the rotation optional.

    Attributes:
      packed_codes: Codes of all weights, row-major.
      scale: fp16 per group and output channel, or one float32.
      zero: Per group, packed whole numbers of `bits` bits or fp16; or one float32.
      layout: Static part.
      seed: Gives Q1 and Q2; None without rotation.
    """

    packed_codes: UInt8[Array, " q"]
    scale: Float[Array, "g 1 c"]
    zero: UInt8[Array, " z"] | Float[Array, "g 1 c"]
    layout: GroupLayout
    seed: UInt32[Array, "2"] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.layout.shape

    @property
    def dtype(self) -> str:
        return self.layout.dtype

    def decode(self) -> Float[Array, "m n"]:
        """The matrix in float32."""
        return decode_control(self, control_basis(self))


class CodebookTensor(NamedTuple):
    """`W = Q1 (scale * levels[code]) Q2^T`, the rotation optional.

    Attributes:
      packed_codes: Codes of all weights, row-major.
      levels: Learned levels: float32 for the whole matrix, or fp16 with a column for
        every output channel. None for NF4, whose 16 are fixed and not stored.
      scale: fp16 per group and output channel, or one float32.
      seed: Gives Q1 and Q2; None without rotation.
      layout: Static part.
    """

    packed_codes: UInt8[Array, " q"]
    levels: Float[Array, " k"] | Float[Array, "k n"] | None
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
        return decode_control(self, control_basis(self))


# `inline`: one program where it is called as it is, and no trace of it in others.
@partial(jax.jit, inline=True)
def decode_control(
    tensor: AffineTensor | CodebookTensor, pair: KroneckerBasis | None
) -> Float[Array, "m n"]:
    """The matrix in float32, given its rotation, see `control_basis`."""
    codes = tensor.layout.unpack(tensor.packed_codes)
    if isinstance(tensor, AffineTensor):
        values = codes.astype(jnp.float32) - unpacked_zero(tensor)
    else:
        levels = float_levels(tensor)
        if levels.ndim == 1:
            values = levels.at[codes].get(mode="clip")
        else:
            values = jnp.take_along_axis(levels[None], codes, axis=1, mode="clip")
    rotated = ungroup_rows(tensor.scale.astype(jnp.float32) * values, tensor.shape[0])
    return rotated if pair is None else pair.synthesis(rotated)


def unpacked_zero(tensor: AffineTensor) -> Float[Array, "g 1 c"]:
    """Zero points in float32, in the shape of the scales."""
    zero = tensor.zero
    if zero.dtype == jnp.uint8:
        bits, count = tensor.layout.bits, tensor.scale.size
        zero = unpack_codes(zero, bits=bits, count=count).reshape(tensor.scale.shape)
    return zero.astype(jnp.float32)


def float_levels(
    tensor: CodebookTensor,
) -> Float[Array, " k"] | Float[Array, "k n"]:
    """Levels in float32, those of NF4 included."""
    if tensor.levels is None:
        return jnp.asarray(NF4_LEVELS)
    return tensor.levels.astype(jnp.float32)


def control_basis(tensor: AffineTensor | CodebookTensor) -> KroneckerBasis | None:
    """The rotation of the matrix as a whole; None without one."""
    basis, seed = tensor.layout.basis, tensor.seed
    if seed is None or basis is None:
        return None
    return make_pair(basis, key_from_seed(seed), tensor.shape)
