"""`x @ U` and `z @ V`, U and V being the factors of all blocks, for few rows of x."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from kashin_jax.tensors.kashin import KashinLayout, KashinTensor
from kashin_jax.tensors.kernels.planes import (
    Scaling,
    add_planes,
    by_tile,
    plane_rows,
    scales_of_tiles,
)
from kashin_jax.tensors.levels import (
    MOST_SELECTED,
    factor_codes,
    factor_levels,
    select,
    select_levels,
)
from kashin_jax.tensors.products import dot

__all__ = ["factor_products", "factor_rows", "row_product"]


_Levels = tuple[Float[Array, " a"], Float[Array, " b"]]


class _Stream(NamedTuple):
    """Rows of W whose codes have one width: every `step`-th, from `first_row` on."""

    packed: UInt8[Array, "..."]
    bits: int
    first_row: int
    step: int
    levels: _Levels


def factor_rows(layout: KashinLayout, most: int, rows_of_x: int = 1) -> int | None:
    """Rows of W to decode at a time; None if its codes do not suit this way."""
    widths = [layout.fine_bits]
    if layout.coarse_bits is not None:
        widths.append(layout.coarse_bits)
    return plane_rows(layout.shape, layout.block_shape[0], widths, most, rows_of_x)


def factor_products(
    x: Float[Array, "r m"],
    rotated: Float[Array, "r m"],
    tensor: KashinTensor,
    rows: int,
    precision: str | None,
) -> tuple[Float[Array, "r n"], Float[Array, "r n"]]:
    """`x @ U` and `rotated @ V` for the factors of all blocks.

    Args:
      x: What U is multiplied by.
      rotated: What V is multiplied by.
      tensor: Of a layout for which `factor_rows` is not None.
      rows: That of `factor_rows`.
      precision: Of the products.
    """
    v_bits = tensor.layout.v_bits

    def product(
        levels: _Levels,
        part: dict[str, Array],
        codes: UInt8[Array, "s p"],
        scaled: Scaling,
    ) -> tuple[Array, ...]:
        indices = factor_codes(codes, v_bits)
        values = map(scaled, map(select_levels, levels, indices))
        tiles = part["x"], part["rotated"]
        return tuple(dot(*p, precision) for p in zip(tiles, values, strict=True))

    zeros = jnp.zeros((x.shape[0], tensor.shape[1]), jnp.float32)
    from_u, from_v = _over_streams((zeros, zeros), x, rotated, tensor, rows, product)
    return from_u, from_v


def row_product(
    x: Float[Array, "1 m"],
    rotated: Float[Array, "1 m"],
    tensor: KashinTensor,
    rows: int,
) -> Float[Array, "1 n"] | None:
    """`x @ U + rotated @ V` of one row, each weight selected once.

    What is selected are products: of an entry of x with every level of u, and of one of
    `rotated` with every level of v. Without `v_bits` their sums are tabulated, so that
    one tree of selects takes the place of two and there is one sum. 4096 x 4096 at 4
    bits, on two CPU cores that others shared: 5.7 ms where `factor_products` took 11.9,
    with `v_bits` 4.1 and 6.9; the dense product 2.8.

    Args:
      x: What U is multiplied by.
      rotated: What V is multiplied by.
      tensor: Of a layout for which `factor_rows` is not None.
      rows: That of `factor_rows`.

    Returns:
      The sum in float32; None if codes stand for too many levels.
    """
    v_bits = tensor.layout.v_bits
    if max(len(own) for s in _streams(tensor) for own in s.levels) > MOST_SELECTED:
        return None

    def product(
        levels: _Levels,
        part: dict[str, Array],
        codes: UInt8[Array, "s p"],
        scaled: Scaling,
    ) -> tuple[Array, ...]:
        entries = (part[name].astype(jnp.float32).T for name in ("x", "rotated"))
        of_u, of_v = (e * own[None] for e, own in zip(entries, levels, strict=True))
        for_u, for_v = factor_codes(codes, v_bits)
        if v_bits is None:
            found = _by_row(of_u + of_v, codes)
        else:
            found = _by_row(of_u, for_u) + _by_row(of_v, for_v)
        # A product with ones: sums over rows of W are not vectorized otherwise.
        return (dot(jnp.ones((1, rows), jnp.float32), scaled(found), "highest"),)

    zeros = jnp.zeros((1, tensor.shape[1]), jnp.float32)
    return _over_streams((zeros,), x, rotated, tensor, rows, product)[0]


def _by_row(
    tables: Float[Array, "s k"], codes: UInt8[Array, "s p"]
) -> Float[Array, "s p"]:
    """`tables[i, codes[i, j]]`."""
    return select(jnp.split(tables, tables.shape[1], axis=1), codes)


def _over_streams(
    start: tuple[Array, ...],
    x: Float[Array, "r m"],
    rotated: Float[Array, "r m"],
    tensor: KashinTensor,
    rows: int,
    product: Callable[[_Levels, dict[str, Array], Array, Scaling], tuple[Array, ...]],
) -> tuple[Array, ...]:
    """Adds to the sums what `product` makes of levels, parts and codes."""
    height = tensor.layout.block_shape[0]
    sums = start
    for stream in _streams(tensor):
        parts = {
            name: by_tile(rows_of_x[:, stream.first_row :: stream.step], rows)
            for name, rows_of_x in (("x", x), ("rotated", rotated))
        }
        parts["scale"] = scales_of_tiles(tensor.scale, height // stream.step, rows)

        def of_plane(
            part: dict[str, Array],
            codes: Array,
            _: slice,
            scaled: Scaling,
            levels: _Levels,
        ) -> tuple[Array, ...]:
            return product(levels, part, codes, scaled)

        of_own = partial(of_plane, levels=stream.levels)
        sums = add_planes(sums, stream.packed, stream.bits, rows, parts, of_own)
    return sums


def _streams(tensor: KashinTensor) -> list[_Stream]:
    layout = tensor.layout
    fine, coarse = layout.fine_bits, layout.coarse_bits

    def stream(packed: Array, bits: int, row: int, step: int, first: int) -> _Stream:
        own = tensor.centroids[first : first + 2**bits]
        return _Stream(packed, bits, row, step, factor_levels(own, layout.v_bits))

    if coarse is None or tensor.packed_coarse is None:
        return [stream(tensor.packed_codes, fine, 0, 1, 0)]
    return [
        stream(tensor.packed_codes, fine, 0, 2, 0),
        stream(tensor.packed_coarse, coarse, 1, 2, 2**fine),
    ]
