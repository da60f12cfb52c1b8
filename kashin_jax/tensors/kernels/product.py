"""`x @ W` for a packed W, never holding more of W than a bounded tile."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from kashin_jax.bases import KroneckerBasis
from kashin_jax.bases.identity import IdentityBasis
from kashin_jax.packing import packed_size
from kashin_jax.tensors.affine import AffineTensor, CodebookTensor, control_basis
from kashin_jax.tensors.base import QuantizedTensor
from kashin_jax.tensors.kashin import (
    KashinTensor,
    band_count,
    cut_rows,
    decode_pairs,
    decode_with,
    derive_basis,
    derive_rotation,
    unpack_rows,
)
from kashin_jax.tensors.kernels.columns import columns_product, most_columns
from kashin_jax.tensors.kernels.factors import factor_products, factor_rows, row_product
from kashin_jax.tensors.kernels.grouped import (
    group_rows,
    grouped_by_planes,
    grouped_by_tiles,
)
from kashin_jax.tensors.kernels.planes import by_tile, dot

__all__ = [
    "MANY_ROWS",
    "MAX_TILE",
    "derive_bases",
    "many_rows_of_backend",
    "matmul",
]

# Most weights decoded at a time: 4 MiB as float32, which a CPU core's cache holds.
MAX_TILE = 2**20

MANY_ROWS: Mapping[str, int] = MappingProxyType({"cpu": 320})
"""Rows of x from which on parts of W are decoded whole, by backend.

Measured; backends that are not listed take that of the CPU. For joint codes of 4 bits,
4096 x 4096, two CPU cores take 2.7 times as long as for the dense product with 256 rows
by planes and 2.9 times by parts of W, with 384 rows 2.6 and 2.4, with 512 2.7 and 2.2.
"""


def many_rows_of_backend() -> int:
    """That of the default backend."""
    return MANY_ROWS.get(jax.default_backend(), MANY_ROWS["cpu"])


def derive_bases(
    tensor: QuantizedTensor,
) -> tuple[KroneckerBasis | None, KroneckerBasis | None]:
    """`basis` and `rotation` of `matmul`, for callers that keep them."""
    if isinstance(tensor, KashinTensor):
        return derive_basis(tensor), derive_rotation(tensor)
    if isinstance(tensor, AffineTensor | CodebookTensor):
        return control_basis(tensor), None
    return None, None


def matmul(
    x: Float[Array, "*b m"],
    tensor: QuantizedTensor,
    *,
    basis: KroneckerBasis | None = None,
    rotation: KroneckerBasis | None = None,
    max_tile: int = MAX_TILE,
    precision: str | None = None,
    many_rows: int | None = None,
) -> Float[Array, "*b n"]:
    """`x @ W` in the type of `x`, accumulated in float32.

    For a `KashinTensor` this is x U + ((x Q1) V) Q2^T: the transforms act on the
    activations, and U and V are decoded a bounded part at a time; for many rows of x
    parts of W are, where blocks are smaller than a part. The controls are decoded in
    parts too, and those that were rotated rotate activations. Matrices of other types
    are decoded whole.

    Args:
      x: Activations, any batch axes.
      tensor: The matrix.
      basis: `derive_basis(tensor)`, of a control `control_basis(tensor)`, where the
        caller keeps it; derived when None.
      rotation: `derive_rotation(tensor)`, in the same way.
      max_tile: Most weights decoded at a time.
      precision: Of the products, as for `jnp.matmul`.
      many_rows: Rows of x from which on parts of W are decoded whole; None takes what
        suits the backend, `MANY_ROWS`.

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
    if not isinstance(tensor, KashinTensor | AffineTensor | CodebookTensor):
        rows = x.reshape(-1, x.shape[-1])
        y = dot(rows, tensor.decode(), precision).astype(x.dtype)
        return y.reshape(*x.shape[:-1], tensor.shape[1])
    if isinstance(tensor, KashinTensor):
        basis = derive_basis(tensor) if basis is None else basis
        rotation = derive_rotation(tensor) if rotation is None else rotation
    else:
        basis = control_basis(tensor) if basis is None else basis
    many = many_rows_of_backend() if many_rows is None else many_rows
    return _product(x, tensor, basis, rotation, max_tile, precision, many)


@partial(jax.jit, static_argnames=("max_tile", "precision", "many"), inline=True)
def _product(
    x: Float[Array, "*b m"],
    tensor: KashinTensor | AffineTensor | CodebookTensor,
    basis: KroneckerBasis | None,
    rotation: KroneckerBasis | None,
    max_tile: int,
    precision: str | None,
    many: int,
) -> Float[Array, "*b n"]:
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(tensor, KashinTensor):
        assert basis is not None, "derived by the caller"
        y = _prepared(rows, tensor, rotation)
        y = _block_product(y, tensor, basis, max_tile, precision, len(y) >= many)
        y = _finished(y, tensor, rotation)
    else:
        y = _grouped(rows, tensor, basis, max_tile, precision)
    return y.astype(x.dtype).reshape(*x.shape[:-1], tensor.shape[1])


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
    rotated = _by_blocks(basis.left.analysis, x, layout.block_shape[0])
    rows = factor_rows(layout, max_tile, len(x))
    if rows is None:
        u, v = _by_tiles(x, rotated, tensor, max_tile, precision)
    else:
        if x.shape[0] == 1 and is_one_sided:
            y = row_product(x, rotated, tensor, rows)
            if y is not None:
                return y
        u, v = factor_products(x, rotated, tensor, rows, precision)
    return u + _by_blocks(basis.right.synthesis, v, layout.block_shape[1])


def _grouped(
    x: Float[Array, "r m"],
    tensor: AffineTensor | CodebookTensor,
    basis: KroneckerBasis | None,
    max_tile: int,
    precision: str | None,
) -> Float[Array, "r n"]:
    """`x @ Q1 A Q2^T`, or without rotation `x @ A`."""
    m, n = tensor.shape
    if basis is not None:
        x = _by_blocks(basis.left.analysis, x, m)
    rows = group_rows(tensor, max_tile, len(x))
    if rows is None:
        y = grouped_by_tiles(x, tensor, max_tile, precision)
    else:
        y = grouped_by_planes(x, tensor, rows, precision)
    return y if basis is None else _by_blocks(basis.right.synthesis, y, n)


def _plain(tensor: KashinTensor) -> KashinTensor:
    """The matrix U + Q V without scales of inputs and outputs, and not rotated back."""
    layout = dataclasses.replace(tensor.layout, rotation=None)
    return tensor._replace(layout=layout, in_scale=None, out_scale=None)


def _by_bands(
    x: Float[Array, "r m"],
    tensor: KashinTensor,
    basis: KroneckerBasis,
    bands: int,
    precision: str | None,
) -> Float[Array, "r n"]:
    """Decodes bands of rows one after the other; a product with each."""
    if bands == 1:
        return dot(x, decode_with(tensor, basis), precision)

    def add(
        y: Float[Array, "r n"], part: tuple[Array, KashinTensor]
    ) -> tuple[Float[Array, "r n"], None]:
        x_band, band = part
        return y + dot(x_band, decode_with(band, basis), precision), None

    by_band = by_tile(x, x.shape[1] // bands)
    start = jnp.zeros((x.shape[0], tensor.shape[1]), jnp.float32)
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
    parts = (packed, coarse, scale, padded(x), padded(rotated))
    products, _ = jax.lax.scan(accumulate, (zeros, zeros), parts)
    return products


def _prepared(
    x: Float[Array, "r m"], tensor: KashinTensor, rotation: KroneckerBasis | None
) -> Float[Array, "r m"]:
    """Inputs as the blocks of U and V take them."""
    if tensor.in_scale is not None:
        x = x * tensor.in_scale.astype(x.dtype)[None]
    if rotation is None:
        return x
    return _by_blocks(rotation.left.analysis, x, tensor.layout.block_shape[0])


def _finished(
    y: Float[Array, "r n"], tensor: KashinTensor, rotation: KroneckerBasis | None
) -> Float[Array, "r n"]:
    """Outputs of the matrix, given those of its blocks."""
    if rotation is not None:
        size = tensor.layout.block_shape[1]
        y = _by_blocks(rotation.right.synthesis, y, size)
    scale = tensor.out_scale
    return y if scale is None else y * scale.astype(y.dtype)[None]


def _by_blocks(
    transform: Callable[[Array], Array], x: Float[Array, "r k"], size: int
) -> Float[Array, "r k"]:
    blocks = x.astype(jnp.float32).reshape(-1, x.shape[1] // size, size)
    return transform(blocks).reshape(x.shape).astype(x.dtype)
