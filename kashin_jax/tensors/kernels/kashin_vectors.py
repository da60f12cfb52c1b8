"""`x @ W` where rows or columns of W are Kashin codes of their own."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kashin_jax.packing import packed_size, unpack_codes
from kashin_jax.tensors.base import Bases
from kashin_jax.tensors.kashin_vectors import KashinVectorTensor, factors_of_codes
from kashin_jax.tensors.kernels.planes import by_blocks, by_tile, varying_as, widened
from kashin_jax.tensors.products import ProductOptions, dot

__all__ = ["vectors_product"]


def vectors_product(
    rows: Float[Array, "r m"],
    tensor: KashinVectorTensor,
    bases: Bases,
    options: ProductOptions,
) -> Float[Array, "r n"]:
    """`x U + (x P) V`, or `x U + (x V) P` for a vector for each input, in parts.

    P acts on activations, and U and V are decoded some rows at a time.
    """
    (m, n), x, (basis, rotation) = tensor.shape, widened(rows), bases
    assert basis is not None, "a Kashin tensor has one"
    if rotation is not None:
        x = by_blocks(rotation.left.analysis, x, m)
    mixed = by_blocks(basis.left.analysis, x, m)
    u, v = _factor_products(x, mixed, tensor, options)
    y = u + by_blocks(basis.right.synthesis, v, n)
    return y if rotation is None else by_blocks(rotation.right.synthesis, y, n)


def _factor_products(
    x: Float[Array, "r m"],
    mixed: Float[Array, "r m"],
    tensor: KashinVectorTensor,
    options: ProductOptions,
) -> tuple[Float[Array, "r n"], Float[Array, "r n"]]:
    """`x U` and `mixed V` in float32, decoding some rows of U and V at a time."""
    layout = tensor.layout
    m, n = layout.shape
    # A multiple of 8, so that tiles are cut between bytes.
    tile = min(max(8, options.max_tile // n // 8 * 8), -(-m // 8) * 8)
    count = -(-m // tile)
    size = packed_size(tile * n, layout.bits)
    stream = tensor.packed_codes.reshape(-1)
    packed = jnp.pad(stream, (0, count * size - len(stream))).reshape(count, size)
    short = ((0, 0), (0, count * tile - m))
    rows_of_x = tuple(by_tile(jnp.pad(each, short), tile) for each in (x, mixed))
    tables = tensor.u_levels, tensor.v_levels
    if layout.axis:
        # Rows have magnitudes of their own, and those that fill the last tile zeros.
        of_tiles = [
            jnp.pad(each, short).reshape(-1, count, tile).transpose(1, 0, 2)
            for each in tables
        ]
        parts = (packed, *rows_of_x, *of_tiles)
    else:
        parts = (packed, *rows_of_x)

    def add(
        sums: tuple[Array, Array], part: tuple[Array, ...]
    ) -> tuple[tuple[Array, Array], None]:
        packed, own, other, *of_tile = part
        u_levels, v_levels = of_tile or tables
        codes = unpack_codes(packed, bits=layout.bits, count=tile * n).reshape(tile, n)
        u, v = factors_of_codes(codes, u_levels, v_levels, layout)
        found = dot(own, u, options.precision), dot(other, v, options.precision)
        return (sums[0] + found[0], sums[1] + found[1]), None

    zeros = varying_as(jnp.zeros((x.shape[0], n), jnp.float32), x, tensor)
    sums, _ = jax.lax.scan(add, (zeros, zeros), parts)
    return sums
