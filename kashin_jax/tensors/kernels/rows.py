"""Rows of a packed matrix, and products with its transpose: what embeddings need."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kashin_jax.bases import KroneckerBasis
from kashin_jax.packing import unpack_codes
from kashin_jax.tensors.affine import (
    AffineTensor,
    CodebookTensor,
    float_levels,
    unpacked_zero,
)
from kashin_jax.tensors.base import QuantizedTensor
from kashin_jax.tensors.kashin import (
    KashinLayout,
    KashinTensor,
    decode_with,
    derive_basis,
    derive_rotation,
)
from kashin_jax.tensors.kernels.product import MAX_TILE

__all__ = ["bands_of_rows", "take_rows", "times_transpose"]


def take_rows(
    tensor: QuantizedTensor,
    rows: Int[Array, " t"],
    basis: KroneckerBasis | None = None,
    rotation: KroneckerBasis | None = None,
) -> Float[Array, "t n"]:
    """Rows of a packed matrix in float32, decoding no more than they need.

    Of a `KashinTensor` the band of blocks that a row lies in is decoded; of grouped
    codes without rotation the row alone. The whole matrix is decoded where one block
    spans all rows, where the matrix was rotated as a whole, and where bands would not
    end between bytes (which needs a width that is no multiple of 8).

    Args:
      tensor: Of m rows.
      rows: Indices in [0, m); not checked.
      basis: `derive_basis(tensor)` where the caller keeps it.
      rotation: `derive_rotation(tensor)`, in the same way.
    """
    if isinstance(tensor, KashinTensor):
        basis = derive_basis(tensor) if basis is None else basis
        rotation = derive_rotation(tensor) if rotation is None else rotation
        return _rows_of_blocks(tensor, rows, basis, rotation)
    if isinstance(tensor, AffineTensor | CodebookTensor) and tensor.seed is None:
        if tensor.shape[1] * tensor.layout.bits % 8 == 0:
            return _rows_of_groups(tensor, rows)
    return tensor.decode()[rows]


def times_transpose(
    x: Float[Array, "r n"],
    tensor: QuantizedTensor,
    basis: KroneckerBasis | None = None,
    rotation: KroneckerBasis | None = None,
) -> Float[Array, "r m"]:
    """`x @ W.T` in the type of `x`, accumulated in float32.

    A `KashinTensor` is decoded in bands of rows of a bounded size, where its blocks
    allow; other matrices are decoded whole, as by `matmul`.
    """
    if not isinstance(tensor, KashinTensor):
        return _product(x, tensor.decode())
    basis = derive_basis(tensor) if basis is None else basis
    rotation = derive_rotation(tensor) if rotation is None else rotation
    return _times_transpose(x, tensor, basis, rotation)


# `inline`, here and below: one program where it is called as it is, and no trace of it
# in the programs of others.
@partial(jax.jit, inline=True)
def _times_transpose(
    x: Float[Array, "r n"],
    tensor: KashinTensor,
    basis: KroneckerBasis,
    rotation: KroneckerBasis | None,
) -> Float[Array, "r m"]:
    size = math.prod(tensor.shape)
    fitting = bands_of_rows(tensor.layout)
    bands = min((k for k in fitting if size // k <= MAX_TILE), default=max(fitting))
    if bands == 1:
        return _product(x, decode_with(tensor, basis, rotation))
    parts = jax.lax.map(
        lambda i: _product(x, decode_with(_band(tensor, bands, i), basis, rotation)),
        jnp.arange(bands),
    )
    return parts.transpose(1, 0, 2).reshape(x.shape[0], -1)


def bands_of_rows(layout: KashinLayout) -> list[int]:
    """Into how many bands of whole blocks and whole bytes the rows can be cut."""
    m, n = layout.shape
    blocks = m // layout.block_shape[0]

    def fits(height: int) -> bool:
        if layout.coarse_bits is None:
            return height * n * layout.fine_bits % 8 == 0
        # Rows of odd index are stored apart.
        pairs, odd = divmod(height, 2)
        widths = (layout.fine_bits, layout.coarse_bits)
        return not odd and all(pairs * n * bits % 8 == 0 for bits in widths)

    divisors = (k for k in range(1, blocks + 1) if blocks % k == 0)
    return [k for k in divisors if k == 1 or fits(m // k)]


def _band(tensor: KashinTensor, bands: int, index: Array) -> KashinTensor:
    m, n = tensor.layout.shape

    def rows(leaf: Any) -> Any:
        if leaf is None:
            return None
        return leaf.reshape(bands, -1, *leaf.shape[1:])[index]

    return tensor._replace(
        packed_codes=rows(tensor.packed_codes),
        scale=rows(tensor.scale),
        in_scale=rows(tensor.in_scale),
        packed_coarse=rows(tensor.packed_coarse),
        layout=dataclasses.replace(tensor.layout, shape=(m // bands, n)),
    )


@partial(jax.jit, inline=True)
def _rows_of_blocks(
    tensor: KashinTensor,
    rows: Int[Array, " t"],
    basis: KroneckerBasis,
    rotation: KroneckerBasis | None,
) -> Float[Array, "t n"]:
    m, n = tensor.shape
    if rows.shape[0] == 0:
        return jnp.zeros((0, n), jnp.float32)
    bands = max(bands_of_rows(tensor.layout))
    height = m // bands
    # The rows of many tokens need all bands, and each of them more than once.
    if bands == 1 or (rows.shape[0] * height >= m and m * n <= MAX_TILE):
        return decode_with(tensor, basis, rotation)[rows]

    def row(index: Int[Array, ""]) -> Float[Array, " n"]:
        band = _band(tensor, bands, index // height)
        return decode_with(band, basis, rotation)[index % height]

    at_once = max(1, MAX_TILE // (height * n))
    return jax.lax.map(row, rows, batch_size=min(at_once, rows.shape[0]))


@partial(jax.jit, inline=True)
def _rows_of_groups(
    tensor: AffineTensor | CodebookTensor, rows: Int[Array, " t"]
) -> Float[Array, "t n"]:
    layout = tensor.layout
    m, n = layout.shape
    packed = tensor.packed_codes.reshape(m, -1)[rows]
    codes = jax.vmap(lambda row: unpack_codes(row, bits=layout.bits, count=n))(packed)
    group = rows // (layout.group_size or m)
    scale = tensor.scale.astype(jnp.float32)[group, 0]
    if isinstance(tensor, AffineTensor):
        zero = unpacked_zero(tensor)[group, 0]
        return scale * (codes.astype(jnp.float32) - zero)
    levels = float_levels(tensor)
    if levels.ndim == 1:
        return scale * levels.at[codes].get(mode="clip")
    return scale * jnp.take_along_axis(levels, codes, axis=0, mode="clip")


@partial(jax.jit, inline=True)
def _product(x: Float[Array, "r n"], w: Float[Array, "m n"]) -> Float[Array, "r m"]:
    y = jnp.matmul(x, w.T.astype(x.dtype), preferred_element_type=jnp.float32)
    return y.astype(x.dtype)
