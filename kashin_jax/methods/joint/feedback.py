"""Joint coding with error feedback: bands of inputs, those of most output first.

A band is a row of blocks. Its target is its weights and what was lost of the bands
before it, carried on through the second moments of the inputs (`methods/feedback.py`);
its blocks are searched as they always are, with levels that are known. Bands lie in the
order of what they give out, and are coded from the last to the first.

Where it is known how outputs matter, by G of tr(G E^T H E), columns of blocks are coded
one after another, too, the last one first: with G = F D F^T, `F` unit block triangular,
what was lost of those behind is carried on through F, and each column is then a matrix
of its own. This is the two-sided feedback of YAQA (Tseng, Sun and De Sa 2025,
arXiv:2505.22988) with blocks of joint coding in place of 16 x 16.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from kashin_jax.bases import KroneckerBasis
from kashin_jax.methods.base import is_traced
from kashin_jax.methods.feedback import Triangular, triangular_factors
from kashin_jax.methods.joint.anneal import anneal
from kashin_jax.methods.joint.scales import (
    as_half,
    relative_quarter,
    relative_rms,
    weighted_scale,
)
from kashin_jax.methods.joint.schedules import Split
from kashin_jax.methods.joint.words import Levels, decode_words, pair_codes
from kashin_jax.tensors.blocks import from_blocks, to_blocks

__all__ = ["FedCode", "Search", "code_with_feedback"]


class Search(NamedTuple):
    """Static choices of the search.

    Attributes:
      split: Bits of u and of v.
      steps: Steps of the annealing.
      block_shape: Divides the matrix; its height is that of a band.
      distortion: About the share of a Gaussian's variance that coding loses.
      expansion: Power of `<w, w> / <w, w_q>` by which outputs are scaled at the end,
        the products taken in the metric of the moments.
      scales_inputs: Whether inputs have scales; without, all are 1.
    """

    split: Split
    steps: int
    block_shape: tuple[int, int]
    distortion: float
    expansion: float
    scales_inputs: bool = True


class FedCode(NamedTuple):
    """What was found of a matrix.

    Attributes:
      codes: Index of a pair for every weight.
      scale: Root-mean-square of every block.
      in_scale: Factor of every input.
      out_scale: Factor of every output.
    """

    codes: UInt8[Array, "m n"]
    scale: Float[Array, "r c"]
    in_scale: Float[Array, " m"]
    out_scale: Float[Array, " n"]


class _Band(NamedTuple):
    codes: UInt8[Array, "size n"]
    scale: Float[Array, " c"]
    in_scale: Float[Array, " size"]


def code_with_feedback(
    weight: Float[Array, "m n"],
    moments: Float[Array, "m m"],
    levels: Levels,
    basis: KroneckerBasis,
    rotation: KroneckerBasis | None,
    search: Search,
    out_moments: Float[Array, "n n"] | None = None,
) -> FedCode:
    """Codes a matrix so that little of its outputs is lost.

    With moments that are a multiple of the identity nothing is fed back, and the codes
    are those of `joint_code` for equal importances and the same levels.

    Args:
      weight: The matrix, `[in, out]`; must be finite.
      moments: Damped second moments of its inputs.
      levels: Of all blocks; refitting them would change bands that are coded already.
      basis: The bases of one block.
      rotation: Those in which blocks are coded; None for the standard one.
      search: Static choices.
      out_moments: How outputs matter; None where all matter alike.
    """
    leaves = jax.tree.leaves((weight, moments, levels, basis, rotation, out_moments))
    # Options of the compiler are for programs of their own.
    alone = jax.default_backend() == "cpu" and not any(map(is_traced, leaves))
    code = _code_by_one_thread if alone else _code
    return code(weight, moments, levels, basis, rotation, search, out_moments)


def _coded(
    weight: Float[Array, "m n"],
    moments: Float[Array, "m m"],
    levels: Levels,
    basis: KroneckerBasis,
    rotation: KroneckerBasis | None,
    search: Search,
    out_moments: Float[Array, "n n"] | None,
) -> FedCode:
    m, n = weight.shape
    size, width = search.block_shape
    peak = jnp.max(jnp.abs(weight)).astype(jnp.float32)
    x = weight.astype(jnp.float32) / jnp.where(peak > 0, peak, 1.0)
    order = _order_of_bands(x, moments, size)
    rows = jnp.arange(m).reshape(-1, size)[order].reshape(-1)
    outputs = None
    if out_moments is not None:
        outputs = triangular_factors(out_moments, width, last_first=True)
    out_scale = _output_scale(x, outputs, search)
    plain = x / out_scale[None, :]
    x = plain[rows]
    inputs = triangular_factors(moments, size, last_first=True, order=rows)
    in_scale = _band_scale(x, inputs, search)
    code = partial(_code_band, levels=levels, basis=basis, rotation=rotation)
    code = partial(code, search=search)
    if outputs is None:
        coded, found = _code_bands(x, inputs.factor, in_scale, code, size)
    else:
        # Relative to scales, as the matrix is.
        factor = out_scale[:, None] * outputs.factor / out_scale[None, :]
        # Columns share the scales of inputs, which so are those of the matrix itself.
        scales = jax.vmap(in_scale)(x.reshape(-1, size, n), jnp.arange(m // size))
        coded, found = _code_columns(
            x, inputs.factor, factor, scales, code, search.block_shape
        )
    if search.expansion:
        gain = _expansion(plain, coded[jnp.argsort(rows)], moments) ** search.expansion
        out_scale = as_half(out_scale * gain)
    back = jnp.argsort(order)
    return FedCode(
        codes=found.codes[back].reshape(m, n),
        scale=found.scale[back] * peak,
        in_scale=found.in_scale[back].reshape(m),
        out_scale=out_scale,
    )


def _order_of_bands(
    x: Float[Array, "m n"], moments: Float[Array, "m m"], size: int
) -> Int[Array, " r"]:
    """The bands of inputs, those of the least output first.

    The band coded first is helped by no other, the last one by all: over nine layers of
    an OPT, at 2 bits, the one that gives out most first loses .975 of what the order of
    inputs does (.92 to .99), the other way round 1.03. Greedy choices by what is left
    of the moments once others are known came to .972.
    """
    given = jnp.diagonal(moments) * jnp.mean(jnp.square(x), axis=1)
    return jnp.argsort(jnp.sum(given.reshape(-1, size), axis=1))


def _output_scale(
    x: Float[Array, "m n"], outputs: Triangular | None, search: Search
) -> Float[Array, " n"]:
    """The scale of every output, by which its weights are divided before coding."""
    if outputs is None:
        # Outputs have the same moments, so that feedback never mixes them.
        return relative_rms(x, axis=0, power=1.0)
    return weighted_scale(
        relative_rms(x, axis=0, power=0.5),
        relative_quarter(_diagonals(outputs).reshape(-1)),
        search.distortion,
        search.block_shape[1],
    )


_BandScale = Callable[[Float[Array, "size n"], Int[Array, ""]], Float[Array, " size"]]
"""Scales of a band's inputs, by its target and its index."""


def _band_scale(
    x: Float[Array, "m n"], inputs: Triangular, search: Search
) -> _BandScale:
    size = search.block_shape[0]
    if not search.scales_inputs:
        return lambda rows, index: jnp.ones(size, jnp.float32)
    quarter = relative_quarter(_diagonals(inputs).reshape(-1)).reshape(-1, size)
    # As `relative_rms` of the whole matrix has it, since targets come one by one.
    mean = jnp.mean(_rms(x) ** 0.5)
    mean = jnp.where(mean > 0, mean, 1.0)

    def in_scale(rows: Float[Array, "size k"], index: Int[Array, ""]) -> Array:
        root = _rms(rows) ** 0.5
        root = as_half(jnp.where(root > 0, root / mean, 1.0))
        return weighted_scale(root, quarter[index], search.distortion, size)

    return in_scale


def _diagonals(factors: Triangular) -> Float[Array, "g size"]:
    return jnp.diagonal(factors.metric, axis1=1, axis2=2)


def _code_bands(
    x: Float[Array, "m n"],
    factor: Float[Array, "m m"],
    in_scale: _BandScale,
    code: Callable[..., tuple[_Band, Float[Array, "size n"]]],
    size: int,
) -> tuple[Float[Array, "m n"], _Band]:
    """What bands decode to, and their codes stacked, the last band coded first.

    Args:
      x: The matrix.
      factor: Of the moments of inputs.
      in_scale: From `_band_scale`.
      code: `_code_band` of a target and its scales.
      size: Rows of a band.
    """
    m = x.shape[0]

    def of_band(
        coded: Float[Array, "m n"], index: Int[Array, ""]
    ) -> tuple[Array, _Band]:
        start = index * size
        columns = jax.lax.dynamic_slice_in_dim(factor, start, size, axis=1)
        # Bands that are not coded yet have lost nothing.
        behind = jnp.arange(m)[:, None] >= start + size
        lost = jnp.where(behind, x - coded, 0.0)
        own = jax.lax.dynamic_slice_in_dim(x, start, size)
        target = own + jnp.einsum("ij,in->jn", columns, lost, precision="highest")
        found, decoded = code(target, in_scale(target, index))
        return jax.lax.dynamic_update_slice(coded, decoded, (start, 0)), found

    bands = jnp.arange(m // size)
    return jax.lax.scan(of_band, jnp.zeros_like(x), bands, reverse=True)


def _code_columns(
    x: Float[Array, "m n"],
    factor: Float[Array, "m m"],
    out_factor: Float[Array, "n n"],
    scales: Float[Array, "r size"],
    code: Callable[..., tuple[_Band, Float[Array, "size width"]]],
    block_shape: tuple[int, int],
) -> tuple[Float[Array, "m n"], _Band]:
    """As `_code_bands`, one column of blocks after another, the last one first.

    Args:
      x: The matrix.
      factor: Of the moments of inputs.
      out_factor: Of those of outputs.
      scales: Of the inputs of every band.
      code: As for `_code_bands`.
      block_shape: Its width is that of a column.
    """
    n, (size, width) = x.shape[1], block_shape

    def of_column(
        coded: Float[Array, "m n"], index: Int[Array, ""]
    ) -> tuple[Array, _Band]:
        start = index * width
        carried = jax.lax.dynamic_slice_in_dim(out_factor, start, width, axis=1)
        behind = jnp.arange(n)[None, :] >= start + width
        lost = jnp.where(behind, x - coded, 0.0)
        own = jax.lax.dynamic_slice_in_dim(x, start, width, axis=1)
        target = own + jnp.einsum("mn,nk->mk", lost, carried, precision="highest")
        decoded, found = _code_bands(target, factor, lambda _, i: scales[i], code, size)
        return jax.lax.dynamic_update_slice(coded, decoded, (0, start)), found

    columns = jnp.arange(n // width)
    coded, found = jax.lax.scan(of_column, jnp.zeros_like(x), columns, reverse=True)
    return coded, _Band(
        codes=jnp.moveaxis(found.codes, 0, 2),
        scale=found.scale[..., 0].T,
        in_scale=scales,
    )


_code = jax.jit(_coded, static_argnames="search")
# A band is a few thousand weights, which two threads spend their time on handing over:
# 384 x 1536 weights in 50 steps took .78 s of CPU time, by one thread .16; while other
# programs used the same two cores, 5.2 s and 1.1 s passed.
_code_by_one_thread = jax.jit(
    _coded,
    static_argnames="search",
    compiler_options={"xla_cpu_multi_thread_eigen": False},
)


def _code_band(
    target: Float[Array, "size n"],
    in_scale: Float[Array, " size"],
    levels: Levels,
    basis: KroneckerBasis,
    rotation: KroneckerBasis | None,
    search: Search,
) -> tuple[_Band, Float[Array, "size n"]]:
    blocks = to_blocks(target / in_scale[:, None], search.block_shape)
    blocks = blocks if rotation is None else rotation.analysis(blocks)
    scale = jnp.sqrt(jnp.mean(jnp.square(blocks), axis=(2, 3)))
    factor = scale[..., None, None]
    unit = blocks / jnp.where(factor > 0, factor, 1.0)
    words = anneal(
        unit[0], basis, split=search.split, steps=search.steps, levels=levels
    )
    decoded = decode_words(words, basis)[None] * factor
    decoded = decoded if rotation is None else rotation.synthesis(decoded)
    codes = from_blocks(pair_codes(words, search.split)[None])
    return _Band(codes, scale[0], in_scale), from_blocks(decoded) * in_scale[:, None]


def _rms(x: Float[Array, "k n"]) -> Float[Array, " k"]:
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=1))


def _expansion(
    x: Float[Array, "m n"], coded: Float[Array, "m n"], moments: Float[Array, "m m"]
) -> Float[Array, " n"]:
    """`<w, w> / <w, w_q>` of every output in the metric; 1 where not in (1/2, 2)."""
    heard = jnp.einsum("ij,jn->in", moments, x, precision="highest")
    whole, kept = jnp.sum(heard * x, axis=0), jnp.sum(heard * coded, axis=0)
    ratio = whole / jnp.where(kept > 0, kept, 1.0)
    return jnp.where((kept > 0) & (ratio > 0.5) & (ratio < 2), ratio, 1.0)
