"""`x @ W` for a packed W, never holding more of W than a bounded tile."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from kashin_jax.bases import KroneckerBasis
from kashin_jax.packing import packed_size
from kashin_jax.quantized.layout import Quantized
from kashin_jax.quantized.planes import dot, factor_products, plane_rows
from kashin_jax.quantized.tensor import (
    QuantizedTensor,
    band_count,
    cut_rows,
    decode_pairs,
    decode_with,
    derive_basis,
    derive_rotation,
    unpack_rows,
)

__all__ = ["MAX_TILE", "matmul"]

# Most weights decoded at a time: 4 MiB as float32, which a CPU core's cache holds.
MAX_TILE = 2**20
# Up to so many rows of x codes are decoded plane by plane, from so many rows on bands
# of W are decoded whole, and in between U and V tile by tile, with a product each. At 4
# bits, 4096 x 4096, on two CPU cores that others shared: one row took 8 ms by planes
# and 34 by tiles, 32 rows 50 and 42, 512 rows 583 by tiles and 512 by bands.
FEW_ROWS, MANY_ROWS = 16, 256


def matmul(
    x: Float[Array, "*b m"],
    tensor: Quantized,
    *,
    basis: KroneckerBasis | None = None,
    rotation: KroneckerBasis | None = None,
    max_tile: int = MAX_TILE,
    precision: str | None = None,
) -> Float[Array, "*b n"]:
    """`x @ W` in the type of `x`, accumulated in float32.

    For a `QuantizedTensor` this is x U + ((x Q1) V) Q2^T: the transforms act on the
    activations, and U and V are decoded a bounded part at a time; for many rows of x
    parts of W are. Other quantized matrices are decoded whole.

    Args:
      x: Activations, any batch axes.
      tensor: The matrix.
      basis: `derive_basis(tensor)` where the caller keeps it; derived when None.
      rotation: `derive_rotation(tensor)`, in the same way.
      max_tile: Most weights decoded at a time.
      precision: Of the products, as for `jnp.matmul`.

    Raises:
      TypeError: If `x` is not floating point.
      ValueError: If the last axis of `x` does not match the matrix.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`x` has type {x.dtype}; cast it to float first.")
    if x.shape[-1] != tensor.shape[0]:
        raise ValueError(
            f"`x` has {x.shape[-1]} features, but the quantized matrix has shape "
            f"{tensor.shape} [in, out]."
        )
    rows = x.reshape(-1, x.shape[-1])
    if not isinstance(tensor, QuantizedTensor):
        y = dot(rows, tensor.decode(), precision)
    else:
        basis = derive_basis(tensor) if basis is None else basis
        rotation = derive_rotation(tensor) if rotation is None else rotation
        y = _prepared(rows, tensor, rotation)
        y = _block_product(y, tensor, basis, max_tile, precision)
        y = _finished(y, tensor, rotation)
    return y.astype(x.dtype).reshape(*x.shape[:-1], tensor.shape[1])


def _block_product(
    x: Float[Array, "r m"],
    tensor: QuantizedTensor,
    basis: KroneckerBasis,
    max_tile: int,
    precision: str | None,
) -> Float[Array, "r n"]:
    """`x @ (U + Q1 V Q2^T)`, the way that suits the number of rows."""
    layout = tensor.layout
    bands = band_count(layout, max_tile)
    if bands is not None and x.shape[0] >= MANY_ROWS:
        return _by_bands(x, _plain(tensor), basis, bands, precision)
    rotated = _by_blocks(basis.left.analysis, x, layout.block_shape[0])
    rows = plane_rows(layout, max_tile)
    if rows is not None and x.shape[0] <= FEW_ROWS:
        u, v = factor_products(x, rotated, tensor, rows, precision)
    else:
        u, v = _by_tiles(x, rotated, tensor, max_tile, precision)
    return u + _by_blocks(basis.right.synthesis, v, layout.block_shape[1])


def _plain(tensor: QuantizedTensor) -> QuantizedTensor:
    """The matrix U + Q V without scales of inputs and outputs, and not rotated back."""
    layout = dataclasses.replace(tensor.layout, rotation=None)
    return tensor._replace(layout=layout, in_scale=None, out_scale=None)


def _by_bands(
    x: Float[Array, "r m"],
    tensor: QuantizedTensor,
    basis: KroneckerBasis,
    bands: int,
    precision: str | None,
) -> Float[Array, "r n"]:
    """Decodes bands of rows one after the other; a product with each."""
    if bands == 1:
        return dot(x, decode_with(tensor, basis), precision)

    def add(
        y: Float[Array, "r n"], part: tuple[Array, QuantizedTensor]
    ) -> tuple[Float[Array, "r n"], None]:
        x_band, band = part
        return y + dot(x_band, decode_with(band, basis), precision), None

    by_band = x.reshape(x.shape[0], bands, -1).transpose(1, 0, 2)
    start = jnp.zeros((x.shape[0], tensor.shape[1]), jnp.float32)
    y, _ = jax.lax.scan(add, start, (by_band, cut_rows(tensor, bands)))
    return y


def _by_tiles(
    x: Float[Array, "r m"],
    rotated: Float[Array, "r m"],
    tensor: QuantizedTensor,
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

    def cut(packed: UInt8[Array, " q"], count: int, bits: int) -> UInt8[Array, "t s"]:
        size = packed_size(count, bits)
        padded = jnp.pad(packed, (0, tiles * size - packed.shape[0]))
        return padded.reshape(tiles, size)

    packed = cut(tensor.packed_codes, tile * n * 8 // step, layout.fine_bits)
    coarse = None
    if tensor.packed_coarse is not None and layout.coarse_bits is not None:
        coarse = cut(tensor.packed_coarse, tile * n // 2, layout.coarse_bits)
    scale = jnp.repeat(tensor.scale, bm, axis=0)
    scale = jnp.pad(scale, ((0, short), (0, 0))).reshape(tiles, tile, -1)

    def by_tile(rows: Float[Array, "r m"]) -> Float[Array, "t r s"]:
        padded = jnp.pad(rows, ((0, 0), (0, short)))
        return padded.reshape(rows.shape[0], tiles, tile).transpose(1, 0, 2)

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
    parts = (packed, coarse, scale, by_tile(x), by_tile(rotated))
    products, _ = jax.lax.scan(accumulate, (zeros, zeros), parts)
    return products


def _prepared(
    x: Float[Array, "r m"], tensor: QuantizedTensor, rotation: KroneckerBasis | None
) -> Float[Array, "r m"]:
    """Inputs as the blocks of U and V take them."""
    if tensor.in_scale is not None:
        x = x * _row(tensor.in_scale, x)
    if rotation is None:
        return x
    return _by_blocks(rotation.left.analysis, x, tensor.layout.block_shape[0])


def _finished(
    y: Float[Array, "r n"], tensor: QuantizedTensor, rotation: KroneckerBasis | None
) -> Float[Array, "r n"]:
    """Outputs of the matrix, given those of its blocks."""
    if rotation is not None:
        size = tensor.layout.block_shape[1]
        y = _by_blocks(rotation.right.synthesis, y, size)
    return y if tensor.out_scale is None else y * _row(tensor.out_scale, y)


def _by_blocks(
    transform: Callable[[Array], Array], x: Float[Array, "r k"], size: int
) -> Float[Array, "r k"]:
    blocks = x.astype(jnp.float32).reshape(-1, x.shape[1] // size, size)
    return transform(blocks).reshape(x.shape).astype(x.dtype)


def _row(scale: Float[Array, " k"], like: Float[Array, "r k"]) -> Float[Array, "1 k"]:
    return scale.astype(like.dtype)[None]
