"""`x @ W` on a CPU by look-ups in packed codes: see `docs/kernels.md` and `csrc`.

Few rows of x at a time. Whatever the kernel does not take, XLA multiplies.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, UInt8

from kashin_jax.bases import KroneckerBasis
from kashin_jax.bases.basis import Basis
from kashin_jax.bases.hadamard import HadamardBasis
from kashin_jax.bases.identity import IdentityBasis
from kashin_jax.tensors.base import Bases
from kashin_jax.tensors.grouped import GroupedTensor
from kashin_jax.tensors.kashin import KashinTensor, transposed_by_bands
from kashin_jax.tensors.kashin_vectors import KashinVectorTensor
from kashin_jax.tensors.kernels.grouped import grouped_product, zero_products
from kashin_jax.tensors.kernels.kashin import kashin_product
from kashin_jax.tensors.kernels.kashin_vectors import vectors_product
from kashin_jax.tensors.kernels.library import TARGET, decline, instruction_set
from kashin_jax.tensors.kernels.planes import by_blocks, varying_as
from kashin_jax.tensors.levels import factor_levels
from kashin_jax.tensors.products import MANY_ROWS, MAX_TILE, Kernel, ProductOptions

__all__ = [
    "MOST_ROWS",
    "cpu_grouped_product",
    "cpu_kashin_product",
    "cpu_kashin_transposed",
    "cpu_vectors_product",
]

MOST_ROWS = 64
"""Rows of x up to which the kernel multiplies by look-ups, whatever the blocks are."""

# The same for x @ W.T. 2048 x 2048, one core: 0.16 ms a row at 4 bits, and 60 where XLA
# decodes W.
_MOST_TRANSPOSED = 256
# Milliseconds of four 4096 x 4096 matrices on two cores with AVX-512: of each row of x
# and look-up of a weight, of each row times decoded blocks, and of decoding those of
# joint codes. Grids have no transforms: a third.
_LOOK_UP, _MULTIPLY, _DECODE = 1.1, 0.625, 25.0
# Ways to multiply, as the handler numbers them.
_LOOK_UPS, _DECODED, _TRANSPOSED = 0, 1, 2
# Longest blocks whose Hadamard transforms the kernel applies: its threads share columns
# by whole blocks.
_MOST_FUSED = 512
# As `KashinLayout.v_bits`, for the kernel: of grids, and of general pairs.
_NO_V, _PAIRS = 0, -1
# Bits of u and of v that have look-ups of their own; pairs and grids up to four.
_SPLITS = {(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (3, 2), (1, 3), (2, 3)}
_MOST_WHOLE_BITS = 4


class _Codes(NamedTuple):
    """What the kernel reads of a matrix.

    Attributes:
      packed: Codes, row by row.
      coarse: Those of rows of odd index where they are narrower; else empty.
      scale: Of the blocks.
      u: Levels that the upper bits choose, or all.
      v: Levels that the lower bits choose; empty for grids.
      signs: Of Hadamard bases that the kernel applies: left rotation, Q1, Q2, right
        rotation; empty where it does not.
    """

    packed: UInt8[Array, " q"]
    coarse: UInt8[Array | np.ndarray, " qc"]
    scale: Float[Array, "i o"]
    u: Float[Array, " ku"]
    v: Float[Array | np.ndarray, " kv"]
    signs: tuple[Int8[Array | np.ndarray, " n"], ...]


class _Layout(NamedTuple):
    """Static choices of a call.

    Attributes:
      results: 1, or 2 where XLA adds up what comes from u and from v.
      outputs: Columns of a result.
      bits: Of a code, of rows of even index where they differ.
      v_bits: As the handler takes them.
      block_height: Inputs that share scales.
      decoded_rows: Rows of x from which on blocks are decoded.
      is_transposed: Whether x is multiplied by W^T.
    """

    results: int
    outputs: int
    bits: int
    v_bits: int
    block_height: int
    decoded_rows: float
    is_transposed: bool = False


def cpu_kashin_product(
    rows: Float[Array, "r m"],
    tensor: KashinTensor,
    bases: Bases,
    options: ProductOptions,
) -> Float[Array, "r n"]:
    """X U + ((X Q1) V) Q2^T by look-ups; by XLA where the kernel has none."""
    reason = (
        _general_reason(rows, options)
        or _kashin_reason(tensor)
        or _many_rows_reason(rows, _can_decode(tensor, bases))
    )
    if reason is not None:
        decline(reason)
        return kashin_product(rows, tensor, bases, options)
    return _differentiable(_kashin_by_kernel, kashin_product, options)(
        rows, tensor, bases
    )


def cpu_kashin_transposed(
    rows: Float[Array, "r n"],
    tensor: KashinTensor,
    bases: Bases,
    options: ProductOptions,
) -> Float[Array, "r m"]:
    """`x @ W.T` without W: levels are looked up, and multiply x where they are."""
    reason = _general_reason(rows, options) or _kashin_reason(tensor)
    if reason is None and rows.shape[0] > _MOST_TRANSPOSED:
        reason = f"x has more than {_MOST_TRANSPOSED} rows, and W is transposed"
    if reason is not None:
        decline(reason)
        return transposed_by_bands(rows, tensor, bases, options)
    kernel = partial(_kashin_by_kernel, is_transposed=True)
    return _differentiable(kernel, transposed_by_bands, options)(rows, tensor, bases)


def cpu_grouped_product(
    rows: Float[Array, "r m"],
    tensor: GroupedTensor,
    bases: Bases,
    options: ProductOptions,
) -> Float[Array, "r n"]:
    """`x @ Q1 A Q2^T` by look-ups; by XLA where the kernel has none."""
    reason = _general_reason(rows, options) or _grouped_reason(tensor)
    if reason is not None:
        decline(reason)
        return grouped_product(rows, tensor, bases, options)
    return _differentiable(_grouped_by_kernel, grouped_product, options)(
        rows, tensor, bases
    )


def cpu_vectors_product(
    rows: Float[Array, "r m"],
    tensor: KashinVectorTensor,
    bases: Bases,
    options: ProductOptions,
) -> Float[Array, "r n"]:
    """`x U + (x P) V` by XLA: the kernel has no magnitudes of every vector."""
    decline(_general_reason(rows, options) or "vectors have magnitudes of their own")
    return vectors_product(rows, tensor, bases, options)


def _general_reason(rows: Float[Array, "r m"], options: ProductOptions) -> str | None:
    """Why XLA multiplies whatever the matrix is; None if it does not."""
    if instruction_set() is None:
        return "there is no CPU kernel"
    if (options.max_tile, options.many_rows) != (MAX_TILE, MANY_ROWS):
        return "`max_tile` or `many_rows` was given, which are XLA's"
    if rows.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"x has type {rows.dtype}"
    if not options.is_local:
        return "XLA may divide it among devices"
    return None


def _many_rows_reason(rows: Float[Array, "r m"], can_decode: bool) -> str | None:
    if rows.shape[0] <= MOST_ROWS or can_decode:
        return None
    return f"x has more than {MOST_ROWS} rows, and blocks of this kind are not decoded"


def _can_decode(tensor: KashinTensor, bases: Bases) -> bool:
    """Whether the kernel can decode blocks with their transforms."""
    (height, width), (basis, rotation) = tensor.layout.block_shape, bases
    assert basis is not None, "a Kashin tensor has one"
    sides = [_sides(name, basis, rotation) for name in ("left", "right")]
    is_known = all(side.signs is not None for side in sides)
    return is_known and height <= 64 and width in (64, 128, 256)


def _decoded_rows(tensor: KashinTensor, bases: Bases) -> float:
    layout = tensor.layout
    if not _can_decode(tensor, bases):
        return math.inf
    v_bits = layout.v_bits
    whole = layout.fine_bits
    fields = [whole, whole] if v_bits is None else [whole - v_bits, v_bits]
    return _break_even(fields, _DECODE)


def _break_even(fields: list[int], decode: float) -> float:
    """Rows of x for which looking up takes as long as decoding blocks does.

    Args:
      fields: Bits of what is looked up: a table serves four rows of W where it is one,
        two where it is two, else one.
      decode: Milliseconds.
    """
    look_ups = sum(1 / max(1, 4 // bits) for bits in fields)
    saved = _LOOK_UP * look_ups - _MULTIPLY
    return decode / saved if saved > 0 else math.inf


def _kashin_reason(tensor: KashinTensor) -> str | None:
    layout = tensor.layout
    widths = [layout.fine_bits]
    if layout.coarse_bits is not None:
        widths.append(layout.coarse_bits)
        if layout.block_shape[0] % 2:
            return "codes take turns between two widths in blocks of odd height"
        if layout.v_bits is None:
            return "codes of two widths stand for general pairs"
    if layout.v_bits is None:
        is_known = max(widths) <= _MOST_WHOLE_BITS
    else:
        splits = {(bits - layout.v_bits, layout.v_bits) for bits in widths}
        is_known = splits <= _SPLITS
    if not is_known:
        return f"there are no look-ups for {layout.bits} bits, v_bits={layout.v_bits}"
    return None


def _grouped_reason(tensor: GroupedTensor) -> str | None:
    if tensor.layout.bits > _MOST_WHOLE_BITS:
        return f"there are no look-ups for grids of {tensor.layout.bits} bits"
    levels = jax.eval_shape(lambda: tensor.float_levels())
    if levels is not None and levels.ndim > 1:
        return "levels differ from column to column"
    return None


def _differentiable(
    kernel: Callable[..., Array], fallback: Kernel, options: ProductOptions
) -> Callable[..., Array]:
    """The kernel with the derivative of XLA's product, in either direction."""

    @jax.custom_jvp
    def product(rows: Array, tensor: Any, bases: Any) -> Array:
        return kernel(rows, tensor, bases)

    def jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
        y = product(*primals)
        leaves, tree = jax.tree.flatten(primals)
        is_zero = lambda t: isinstance(t, jax.custom_derivatives.SymbolicZero)
        slopes = jax.tree.leaves(tangents, is_leaf=is_zero)
        moving = [i for i, slope in enumerate(slopes) if not is_zero(slope)]

        def by_xla(*moved: Array) -> Array:
            own = list(leaves)
            for i, leaf in zip(moving, moved, strict=True):
                own[i] = leaf
            rows, tensor, bases = jax.tree.unflatten(tree, own)
            return fallback(rows, tensor, bases, options).astype(jnp.float32)

        at = [leaves[i] for i in moving]
        _, slope = jax.jvp(by_xla, at, [slopes[i] for i in moving])
        return y, slope

    product.defjvp(jvp, symbolic_zeros=True)
    return product


def _kashin_by_kernel(
    rows: Float[Array, "r m"],
    tensor: KashinTensor,
    bases: Bases,
    *,
    is_transposed: bool = False,
) -> Float[Array, "r n"]:
    basis, rotation = bases
    assert basis is not None, "a Kashin tensor has one"
    layout = tensor.layout
    left, right = (_sides(pair, basis, rotation) for pair in ("left", "right"))
    # Of x and of the result: transform, size of a block, scale.
    before = left, layout.block_shape[0], tensor.in_scale
    after = right, layout.block_shape[1], tensor.out_scale
    if is_transposed:
        before, after = after, before
    x = rows.astype(jnp.float32)
    if before[2] is not None:
        x = x * before[2].astype(jnp.float32)[None]
    x = _transformed(x, before[0], before[1])
    out_side, size, out_scale = after
    codes = _Codes(
        tensor.packed_codes.reshape(-1),
        _NO_CODES if tensor.packed_coarse is None else tensor.packed_coarse.reshape(-1),
        tensor.scale,
        *factor_levels(tensor.centroids, layout.v_bits),
        (*(left.signs or _NONE), *(right.signs or _NONE)),
    )
    own = _Layout(
        results=2 if out_side.signs is None else 1,
        outputs=layout.shape[0 if is_transposed else 1],
        bits=layout.fine_bits,
        v_bits=_PAIRS if layout.v_bits is None else layout.v_bits,
        block_height=layout.block_shape[0],
        decoded_rows=math.inf if is_transposed else _decoded_rows(tensor, bases),
        is_transposed=is_transposed,
    )
    y = _call(own)(x, codes)
    out = y[0]
    if out_side.signs is None:
        out = out + by_blocks(out_side.basis.synthesis, y[1], size)
        if out_side.rotation is not None:
            out = by_blocks(out_side.rotation.synthesis, out, size)
    if out_scale is not None:
        out = out * out_scale.astype(jnp.float32)[None]
    return out


def _grouped_by_kernel(
    rows: Float[Array, "r m"], tensor: GroupedTensor, bases: Bases
) -> Float[Array, "r n"]:
    (m, n), basis = tensor.shape, bases.basis
    x = rows.astype(jnp.float32)
    if basis is not None:
        x = by_blocks(basis.left.analysis, x, m)
    levels = tensor.float_levels()
    if levels is None:
        levels = jnp.arange(2**tensor.layout.bits, dtype=jnp.float32)
    scale = tensor.scale.astype(jnp.float32)[:, 0]
    codes = _Codes(
        tensor.packed_codes.reshape(-1), _NO_CODES, scale, levels,
        np.zeros(0, np.float32), (_NO_SIGNS,) * 4,
    )  # fmt: skip
    height = min(tensor.layout.group_size or m, m)
    bits = tensor.layout.bits
    own = _Layout(1, n, bits, _NO_V, height, _break_even([bits], _DECODE / 3))
    y = _call(own)(x[None], codes)[0]
    zero = tensor.float_zero()
    if zero is not None:
        y = y - zero_products(x, zero, tensor.scale, height)
    return y if basis is None else by_blocks(basis.right.synthesis, y, n)


_NO_SIGNS = np.zeros(0, np.int8)
_NONE = (_NO_SIGNS, _NO_SIGNS)
_NO_CODES = np.zeros(0, np.uint8)


class _Side(NamedTuple):
    """Bases on one side of a matrix.

    Attributes:
      basis: Q1 or Q2.
      rotation: In which blocks were coded; None for the standard one.
      signs: Of both where the kernel can apply them; None where it cannot.
    """

    basis: Basis
    rotation: Basis | None
    signs: tuple[Array | np.ndarray, Array | np.ndarray] | None


def _sides(name: str, basis: KroneckerBasis, rotation: KroneckerBasis | None) -> _Side:
    own: Basis = getattr(basis, name)
    around: Basis | None = None if rotation is None else getattr(rotation, name)
    q, r = _signs(own), _NO_SIGNS if around is None else _signs(around)
    if q is None or r is None:
        return _Side(own, around, None)
    return _Side(own, around, (q, r) if name == "right" else (r, q))


def _signs(basis: Basis) -> Array | np.ndarray | None:
    """Signs of a transform that the kernel applies: none for the identity."""
    if isinstance(basis, IdentityBasis):
        return _NO_SIGNS
    if not isinstance(basis, HadamardBasis):
        return None
    n = basis.signs.shape[-1]
    return basis.signs if n <= _MOST_FUSED and n & (n - 1) == 0 else None


def _transformed(
    x: Float[Array, "r m"], side: _Side, size: int
) -> Float[Array, "f r m"]:
    """For both factors where XLA transforms x; else x itself."""
    if side.signs is not None:
        return x[None]
    if side.rotation is not None:
        x = by_blocks(side.rotation.analysis, x, size)
    return jnp.stack([x, by_blocks(side.basis.analysis, x, size)])


def _call(layout: _Layout) -> Callable[[Array, _Codes], Float[Array, "k r n"]]:
    """The handler, for more rows where `vmap` maps over x alone."""

    @jax.custom_batching.custom_vmap
    def call(x: Float[Array, "f r m"], codes: _Codes) -> Float[Array, "k r n"]:
        return _handler(layout, x, codes)

    @call.def_vmap
    def _(
        size: int, is_batched: Any, x: Array, codes: _Codes
    ) -> tuple[Float[Array, "b k r n"], bool]:
        if any(jax.tree.leaves(is_batched[1])):
            axes = jax.tree.map(lambda is_one: 0 if is_one else None, is_batched)
            each = jax.vmap(partial(_handler, layout), in_axes=tuple(axes))
            return each(x, codes), True
        fields, rows = x.shape[1:3]
        flat = x.transpose(1, 0, 2, 3).reshape(fields, size * rows, -1)
        y = call(flat, codes).reshape(layout.results, size, rows, -1)
        return y.transpose(1, 0, 2, 3), True

    return call


def _handler(layout: _Layout, x: Array, codes: _Codes) -> Float[Array, "k r n"]:
    shape = (layout.results, x.shape[1], layout.outputs)
    call = jax.ffi.ffi_call(
        TARGET, jax.ShapeDtypeStruct(shape, jnp.float32), vmap_method="sequential"
    )
    # Inside `shard_map` all inputs have to vary over the same axes.
    inputs = [
        varying_as(jnp.asarray(a), x, codes) for a in (x, *codes[:-1], *codes.signs)
    ]
    way = _DECODED if x.shape[1] >= layout.decoded_rows else _LOOK_UPS
    if layout.is_transposed:
        way = _TRANSPOSED
    y: Array = call(
        *inputs,
        bits=np.int64(layout.bits),
        v_bits=np.int64(layout.v_bits),
        block_height=np.int64(layout.block_height),
        instruction_set=np.int64(instruction_set() or 0),
        way=np.int64(way),
    )
    return varying_as(y, x, codes)
