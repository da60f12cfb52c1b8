"""Words u + Q v of few levels: what they decode to, and how they are made better.

Given v and the levels, the best u is the nearest level of x - Q v, entry by entry, and
given the codes the best levels are means; likewise for v. Alternating never loses.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt8

from kashin_jax.bases import KroneckerBasis
from kashin_jax.codebooks import assign_scalars
from kashin_jax.methods.joint.schedules import Split

__all__ = [
    "Levels",
    "Words",
    "all_pairs",
    "coarse_rows",
    "decode_words",
    "in_passes",
    "levels_of_pairs",
    "nearest_codes",
    "pair_codes",
    "polished",
    "polished_codes",
]

_ROUNDS = 12


class Levels(NamedTuple):
    """Ascending levels, shared by all blocks.

    Attributes:
      u: Levels of entries of u.
      v: Levels of entries of v.
      coarse: Levels of u in coarse rows; None if there are no such rows.
    """

    u: Float[Array, " ku"]
    v: Float[Array, " kv"]
    coarse: Float[Array, " kc"] | None


class Words(NamedTuple):
    """The words that were found for some blocks.

    Attributes:
      u: Index of a level for every entry of u; in coarse rows, of a coarse level.
      v: The same for v.
      levels: What the indices stand for.
    """

    u: UInt8[Array, "k m n"]
    v: UInt8[Array, "k m n"]
    levels: Levels


def coarse_rows(rows: int) -> Bool[Array, "m 1"]:
    """Which rows of a block have one bit fewer in u, if any do: those of odd index."""
    return (jnp.arange(rows) % 2 == 1)[:, None]


def decode_words(words: Words, basis: KroneckerBasis) -> Float[Array, "k m n"]:
    """The blocks u + Q v that the words stand for."""
    u = jax.vmap(lambda codes: _values_u(codes, words.levels))(words.u)
    return u + basis.synthesis(words.levels.v[words.v])


def pair_codes(words: Words, split: Split) -> UInt8[Array, "k m n"]:
    """Index of a pair of levels for every weight, see `all_pairs`."""
    codes = (words.u << split.v) | words.v
    if not split.half:
        return codes
    first_coarse = 2 ** (split.u + split.v)
    return jnp.where(coarse_rows(codes.shape[1])[None], codes + first_coarse, codes)


def all_pairs(levels: Levels) -> Float[Array, "k 2"]:
    """All pairs of a level of u and one of v, that of v changing fastest.

    The pairs of coarse levels come last.
    """
    tables = [levels.u] if levels.coarse is None else [levels.u, levels.coarse]
    pairs = []
    for table in tables:
        both = jnp.meshgrid(table, levels.v, indexing="ij")
        pairs.append(jnp.stack([pair.reshape(-1) for pair in both], axis=1))
    return jnp.concatenate(pairs)


def levels_of_pairs(pairs: Float[Array, "k 2"], split: Split) -> Levels:
    """Inverts `all_pairs`."""
    v, fine = 2**split.v, 2 ** (split.u + split.v)
    coarse = pairs[fine::v, 0] if split.half else None
    return Levels(u=pairs[:fine:v, 0], v=pairs[:v, 1], coarse=coarse)


def in_passes(
    function: Callable[[Any], Any], blocks: PyTree[Array], pass_size: int
) -> PyTree[Array]:
    """Applies `function` to every block, so many weights at a time.

    Args:
      function: Takes one block, or a tree of them.
      blocks: Arrays of blocks `[k, m, n]`.
      pass_size: Weights of a pass.
    """
    k, m, n = jax.tree.leaves(blocks)[0].shape
    return jax.lax.map(
        function, blocks, batch_size=min(max(1, pass_size // (m * n)), k)
    )


def nearest_codes(
    x: Float[Array, "m n"],
    v: Float[Array, "m n"],
    levels: Levels,
    basis: KroneckerBasis,
) -> tuple[UInt8[Array, "m n"], UInt8[Array, "m n"]]:
    """The best u of a block for a given v, and the best v for that u."""
    u = _nearest_u(x - basis.synthesis(v), levels)
    return u, assign_scalars(basis.analysis(x - _values_u(u, levels)), levels.v)


def polished(
    x: Float[Array, "k m n"], words: Words, basis: KroneckerBasis, pass_size: int
) -> Words:
    """Alternates nearest levels and their means, the means taken over all blocks."""

    def round_trip(_: Int[Array, ""], words: Words) -> Words:
        words = _better_u(x, words, basis, pass_size)
        return _better_v(x, words, basis, pass_size)

    return jax.lax.fori_loop(0, _ROUNDS, round_trip, words)


def polished_codes(
    x: Float[Array, "k m n"], words: Words, basis: KroneckerBasis, pass_size: int
) -> Words:
    """Alternates nearest levels of u and of v, whose values stay."""
    levels = words.levels

    def block(parts: tuple[Array, Array]) -> tuple[Array, Array]:
        x, v = parts
        u, v = nearest_codes(x, levels.v[v], levels, basis)
        return jax.lax.fori_loop(
            1, _ROUNDS,
            lambda _, codes: nearest_codes(x, levels.v[codes[1]], levels, basis),
            (u, v),
        )  # fmt: skip

    u, v = in_passes(block, (x, words.v), pass_size)
    return words._replace(u=u, v=v)


# A block's sums leave a pass instead of masks of the size of the matrix, and fields are
# kept, not made twice: 4 times the float32 matrix in all, where plain array code took
# up to 14.5 (4096 x 4096, 5 bits, `compiled.memory_analysis()`).
def _better_u(
    x: Float[Array, "k m n"], words: Words, basis: KroneckerBasis, pass_size: int
) -> Words:
    levels = words.levels

    def field(block: tuple[Array, Array, Array]) -> tuple[Array, Array, Array | None]:
        x, u, v = block
        h = x - basis.synthesis(levels.v[v])
        if levels.coarse is None:
            return h, _sums(h, u, levels.u, True), None
        is_coarse = coarse_rows(x.shape[0])
        fine = _sums(h, u, levels.u, ~is_coarse)
        return h, fine, _sums(h, u, levels.coarse, is_coarse)

    h, fine, coarse = in_passes(field, (x, words.u, words.v), pass_size)
    levels = levels._replace(u=_means(fine, levels.u))
    if levels.coarse is not None:
        levels = levels._replace(coarse=_means(coarse, levels.coarse))
    u = in_passes(lambda h: _nearest_u(h, levels), h, pass_size)
    return words._replace(u=u, levels=levels)


def _better_v(
    x: Float[Array, "k m n"], words: Words, basis: KroneckerBasis, pass_size: int
) -> Words:
    levels = words.levels

    def field(block: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        x, u, v = block
        h = basis.analysis(x - _values_u(u, levels))
        return h, _sums(h, v, levels.v, True)

    h, sums = in_passes(field, (x, words.u, words.v), pass_size)
    levels = levels._replace(v=_means(sums, levels.v))
    v = in_passes(lambda h: assign_scalars(h, levels.v), h, pass_size)
    return words._replace(v=v, levels=levels)


def _nearest_u(h: Float[Array, "m n"], levels: Levels) -> UInt8[Array, "m n"]:
    fine = assign_scalars(h, levels.u)
    if levels.coarse is None:
        return fine
    return jnp.where(coarse_rows(h.shape[0]), assign_scalars(h, levels.coarse), fine)


def _values_u(u: UInt8[Array, "m n"], levels: Levels) -> Float[Array, "m n"]:
    fine = levels.u.at[u].get(mode="clip")
    if levels.coarse is None:
        return fine
    # A fine index may lie beyond the coarse levels; its value is not taken.
    coarse = levels.coarse.at[u].get(mode="clip")
    return jnp.where(coarse_rows(u.shape[0]), coarse, fine)


def _sums(
    h: Float[Array, "m n"],
    codes: UInt8[Array, "m n"],
    levels: Float[Array, " c"],
    rows: Bool[Array, "m 1"] | bool,
) -> Float[Array, "2 c"]:
    """Number and sum of the fields in `rows` that have each level."""
    mine = [(codes == i) & rows for i in range(levels.shape[0])]
    return jnp.stack([
        jnp.stack([jnp.sum(one).astype(h.dtype) for one in mine]),
        jnp.stack([jnp.sum(jnp.where(one, h, 0.0)) for one in mine]),
    ])  # fmt: skip


def _means(
    sums: Float[Array, "k 2 c"], levels: Float[Array, " c"]
) -> Float[Array, " c"]:
    """The mean of the fields where each level is used; an unused level stays."""
    count, total = jnp.sum(sums, axis=0)
    mean = total / jnp.maximum(count, 1.0)
    return jnp.sort(jnp.where(count > 0, mean, levels))
