"""`x @ W` for a `KashinTensor`, never holding more of W than a bounded tile."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from kashin_jax.bases import KroneckerBasis
from kashin_jax.bases.identity import IdentityBasis
from kashin_jax.packing import packed_size
from kashin_jax.tensors.base import Bases
from kashin_jax.tensors.kashin import (
    KashinTensor,
    band_count,
    cut_rows,
    decode_pairs,
    unpack_rows,
)
from kashin_jax.tensors.kernels.columns import columns_product, most_columns
from kashin_jax.tensors.kernels.factors import (
    factor_products,
    factor_rows,
    row_product,
)
from kashin_jax.tensors.kernels.planes import by_blocks, by_tile, varying_as, widened
from kashin_jax.tensors.products import ProductOptions, dot

__all__ = ["kashin_product"]


def kashin_product(
    rows: Float[Array, "r m"],
    tensor: KashinTensor,
    bases: Bases,
    options: ProductOptions,
) -> Float[Array, "r n"]:
    """X U + ((x Q1) V) Q2^T: the transforms act on the activations.

    U and V are decoded a bounded part at a time; for many rows of x parts of W are,
    where blocks are smaller than a part.
    """
    basis, rotation = bases
    assert basis is not None, "a Kashin tensor has one"
    y = _scaled_inputs(widened(rows), tensor, rotation)
    is_many = len(y) >= options.many_rows
    y = _block_product(y, tensor, basis, options.max_tile, options.precision, is_many)
    return _scaled_outputs(y, tensor, rotation)


def _block_product(
    x: Float[Array, "r m"],
    tensor: KashinTensor,
    basis: KroneckerBasis,
    max_tile: int,
    precision: str | None,
    is_many: bool,
) -> Float[Array, "r n"]:
    """`x @ (U + Q1 V Q2^T)`, the way that suits the number of rows."""
    layout = tensor.layout
    bands = band_count(layout, max_tile)
    if bands is not None and is_many:
        return _by_bands(x, _plain(tensor), basis, bands, precision)
    is_one_sided = isinstance(basis.right, IdentityBasis)
    columns = most_columns(layout, max_tile) if is_one_sided and is_many else None
    if columns is not None:
        return columns_product(x, tensor, basis.left, columns, precision)
    rotated = by_blocks(basis.left.analysis, x, layout.block_shape[0])
    rows = factor_rows(layout, max_tile, len(x))
    if rows is None:
        u, v = _by_tiles(x, rotated, tensor, max_tile, precision)
    else:
        if x.shape[0] == 1 and is_one_sided:
            y = row_product(x, rotated, tensor, rows)
            if y is not None:
                return y
        u, v = factor_products(x, rotated, tensor, rows, precision)
    return u + by_blocks(basis.right.synthesis, v, layout.block_shape[1])


def _plain(tensor: KashinTensor) -> KashinTensor:
    """The matrix U + Q V without scales of inputs and outputs, and not rotated back."""
    layout = dataclasses.replace(tensor.layout, rotation=None)
    return tensor.replace(layout=layout, in_scale=None, out_scale=None)


def _by_bands(
    x: Float[Array, "r m"],
    tensor: KashinTensor,
    basis: KroneckerBasis,
    bands: int,
    precision: str | None,
) -> Float[Array, "r n"]:
    """Decodes bands of rows one after the other; a product with each."""
    if bands == 1:
        return dot(x, tensor.decode(Bases(basis)), precision)

    def add(
        y: Float[Array, "r n"], part: tuple[Array, KashinTensor]
    ) -> tuple[Float[Array, "r n"], None]:
        x_band, band = part
        return y + dot(x_band, band.decode(Bases(basis)), precision), None

    by_band = by_tile(x, x.shape[1] // bands)
    zeros = jnp.zeros((x.shape[0], tensor.shape[1]), jnp.float32)
    start = varying_as(zeros, x, tensor, basis)
    y, _ = jax.lax.scan(add, start, (by_band, cut_rows(tensor, bands)))
    return y


def _by_tiles(
    x: Float[Array, "r m"],
    rotated: Float[Array, "r m"],
    tensor: KashinTensor,
    max_tile: int,
    precision: str | None,
) -> tuple[Float[Array, "r n"], Float[Array, "r n"]]:
    """`x @ U` and `rotated @ V`, decoding some rows of both at a time."""
    layout = tensor.layout
    (m, n), bm = layout.shape, layout.block_shape[0]
    # Eight rows fill whole bytes at any code width, so tiles are cut between bytes;
    # sixteen where every second row has another width.
    step = 8 if layout.coarse_bits is None else 16
    tile = min(max(step, max_tile // n // step * step), -(-m // step) * step)
    tiles = -(-m // tile)
    short = tiles * tile - m

    def cut(packed: UInt8[Array, "..."], count: int, bits: int) -> UInt8[Array, "t s"]:
        size, stream = packed_size(count, bits), packed.reshape(-1)
        padded = jnp.pad(stream, (0, tiles * size - len(stream)))
        return padded.reshape(tiles, size)

    packed = cut(tensor.packed_codes, tile * n * 8 // step, layout.fine_bits)
    coarse = None
    if tensor.packed_coarse is not None and layout.coarse_bits is not None:
        coarse = cut(tensor.packed_coarse, tile * n // 2, layout.coarse_bits)
    scale = jnp.repeat(tensor.scale, bm, axis=0)
    scale = jnp.pad(scale, ((0, short), (0, 0))).reshape(tiles, tile, -1)

    def padded(rows: Float[Array, "r m"]) -> Float[Array, "t r s"]:
        return by_tile(jnp.pad(rows, ((0, 0), (0, short))), tile)

    def accumulate(
        sums: tuple[Array, Array],
        part: tuple[Array, Array | None, Array, Array, Array],
    ) -> tuple[tuple[Array, Array], None]:
        packed, coarse, scales, x_tile, rotated_tile = part
        codes = unpack_rows(packed, coarse, layout, tile)
        u, v = decode_pairs(tensor, codes, scales)
        return (
            sums[0] + dot(x_tile, u, precision),
            sums[1] + dot(rotated_tile, v, precision),
        ), None

    zeros = jnp.zeros((x.shape[0], n), jnp.float32)
    zeros = varying_as(zeros, x, rotated, tensor)
    parts = (packed, coarse, scale, padded(x), padded(rotated))
    products, _ = jax.lax.scan(accumulate, (zeros, zeros), parts)
    return products


def _scaled_inputs(
    x: Float[Array, "r m"], tensor: KashinTensor, rotation: KroneckerBasis | None
) -> Float[Array, "r m"]:
    """Inputs as the blocks of U and V take them."""
    if tensor.in_scale is not None:
        x = x * tensor.in_scale.astype(x.dtype)[None]
    if rotation is None:
        return x
    return by_blocks(rotation.left.analysis, x, tensor.layout.block_shape[0])


def _scaled_outputs(
    y: Float[Array, "r n"], tensor: KashinTensor, rotation: KroneckerBasis | None
) -> Float[Array, "r n"]:
    """Outputs of the matrix, given those of its blocks."""
    if rotation is not None:
        size = tensor.layout.block_shape[1]
        y = by_blocks(rotation.right.synthesis, y, size)
    scale = tensor.out_scale
    return y if scale is None else y * scale.astype(y.dtype)[None]
