"""`x @ W` for the controls: grids and scalar codebooks, decoded a tile at a time."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from kashin_jax.packing import packed_size, unpack_codes
from kashin_jax.tensors.affine import (
    AffineTensor,
    CodebookTensor,
    float_levels,
    unpacked_zero,
)
from kashin_jax.tensors.kernels.planes import (
    Scaling,
    add_planes,
    by_tile,
    dot,
    plane_rows,
    scales_of_tiles,
)
from kashin_jax.tensors.levels import MOST_SELECTED, select, select_levels

__all__ = ["group_rows", "grouped_by_planes", "grouped_by_tiles"]

_Control = AffineTensor | CodebookTensor


def group_rows(tensor: _Control, most: int, rows_of_x: int = 1) -> int | None:
    """Rows of W to decode at a time by planes; None if its codes do not suit them."""
    layout = tensor.layout
    m, n = layout.shape
    height = min(layout.group_size or m, m)
    if m % height:
        return None
    return plane_rows((m, n), height, [layout.bits], most, rows_of_x)


def grouped_by_planes(
    x: Float[Array, "r m"], tensor: _Control, rows: int, precision: str | None
) -> Float[Array, "r n"]:
    """`x @ A` in float32, A being the matrix before it is rotated back.

    Args:
      x: Few rows, rotated as the matrix was.
      tensor: For which `group_rows` is not None.
      rows: That of `group_rows`.
      precision: Of the products.
    """
    levels = _levels(tensor)

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
    return y if isinstance(tensor, CodebookTensor) else y - _of_zeros(x, tensor)


def _of_zeros(x: Float[Array, "r m"], tensor: AffineTensor) -> Float[Array, "r c"]:
    """What the zero points of the groups add up to."""
    lifted = (unpacked_zero(tensor) * tensor.scale.astype(jnp.float32))[:, 0]
    sums = jnp.sum(by_tile(x.astype(jnp.float32), x.shape[1] // len(lifted)), axis=2)
    return jnp.matmul(sums.T, lifted, precision="highest")


def grouped_by_tiles(
    x: Float[Array, "r m"], tensor: _Control, max_tile: int, precision: str | None
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
    packed = jnp.pad(
        tensor.packed_codes, (0, tiles * size - tensor.packed_codes.shape[0])
    ).reshape(tiles, size)
    levels = _levels(tensor)
    zero = unpacked_zero(tensor) if isinstance(tensor, AffineTensor) else None

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
    start = jnp.zeros((x.shape[0], n), jnp.float32)
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


def _levels(tensor: _Control) -> Float[Array, " k"] | Float[Array, "k n"] | None:
    return None if isinstance(tensor, AffineTensor) else float_levels(tensor)


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
