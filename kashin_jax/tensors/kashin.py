"""`KashinTensor`: a matrix as packed Kashin codes, and how it is decoded."""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8, UInt32

from kashin_jax.bases import BasisSpec, KroneckerBasis, key_from_seed, make_pair
from kashin_jax.packing import pack_matrix, rows_of_bytes, unpack_matrix
from kashin_jax.tensors.base import Bases, QuantizedTensor
from kashin_jax.tensors.blocks import from_blocks, to_blocks
from kashin_jax.tensors.levels import factor_codes, factor_levels, select_levels
from kashin_jax.tensors.partitioning import INPUTS, OUTPUTS, Axes
from kashin_jax.tensors.products import MAX_TILE, ProductOptions, dot

__all__ = [
    "KashinLayout",
    "KashinTensor",
    "band_count",
    "bands_of_rows",
    "cut_rows",
    "decode_pairs",
    "make_rotation",
    "pack_rows",
    "unpack_rows",
]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class KashinLayout:
    """Shape, blocks, widths and bases of a `KashinTensor`.

    Attributes:
      shape: Shape of the matrix, `[in, out]` for a Flax kernel.
      block_shape: Shape of the blocks, each with one scale; divides `shape`.
      bits: Width of a code. Half a bit more than a whole number means that the codes of
        rows of odd index are one bit narrower than the others.
      basis: Families of Q1 and Q2; with the stored seed they give the matrices.
      dtype: Name of the type that the matrix had.
      rotation: Families of the bases in which every block was coded, drawn from the
        seed apart from Q1 and Q2; None for the standard one.
      v_bits: Low bits of a code that alone decide v, the others deciding u, where the
        centroids are all pairs of a level of u and one of v; None where they are any
        pairs. Makes decoding faster and is not stored: readers see it in the centroids.
    """

    shape: tuple[int, int]
    block_shape: tuple[int, int]
    bits: int | float
    basis: BasisSpec
    dtype: str
    rotation: BasisSpec | None = None
    v_bits: int | None = None

    @property
    def code_axes(self) -> int:
        """Axes of the codes of one matrix: 2 where rows end between bytes, else 1."""
        return 1 if self.shape[1] * self.fine_bits % 8 else 2

    @property
    def fine_bits(self) -> int:
        """Width of the codes of rows of even index."""
        return math.ceil(self.bits)

    @property
    def coarse_bits(self) -> int | None:
        """Width of the codes of rows of odd index, if it is another one."""
        return None if self.bits == self.fine_bits else self.fine_bits - 1


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class KashinTensor(QuantizedTensor):
    """`W = U + Q1 V Q2^T` with `(U, V) = scale * centroids[code]`, block by block.

    Blocks that were rotated before coding are rotated back, and where there are scales
    of inputs or outputs, W is multiplied by them last.

    A PyTree: passes through `jit`, `vmap`, `scan` and `tree.map`. Its leaves are all
    that is stored.

    Attributes:
      packed_codes: Codes of all weights in row-major order, with an axis of rows where
        these end between bytes, see `packing`; without the rows of `packed_coarse`.
      centroids: Row `c` is the pair (u, v) that code `c` stands for, for blocks of
        unit root-mean-square.
      scale: Root-mean-square of every block, in the units of the weight.
      seed: Gives Q1 and Q2.
      layout: Static shapes and names.
      in_scale: Factor of every row of W, that is of every input; None for none.
      out_scale: Factor of every column of W, that is of every output.
      packed_coarse: Codes of the rows of odd index where they are one bit narrower,
        counted from the first centroid that is theirs; None where they are not.
    """

    kind: ClassVar[str] = "kashin"

    packed_codes: UInt8[Array, " q"] | UInt8[Array, "mf q"]
    centroids: Float[Array, "k 2"]
    scale: Float[Array, "r c"]
    seed: UInt32[Array, "2"]
    layout: KashinLayout
    in_scale: Float[Array, " m"] | None = None
    out_scale: Float[Array, " n"] | None = None
    packed_coarse: UInt8[Array, " qc"] | UInt8[Array, "mc qc"] | None = None

    @classmethod
    def from_leaves(cls, layout: Any, leaves: Mapping[str, Any]) -> "KashinTensor":
        """Of codes as streams, too, as files have them; the rest as in the base."""
        (m, n), coarse = layout.shape, layout.coarse_bits
        rows = m if coarse is None else m // 2
        found = dict(leaves)
        widths = {"packed_codes": layout.fine_bits, "packed_coarse": coarse}
        for name in widths.keys() & found.keys():
            found[name] = rows_of_bytes(found[name], rows, n * widths[name])
        return super().from_leaves(layout, found)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix, or of the part that a device has, see the base."""
        grid: tuple[int, ...] = getattr(self.scale, "shape", ())
        if len(grid) < 2:
            return self.layout.shape
        height, width = self.layout.block_shape
        return grid[-2] * height, grid[-1] * width

    def leaf_axes(self) -> dict[str, Axes]:
        """Codes and scales lie as the matrix does."""
        layout = self.layout

        def codes(bits: int | None) -> Axes:
            whole = bits is None or layout.shape[1] * bits % 8 == 0
            return (INPUTS, OUTPUTS) if whole else (None,)

        return {
            "packed_codes": codes(layout.fine_bits),
            "centroids": (None, None),
            "scale": (INPUTS, OUTPUTS),
            "seed": (None,),
            "in_scale": (INPUTS,),
            "out_scale": (OUTPUTS,),
            "packed_coarse": codes(layout.coarse_bits),
        }

    def cuts(self) -> tuple[int, int]:
        """Blocks along inputs, and along outputs those that fill whole bytes."""
        layout = self.layout
        (m, n), (height, width) = layout.shape, layout.block_shape
        widths = [bits for bits in (layout.fine_bits, layout.coarse_bits) if bits]
        if any(n * bits % 8 for bits in widths):
            return 1, 1
        fitting = (
            count
            for count in range(n // width, 0, -1)
            if n // width % count == 0
            and all(n // count * bits % 8 == 0 for bits in widths)
        )
        return m // height, next(fitting)

    def derive_bases(self) -> Bases:
        """Q1 and Q2 of one block, and the bases in which every block was coded."""
        layout = self.layout
        basis = make_pair(layout.basis, key_from_seed(self.seed), layout.block_shape)
        if layout.rotation is None:
            return Bases(basis)
        return Bases(
            basis, make_rotation(layout.rotation, self.seed, layout.block_shape)
        )

    def decode(self, bases: Bases | None = None) -> Float[Array, "m n"]:
        """The matrix in float32, given its bases where the caller keeps them."""
        bases = self.derive_bases() if bases is None else bases
        return _decoded(self.fitted(), bases)

    def rows(
        self, index: Int[Array, " t"], bases: Bases | None = None
    ) -> Float[Array, "t n"]:
        """Rows in float32: the bands of blocks that they lie in are decoded.

        The whole matrix is where one block spans all rows, and where bands would not
        end between bytes (which needs a width that is no multiple of 8).
        """
        bases = self.derive_bases() if bases is None else bases
        return _rows(self.fitted(), index, bases)

    def in_bands(self, most: int) -> "tuple[int, KashinTensor] | None":
        """The rows as a stack of equal bands of at most `most` weights, if possible."""
        bands = band_count(self.layout, most)
        return None if bands is None else (bands, cut_rows(self, bands))

    def describe(self) -> str:
        """Width of the codes, size of the blocks and families of the bases."""
        height, width = self.layout.block_shape
        return (
            f"{self.layout.bits}-bit Kashin codes in blocks of {height} x {width}, "
            f"basis {self.layout.basis}"
        )


def band_count(layout: KashinLayout, most: int) -> int | None:
    """The least number of equal bands of rows that keeps each below a size.

    None if bands of whole blocks and bytes are larger.
    """
    (m, n), height = layout.shape, layout.block_shape[0]
    for count in range(1, m // height + 1):
        fits = m * n // count <= most and m // height % count == 0
        if fits and (count == 1 or m // count % 16 == 0):
            return count
    return None


def cut_rows(tensor: KashinTensor, bands: int) -> KashinTensor:
    """Cuts a matrix into a stack of bands of equal height, for `vmap` or `lax.map`.

    Args:
      tensor: A matrix of `m` rows.
      bands: Divides the blocks along `m`; `m / bands` must be a multiple of 16, so that
        bands end between bytes at any width.
    """
    layout = tensor.layout
    m, n = layout.shape

    def rows(leaf: Any) -> Any:
        return None if leaf is None else leaf.reshape(bands, -1, *leaf.shape[1:])

    def shared(leaf: Any) -> Any:
        return None if leaf is None else jnp.broadcast_to(leaf, (bands, *leaf.shape))

    return tensor.replace(
        packed_codes=rows(tensor.packed_codes),
        centroids=shared(tensor.centroids),
        scale=rows(tensor.scale),
        seed=shared(tensor.seed),
        layout=dataclasses.replace(layout, shape=(m // bands, n)),
        in_scale=rows(tensor.in_scale),
        out_scale=shared(tensor.out_scale),
        packed_coarse=rows(tensor.packed_coarse),
    )


def make_rotation(
    spec: BasisSpec, seed: UInt32[Array, "2"], block_shape: tuple[int, int]
) -> KroneckerBasis:
    """The rotation that belongs to a seed, another one than its Q1 and Q2."""
    key = jax.random.fold_in(key_from_seed(seed), 1)
    return make_pair(spec, key, block_shape)


# `inline`, here and below: one program where it is called as it is, and no trace of it
# in those of others. The bases come from programs that quantizing and products share.
@partial(jax.jit, inline=True)
def _decoded(tensor: KashinTensor, bases: Bases) -> Float[Array, "m n"]:
    basis, rotation = bases
    assert basis is not None, "a Kashin tensor has one"
    layout = tensor.layout
    m = layout.shape[0]
    codes = unpack_rows(tensor.packed_codes, tensor.packed_coarse, layout, m)
    scale = jnp.repeat(tensor.scale, layout.block_shape[0], axis=0)
    u, v = decode_pairs(tensor, codes, scale)
    if layout.block_shape == layout.shape:
        w = u + basis.synthesis(v)
        w = w if rotation is None else rotation.synthesis(w)
    elif rotation is None:
        w = u + from_blocks(basis.synthesis(to_blocks(v, layout.block_shape)))
    else:
        blocks = to_blocks(u, layout.block_shape)
        blocks = blocks + basis.synthesis(to_blocks(v, layout.block_shape))
        w = from_blocks(rotation.synthesis(blocks))
    if tensor.in_scale is not None:
        w = w * tensor.in_scale.astype(jnp.float32)[:, None]
    if tensor.out_scale is not None:
        w = w * tensor.out_scale.astype(jnp.float32)[None, :]
    return w


def transposed_by_bands(
    x: Float[Array, "r n"],
    tensor: KashinTensor,
    bases: Bases,
    options: ProductOptions,
) -> Float[Array, "r m"]:
    """`x @ W.T` in float32, in bands of rows that are decoded one by one.

    Args:
      x: Rows.
      tensor: The matrix.
      bases: From `derive_bases`.
      options: As kernels take them; not used.
    """
    del options
    size = math.prod(tensor.shape)
    fitting = bands_of_rows(tensor.layout)
    bands = min((k for k in fitting if size // k <= MAX_TILE), default=max(fitting))
    if bands == 1:
        return dot(x, tensor.decode(bases).T, None)
    parts = jax.lax.map(
        lambda i: dot(x, _band(tensor, bands, i).decode(bases).T, None),
        jnp.arange(bands),
    )
    return parts.transpose(1, 0, 2).reshape(x.shape[0], -1)


def bands_of_rows(layout: KashinLayout) -> list[int]:
    """Into how many bands of whole blocks and whole bytes the rows can be cut."""
    m, n = layout.shape
    blocks = m // layout.block_shape[0]

    def fits(height: int) -> bool:
        if layout.coarse_bits is None:
            return height * n * layout.fine_bits % 8 == 0
        # Rows of odd index are stored apart.
        pairs, odd = divmod(height, 2)
        widths = (layout.fine_bits, layout.coarse_bits)
        return not odd and all(pairs * n * bits % 8 == 0 for bits in widths)

    divisors = (k for k in range(1, blocks + 1) if blocks % k == 0)
    return [k for k in divisors if k == 1 or fits(m // k)]


def _band(tensor: KashinTensor, bands: int, index: Array) -> KashinTensor:
    m, n = tensor.layout.shape

    def rows(leaf: Any) -> Any:
        if leaf is None:
            return None
        return leaf.reshape(bands, -1, *leaf.shape[1:])[index]

    return tensor.replace(
        packed_codes=rows(tensor.packed_codes),
        scale=rows(tensor.scale),
        in_scale=rows(tensor.in_scale),
        packed_coarse=rows(tensor.packed_coarse),
        layout=dataclasses.replace(tensor.layout, shape=(m // bands, n)),
    )


@partial(jax.jit, inline=True)
def _rows(
    tensor: KashinTensor, rows: Int[Array, " t"], bases: Bases
) -> Float[Array, "t n"]:
    m, n = tensor.shape
    if rows.shape[0] == 0:
        return jnp.zeros((0, n), jnp.float32)
    bands = max(bands_of_rows(tensor.layout))
    height = m // bands
    # The rows of many tokens need all bands, and each of them more than once.
    if bands == 1 or (rows.shape[0] * height >= m and m * n <= MAX_TILE):
        return tensor.decode(bases)[rows]

    def row(index: Int[Array, ""]) -> Float[Array, " n"]:
        band = _band(tensor, bands, index // height)
        return band.decode(bases)[index % height]

    at_once = max(1, MAX_TILE // (height * n))
    return jax.lax.map(row, rows, batch_size=min(at_once, rows.shape[0]))


@partial(jax.jit, static_argnames="layout")
def pack_rows(
    codes: UInt8[Array, "m n"], layout: KashinLayout
) -> tuple[UInt8[Array, "..."], UInt8[Array, "..."] | None]:
    """Packed codes: all, or those of rows of even and of odd index."""
    bits, coarse_bits = layout.fine_bits, layout.coarse_bits
    if coarse_bits is None:
        return pack_matrix(codes, bits), None
    return pack_matrix(codes[0::2], bits), pack_matrix(
        codes[1::2] - 2**bits, coarse_bits
    )


def unpack_rows(
    packed: UInt8[Array, "..."],
    coarse: UInt8[Array, "..."] | None,
    layout: KashinLayout,
    rows: int,
) -> UInt8[Array, "r n"]:
    """Codes of some rows, the first of even index; inverts `pack_rows`.

    Raises:
      ValueError: If a stream is not as long as the codes need.
    """
    bits, coarse_bits, n = layout.fine_bits, layout.coarse_bits, layout.shape[1]
    if coarse_bits is None or coarse is None:
        return unpack_matrix(packed, bits, (rows, n))
    even = unpack_matrix(packed, bits, (rows // 2, n))
    odd = unpack_matrix(coarse, coarse_bits, (rows // 2, n)) + 2**bits
    return jnp.stack([even, odd], axis=1).reshape(rows, n)


def decode_pairs(
    tensor: KashinTensor,
    codes: UInt8[Array, "r n"],
    scale: Float[Array, "r c"],
) -> tuple[Float[Array, "r n"], Float[Array, "r n"]]:
    """U and V of some rows, given their codes and the scales of their blocks."""
    layout = tensor.layout
    columns = jnp.repeat(scale, layout.block_shape[1], axis=1)
    levels = factor_levels(tensor.centroids, layout.v_bits)
    u, v = map(select_levels, levels, factor_codes(codes, layout.v_bits))
    return u * columns, v * columns
