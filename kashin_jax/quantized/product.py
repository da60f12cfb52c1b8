"""`x @ W` for a packed W, never holding more of W than a bounded tile."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from kashin_jax.bases import KroneckerBasis
from kashin_jax.packing import packed_size
from kashin_jax.quantized.layout import Quantized
from kashin_jax.quantized.tensor import (
    QuantizedTensor,
    decode_pairs,
    decode_with,
    derive_basis,
    derive_rotation,
    unpack_rows,
)

__all__ = ["MAX_TILE", "matmul"]

# Most weights decoded at a time: 4 MiB as float32, which a CPU core's cache holds.
MAX_TILE = 2**20
# From this many rows of x on, a matrix that fits in one tile is decoded as a whole:
# one product and a transform of W cost less than two products, one with U, one with V
# (384 x 1536 on two CPU cores: 14 ms against 4 at 64 rows, 13 against 20 at 512).
WHOLE_DECODE_ROWS = 256


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
    activations and U, V are decoded tile by tile. Other quantized matrices are decoded
    whole.

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
    size = math.prod(tensor.shape)
    if not isinstance(tensor, QuantizedTensor):
        y = _product(rows, tensor.decode(), precision)
    else:
        basis = derive_basis(tensor) if basis is None else basis
        if size <= max_tile and rows.shape[0] >= WHOLE_DECODE_ROWS:
            y = _product(rows, decode_with(tensor, basis, rotation), precision)
        else:
            rotation = derive_rotation(tensor) if rotation is None else rotation
            rows = _prepared(rows, tensor, rotation)
            y = _two_products(rows, tensor, basis, max_tile, precision)
            y = _finished(y, tensor, rotation)
    return y.astype(x.dtype).reshape(*x.shape[:-1], tensor.shape[1])


def _product(
    x: Float[Array, "r m"], w: Float[Array, "m n"], precision: str | None
) -> Float[Array, "r n"]:
    return jnp.matmul(
        x,
        w.astype(x.dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _two_products(
    x: Float[Array, "r m"],
    tensor: QuantizedTensor,
    basis: KroneckerBasis,
    max_tile: int,
    precision: str | None,
) -> Float[Array, "r n"]:
    layout = tensor.layout
    (m, n), (bm, bn) = layout.shape, layout.block_shape
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

    rotated = _by_blocks(basis.left.analysis, x, bm)

    def accumulate(
        sums: tuple[Array, Array],
        part: tuple[Array, Array | None, Array, Array, Array],
    ) -> tuple[tuple[Array, Array], None]:
        packed, coarse, scales, x_tile, rotated_tile = part
        codes = unpack_rows(packed, coarse, layout, tile)
        u, v = decode_pairs(tensor, codes, scales)
        return (
            sums[0] + _product(x_tile, u, precision),
            sums[1] + _product(rotated_tile, v, precision),
        ), None

    zeros = jnp.zeros((x.shape[0], n), jnp.float32)
    parts = (packed, coarse, scale, by_tile(x), by_tile(rotated))
    (from_u, from_v), _ = jax.lax.scan(accumulate, (zeros, zeros), parts)
    return from_u + _by_blocks(basis.right.synthesis, from_v, bn)


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
