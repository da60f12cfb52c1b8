"""`x @ W` for the controls: grids and scalar codebooks, decoded a tile at a time."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from kashin_jax.packing import packed_size, unpack_codes
from kashin_jax.tensors.base import Bases
from kashin_jax.tensors.grouped import GroupedTensor
from kashin_jax.tensors.kernels.planes import (
    Scaling,
    add_planes,
    by_blocks,
    by_tile,
    plane_rows,
    scales_of_tiles,
    varying_as,
    widened,
)
from kashin_jax.tensors.levels import MOST_SELECTED, select, select_levels
from kashin_jax.tensors.products import ProductOptions, dot

__all__ = ["grouped_product", "zero_products"]


def grouped_product(
    rows: Float[Array, "r m"],
    tensor: GroupedTensor,
    bases: Bases,
    options: ProductOptions,
) -> Float[Array, "r n"]:
    """`x @ Q1 A Q2^T`, or without rotation `x @ A`, decoded in parts."""
    (m, n), basis, x = tensor.shape, bases.basis, rows
    if basis is not None:
        x = by_blocks(basis.left.analysis, widened(x), m)
    height = _plane_rows(tensor, options.max_tile, len(x))
    if height is None:
        y = _by_tiles(x, tensor, options.max_tile, options.precision)
    else:
        y = _by_planes(x, tensor, height, options.precision)
    return y if basis is None else by_blocks(basis.right.synthesis, y, n)


def _plane_rows(tensor: GroupedTensor, most: int, rows_of_x: int = 1) -> int | None:
    """Rows of W to decode at a time by planes; None if its codes do not suit them."""
    layout = tensor.layout
    m, n = layout.shape
    height = min(layout.group_size or m, m)
    if m % height:
        return None
    return plane_rows((m, n), height, [layout.bits], most, rows_of_x)


def _by_planes(
    x: Float[Array, "r m"], tensor: GroupedTensor, rows: int, precision: str | None
) -> Float[Array, "r n"]:
    """`x @ A` in float32, A being the matrix before it is rotated back.

    Args:
      x: Few rows, rotated as the matrix was.
      tensor: For which `_plane_rows` is not None.
      rows: From `_plane_rows`.
      precision: Of the products.
    """
    levels = tensor.float_levels()

    def product(
        part: dict[str, Array],
        codes: UInt8[Array, "s p"],
        plane: slice,
        scaled: Scaling,
    ) -> tuple[Array, ...]:
        values = scaled(_values(levels, codes, plane))
        return (dot(part["x"], values, precision),)

    scale = tensor.scale[:, 0]
    height = tensor.shape[0] // len(scale)
    parts = {"x": by_tile(x, rows), "scale": scales_of_tiles(scale, height, rows)}
    start = (jnp.zeros((x.shape[0], tensor.shape[1]), jnp.float32),)
    bits = tensor.layout.bits
    (y,) = add_planes(start, tensor.packed_codes, bits, rows, parts, product)
    zero = tensor.float_zero()
    return y if zero is None else y - zero_products(x, zero, tensor.scale, height)


def zero_products(
    x: Float[Array, "r m"],
    zero: Float[Array, "g 1 c"],
    scale: Float[Array, "g 1 c"],
    height: int,
) -> Float[Array, "r c"]:
    """What the zero points of groups of so many rows, the last perhaps fewer, add."""
    lifted = (zero * scale.astype(jnp.float32))[:, 0]
    short = height * len(lifted) - x.shape[1]
    groups = by_tile(jnp.pad(x.astype(jnp.float32), ((0, 0), (0, short))), height)
    return jnp.matmul(jnp.sum(groups, axis=2).T, lifted, precision="highest")


def _by_tiles(
    x: Float[Array, "r m"], tensor: GroupedTensor, max_tile: int, precision: str | None
) -> Float[Array, "r n"]:
    """`x @ A` in float32, decoding some rows of A at a time.

    Args:
      x: Any number of rows, rotated as the matrix was.
      tensor: The matrix.
      max_tile: Most weights decoded at a time, of eight rows at least.
      precision: Of the products.
    """
    layout = tensor.layout
    m, n = layout.shape
    group = min(layout.group_size or m, m)
    tile = _tile_rows(m, group, max(8, max_tile // n // 8 * 8))
    tiles, shared = -(-m // tile), math.gcd(tile, group)
    size = packed_size(tile * n, layout.bits)
    stream = tensor.packed_codes.reshape(-1)
    packed = jnp.pad(stream, (0, tiles * size - len(stream))).reshape(tiles, size)
    levels, zero = tensor.float_levels(), tensor.float_zero()

    def add(
        y: Float[Array, "r n"], part: tuple[Array, Array, Int[Array, ""]]
    ) -> tuple[Float[Array, "r n"], None]:
        packed, x_tile, index = part
        codes = unpack_codes(packed, bits=layout.bits, count=tile * n).reshape(tile, n)
        values = _values(levels, codes, slice(None)).reshape(-1, shared, n)
        # Rows that only fill the last tile meet zeros of x, whatever their scale.
        first = index * tile + shared * jnp.arange(tile // shared)
        own = jnp.minimum(first // group, len(tensor.scale) - 1)
        if zero is not None:
            values = values - zero[own]
        values = values * tensor.scale[own].astype(jnp.float32)
        return y + dot(x_tile, values.reshape(tile, n), precision), None

    padded = jnp.pad(x, ((0, 0), (0, tiles * tile - m)))
    zeros = jnp.zeros((x.shape[0], n), jnp.float32)
    start = varying_as(zeros, x, tensor)
    parts = packed, by_tile(padded, tile), jnp.arange(tiles)
    y, _ = jax.lax.scan(add, start, parts)
    return y


def _tile_rows(m: int, group: int, most: int) -> int:
    """Rows of a tile: a multiple of 8, so that tiles are cut between bytes."""
    whole = math.lcm(group, 8)
    tile = most // whole * whole
    if not tile:
        parts = (d for d in range(8, group, 8) if group % d == 0 and d <= most)
        tile = max(parts, default=most)
    return min(tile, -(-m // 8) * 8)


def _values(
    levels: Float[Array, " k"] | Float[Array, "k n"] | None,
    codes: UInt8[Array, "s p"],
    columns: slice,
) -> Float[Array, "s p"]:
    """What codes in some columns stand for, before scales and zero points."""
    if levels is None:
        return codes.astype(jnp.float32)
    if levels.ndim == 1:
        return select_levels(levels, codes)
    own = levels[:, columns]
    if own.shape[0] > MOST_SELECTED:
        return jnp.take_along_axis(own, codes, axis=0, mode="clip")
    return select([each[None] for each in own], codes)
