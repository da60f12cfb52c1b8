"""`x @ W` for few rows of x: codes are decoded where they lie, plane by plane.

Of 4-bit codes the low halves of all bytes are one plane of W's columns and the high
halves another. Each plane is decoded and multiplied by itself, so that codes are never
put in order, and scales of columns are taken into the sums instead of the weights.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Shaped, UInt8

__all__ = [
    "PlaneProduct",
    "Scaling",
    "add_planes",
    "by_blocks",
    "by_tile",
    "plane_count",
    "plane_rows",
    "unpacked",
    "varying_as",
    "widened",
]

_LEAST_ROWS = 8
# Rows of x from which on tiles span several blocks or groups, whose scales then go into
# the weights, so that sums are added to less often. Joint codes of 4 bits, 4096 x 4096,
# two CPU cores: 50 ms for 65 with 128 rows, 21 for 25 with 32, 15.5 for 14 with 16.
_SPANNING_ROWS = 32


Scaling = Callable[[Float[Array, "s p"]], Float[Array, "s p"]]
PlaneProduct = Callable[[dict[str, Array], Array, slice, Scaling], tuple[Array, ...]]


def plane_rows(
    shape: tuple[int, int],
    height: int,
    widths: Sequence[int],
    most: int,
    rows_of_x: int = 1,
) -> int | None:
    """Rows of W to decode at a time; None if its codes do not suit this way.

    They divide a block or group, or for enough rows of x are several whole ones. A row
    of codes must end between bytes at the same place in every row.

    Args:
      shape: Of W.
      height: Of a block or a group; divides that of W.
      widths: Bits of the codes; of every stream, where rows take turns between them.
      most: Weights to decode at a time.
      rows_of_x: How many there are.
    """
    (m, n), streams = shape, len(widths)
    if any(n % plane_count(bits) for bits in widths) or height % streams:
        return None
    own, fitting = height // streams, max(1, most // n)
    if rows_of_x >= _SPANNING_ROWS and own < fitting:
        blocks = m // height
        return own * max(
            d for d in range(1, blocks + 1) if blocks % d == 0 and own * d <= fitting
        )
    rows = max(d for d in range(1, min(own, fitting) + 1) if own % d == 0)
    return rows if rows >= min(own, fitting, _LEAST_ROWS) else None


def plane_count(bits: int) -> int:
    """Planes of codes of one width: how many codes fill whole bytes."""
    return math.lcm(8, bits) // bits


def add_planes(
    start: tuple[Float[Array, "r n"], ...],
    packed: UInt8[Array, "..."],
    bits: int,
    rows: int,
    parts: dict[str, Array],
    product: PlaneProduct,
) -> tuple[Float[Array, "r n"], ...]:
    """Adds to every sum what `product` makes of the planes of all tiles.

    Args:
      start: The sums so far.
      packed: Codes of all rows of W.
      bits: Of a code.
      rows: Of a tile.
      parts: What belongs to the tiles, along the first axes. One of them is `scale`: a
        factor of W for every so many rows and columns of a tile.
      product: Called with the part of a tile, the codes of one of its planes, the
        columns of that plane and a function that applies scales to what the codes stand
        for; gives an array `[r, p]` for every sum. One row of scales for a tile is
        applied to these arrays instead.
    """
    n, planes = start[0].shape[1], plane_count(bits)
    # Plane p has the columns p, p + planes, p + 2 planes ...
    own = [slice(first, None, planes) for first in range(planes)]

    def add(
        sums: list[tuple[Array, ...]], tile: tuple[Array, dict[str, Array]]
    ) -> tuple[list[tuple[Array, ...]], None]:
        codes, part = tile
        scale = part["scale"].astype(jnp.float32)
        columns = jnp.repeat(scale, n // scale.shape[1], axis=1)
        added = []
        for plane, of_plane, before in zip(
            unpacked(codes, bits), own, sums, strict=True
        ):
            factors = columns[:, of_plane]
            if len(factors) > 1:
                found = product(part, plane, of_plane, partial(_scaled, factors))
            else:
                found = product(part, plane, of_plane, lambda values: values)
                found = tuple(each * factors for each in found)
            added.append(tuple(map(jnp.add, before, found)))
        return added, None

    tiles = packed.reshape(-1, rows, n * bits // 8)
    begun = [varying_as(each, packed, parts) for each in start]
    by_plane = [tuple(each[:, columns] for each in begun) for columns in own]
    sums, _ = jax.lax.scan(add, by_plane, (tiles, parts))
    joined = (
        jnp.stack(planes_of_one, axis=2) for planes_of_one in zip(*sums, strict=True)
    )
    return tuple(each.reshape(each.shape[0], n) for each in joined)


def _scaled(
    factors: Float[Array, "k p"], values: Float[Array, "s p"]
) -> Float[Array, "s p"]:
    blocks = values.reshape(len(factors), -1, values.shape[1])
    return (blocks * factors[:, None]).reshape(values.shape)


def widened(x: Float[Array, "r m"]) -> Float[Array, "r m"]:
    """Activations in a type that scales and rotations of inputs do not overflow.

    Half precision ends at 65,504: 2,500 times an input's scale of 36 is beyond it,
    where the product itself is not. bfloat16 has the range of float32.
    """
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x


def varying_as(
    start: Shaped[Array, "*shape"], *others: PyTree[Array]
) -> Shaped[Array, "*shape"]:
    """A first sum that varies over the axes of `shard_map` that its terms vary over.

    Loops want sums of one type, and inside `shard_map` fresh zeros are equal on all
    devices where what is added to them is not.
    """
    axes = set().union(*map(_varying_axes, jax.tree.leaves(others)))
    missing = tuple(sorted(axes - _varying_axes(start)))
    return jax.lax.pcast(start, missing, to="varying") if missing else start


def _varying_axes(leaf: Array) -> frozenset[str]:
    kind: Any = jax.typeof(leaf)
    # `vma` in versions of JAX before and, for all we know, after.
    manual = getattr(kind, "manual_axis_type", None)
    axes: frozenset[str] = (
        getattr(kind, "vma", frozenset()) if manual is None else manual.varying
    )
    return axes


def by_tile(x: Float[Array, "r m"], rows: int) -> Float[Array, "t r s"]:
    """Columns of x as the tiles of W's rows take them."""
    return x.reshape(x.shape[0], x.shape[1] // rows, rows).transpose(1, 0, 2)


def scales_of_tiles(
    scale: Float[Array, "k c"], height: int, rows: int
) -> Float[Array, "t g c"]:
    """Scales of blocks of some height as tiles of so many rows take them."""
    if rows < height:
        scale = jnp.repeat(scale, height // rows, axis=0)
    return scale.reshape(-1, max(rows // height, 1), scale.shape[1])


def unpacked(packed: UInt8[Array, "s q"], bits: int) -> list[UInt8[Array, "s p"]]:
    """The codes of every plane."""
    planes = plane_count(bits)
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


def by_blocks(
    transform: Callable[[Array], Array], x: Float[Array, "r k"], size: int
) -> Float[Array, "r k"]:
    """What a transform of so many numbers makes of the rows of x, block by block."""
    blocks = x.astype(jnp.float32).reshape(-1, x.shape[1] // size, size)
    return transform(blocks).reshape(x.shape).astype(x.dtype)
