"""`x @ W` for few rows of x: codes are decoded where they lie, plane by plane.

Of 4-bit codes the low halves of all bytes are one plane of W's columns and the high
halves another. Each plane is decoded and multiplied by itself, so that codes are never
put in order, and the scales of blocks are taken into the sums instead of the weights.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from kashin_jax.quantized.tensor import KashinLayout, QuantizedTensor, select_levels

__all__ = ["dot", "factor_products", "plane_rows"]

# Weights decoded at a time: 1 MiB of codes as float32, in the cache of a core.
_TILE = 2**18
_LEAST_ROWS = 8


class _Stream(NamedTuple):
    """Rows of W whose codes have one width."""

    packed: UInt8[Array, " q"]
    bits: int
    first_row: int
    step: int
    first_centroid: int


def plane_rows(layout: KashinLayout, most: int) -> int | None:
    """Rows of W to decode at a time; None if its codes do not suit this way.

    Args:
      layout: Of W.
      most: Weights to decode at a time.

    They must divide a block, so that one row of scales is theirs, and a row of codes
    must end between bytes at the same place in every row.
    """
    (_, n), (height, _) = layout.shape, layout.block_shape
    streams = 1 if layout.coarse_bits is None else 2
    widths = {layout.fine_bits, layout.coarse_bits or layout.fine_bits}
    if any(n % _planes(bits) for bits in widths) or height % streams:
        return None
    own, fitting = height // streams, max(1, min(most, _TILE) // n)
    rows = max(d for d in range(1, min(own, fitting) + 1) if own % d == 0)
    return rows if rows >= min(own, fitting, _LEAST_ROWS) else None


def _planes(bits: int) -> int:
    return math.lcm(8, bits) // bits


def factor_products(
    x: Float[Array, "r m"],
    rotated: Float[Array, "r m"],
    tensor: QuantizedTensor,
    rows: int,
    precision: str | None,
) -> tuple[Float[Array, "r n"], Float[Array, "r n"]]:
    """`x @ U` and `rotated @ V` for the factors of all blocks.

    Args:
      x: What U is multiplied by.
      rotated: What V is multiplied by.
      tensor: Of a layout for which `plane_rows` is not None.
      rows: That of `plane_rows`.
      precision: Of the products.
    """
    sums = [
        _stream_products(x, rotated, tensor, stream, rows, precision)
        for stream in _streams(tensor)
    ]
    from_u, from_v = (sum(parts[1:], parts[0]) for parts in zip(*sums, strict=True))
    return from_u, from_v


def _streams(tensor: QuantizedTensor) -> list[_Stream]:
    layout = tensor.layout
    if layout.coarse_bits is None or tensor.packed_coarse is None:
        return [_Stream(tensor.packed_codes, layout.fine_bits, 0, 1, 0)]
    return [
        _Stream(tensor.packed_codes, layout.fine_bits, 0, 2, 0),
        _Stream(
            tensor.packed_coarse, layout.coarse_bits, 1, 2, 2**layout.fine_bits
        ),
    ]  # fmt: skip


def _stream_products(
    x: Float[Array, "r m"],
    rotated: Float[Array, "r m"],
    tensor: QuantizedTensor,
    stream: _Stream,
    rows: int,
    precision: str | None,
) -> tuple[Float[Array, "r n"], Float[Array, "r n"]]:
    layout = tensor.layout
    (m, n), (height, width) = layout.shape, layout.block_shape
    tiles = m // stream.step // rows
    planes = _planes(stream.bits)
    last = stream.first_centroid + 2**stream.bits
    table = tensor.centroids[stream.first_centroid : last]

    def by_tile(x: Float[Array, "r m"]) -> Float[Array, "t r s"]:
        own = x[:, stream.first_row :: stream.step]
        return own.reshape(x.shape[0], tiles, rows).transpose(1, 0, 2)

    def add(
        sums: tuple[Array, Array], part: tuple[Array, Array, Array, Array]
    ) -> tuple[tuple[Array, Array], None]:
        packed, scale, x_tile, rotated_tile = part
        products = [
            (
                dot(x_tile, select_levels(table[:, 0], codes, stream.bits), precision),
                dot(
                    rotated_tile,
                    select_levels(table[:, 1], codes, stream.bits),
                    precision,
                ),
            )
            for codes in _unpacked(packed, stream.bits, planes)
        ]
        # Plane p has the columns p, p + planes, p + 2 planes ...
        columns = jnp.repeat(scale, width).reshape(1, -1, planes)
        u, v = (jnp.stack(parts, axis=2) for parts in zip(*products, strict=True))
        return (sums[0] + u * columns, sums[1] + v * columns), None

    scale = jnp.repeat(tensor.scale, height // stream.step // rows, axis=0)
    packed = stream.packed.reshape(tiles, rows, -1)
    zeros = jnp.zeros((x.shape[0], n // planes, planes), jnp.float32)
    parts = (packed, scale, by_tile(x), by_tile(rotated))
    (from_u, from_v), _ = jax.lax.scan(add, (zeros, zeros), parts)
    return from_u.reshape(-1, n), from_v.reshape(-1, n)


def _unpacked(
    packed: UInt8[Array, "s q"], bits: int, planes: int
) -> list[UInt8[Array, "s p"]]:
    """The codes of every plane."""
    size = planes * bits // 8
    columns = [packed[:, byte::size] for byte in range(size)]
    found = []
    for plane in range(planes):
        byte, shift = divmod(plane * bits, 8)
        code = columns[byte] >> shift
        if shift + bits > 8:
            code = code | (columns[byte + 1] << (8 - shift))
        found.append(code & (2**bits - 1))
    return found


def dot(
    x: Float[Array, "r s"], w: Float[Array, "s p"], precision: str | None
) -> Float[Array, "r p"]:
    """`x @ w` in the type of x, accumulated in float32."""
    return jnp.matmul(
        x,
        w.astype(x.dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
