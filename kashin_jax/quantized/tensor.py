"""`QuantizedTensor`: a matrix as packed Kashin codes, and how it is decoded."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8, UInt32

from kashin_jax.bases import BasisSpec, KroneckerBasis, key_from_seed, make_pair
from kashin_jax.coding.blocks import from_blocks, to_blocks
from kashin_jax.packing import unpack_codes

__all__ = ["KashinLayout", "QuantizedTensor", "decode_pairs", "derive_basis"]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class KashinLayout:
    """Static part of a `QuantizedTensor`.

    Attributes:
      shape: Of the matrix, `[in, out]` for a Flax kernel.
      block_shape: Of the blocks, each with one scale; divides `shape`.
      bits: Width of a code.
      basis: Families of Q1 and Q2; with the stored seed they give the matrices.
      dtype: Name of the type that the matrix had.
    """

    shape: tuple[int, int]
    block_shape: tuple[int, int]
    bits: int
    basis: BasisSpec
    dtype: str


class QuantizedTensor(NamedTuple):
    """`W = U + Q1 V Q2^T` with `(U, V) = scale * centroids[code]`, block by block.

    A PyTree: passes through `jit`, `vmap`, `scan` and `tree.map`. Its leaves are all
    that is stored.

    Attributes:
      packed_codes: Codes of all weights in row-major order, see `packing`.
      centroids: Row `c` is the pair (u, v) that code `c` stands for, for blocks of
        unit root-mean-square.
      scale: Root-mean-square of every block, in the units of the weight.
      seed: Gives Q1 and Q2.
      layout: Static shapes and names.
    """

    packed_codes: UInt8[Array, " q"]
    centroids: Float[Array, "k 2"]
    scale: Float[Array, "r c"]
    seed: UInt32[Array, "2"]
    layout: KashinLayout

    @property
    def shape(self) -> tuple[int, int]:
        return self.layout.shape

    @property
    def dtype(self) -> str:
        return self.layout.dtype

    def decode(self) -> Float[Array, "m n"]:
        """The matrix in float32."""
        return decode_with(self, derive_basis(self))


def derive_basis(tensor: QuantizedTensor) -> KroneckerBasis:
    """The pair (Q1, Q2) of one block, from the seed. Never counted as stored."""
    layout = tensor.layout
    return make_pair(layout.basis, key_from_seed(tensor.seed), layout.block_shape)


def decode_with(tensor: QuantizedTensor, basis: KroneckerBasis) -> Float[Array, "m n"]:
    """The matrix in float32, given the bases of `derive_basis`."""
    layout = tensor.layout
    m, n = layout.shape
    codes = unpack_codes(tensor.packed_codes, bits=layout.bits, count=m * n)
    scale = jnp.repeat(tensor.scale, layout.block_shape[0], axis=0)
    u, v = decode_pairs(tensor, codes.reshape(m, n), scale)
    if layout.block_shape == layout.shape:
        return u + basis.synthesis(v)
    blocks = basis.synthesis(to_blocks(v, layout.block_shape))
    return u + from_blocks(blocks)


def decode_pairs(
    tensor: QuantizedTensor,
    codes: UInt8[Array, "r n"],
    scale: Float[Array, "r c"],
) -> tuple[Float[Array, "r n"], Float[Array, "r n"]]:
    """U and V of some rows, given their codes and the scales of their blocks."""
    columns = jnp.repeat(scale, tensor.layout.block_shape[1], axis=1)
    # mode="clip" drops the bounds check; codes have exactly as many values as rows.
    u = tensor.centroids[:, 0].at[codes].get(mode="clip")
    v = tensor.centroids[:, 1].at[codes].get(mode="clip")
    return u * columns, v * columns
