"""Butterfly matrices: log2(n) sparse factors, one angle per block, for any n.

Factor `level` = 0, 1, ... has 2^level blocks. Block j covers the coordinates

    floor(j n / 2^level) <= i < floor((j + 1) n / 2^level),

it is split at m = floor((2 j + 1) n / 2^(level + 1)), and its angle, number m - 1,
turns every coordinate of the shorter part with its like in the other part. For n = 2^p
these are the factors B_n, B_(n/2), ..., B_2 of the paper, [[c I, -s I], [s I, c I]] in
every block, with the authors' numbering of the angles. In general the blocks of a
factor differ by 1 in size at most, the odd coordinate of a block rests, and the number
of angles is n - 1 all the same: blocks of size above 1 are the inner nodes of a tree
with n leaves. (The authors cut the next power of two down to n x n instead.)

Source: Merkulov et al. (2024), arXiv 2404.09737, after Munkhoeva et al., "Quadrature-
based features for kernel approximation", NeurIPS 2018.
"""

from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Key

from kashin_jax.bases.axes import fibres
from kashin_jax.bases.basis import draw_permutation
from kashin_jax.bases.rotations import Turn, permute, turn_of, turn_pairs

__all__ = [
    "Butterfly3Basis",
    "ButterflyBasis",
    "count_pairs",
    "make_butterfly",
    "make_butterfly3",
]


class ButterflyBasis(NamedTuple):
    """Q = B_n ... B_4 B_2.

    The authors' code multiplies in the reverse order: the transposed matrix of the
    opposite angles.

    Attributes:
      angles: In radians, n - 1 of them.
    """

    angles: Float[Array, " n-1"]

    def analysis(
        self, x: Float[Array, "*shape"], axis: int = -1
    ) -> Float[Array, "*shape"]:
        y = fibres(x, self.angles.shape[-1] + 1, axis)
        return _analysis(turn_of(self.angles, x.dtype), y).reshape(x.shape)

    def synthesis(
        self, y: Float[Array, "*shape"], axis: int = -1
    ) -> Float[Array, "*shape"]:
        x = fibres(y, self.angles.shape[-1] + 1, axis)
        return _synthesis(turn_of(self.angles, y.dtype), x).reshape(y.shape)


class Butterfly3Basis(NamedTuple):
    """Q = (B P)^3 with a butterfly B and a permutation P, the same three times.

    Attributes:
      angles: The n - 1 angles of B, in radians.
      order: P x is `x[order]`.
      inverse: P^T x is `x[inverse]`.
    """

    angles: Float[Array, " n-1"]
    order: Int32[Array, " n"]
    inverse: Int32[Array, " n"]

    def analysis(
        self, x: Float[Array, "*shape"], axis: int = -1
    ) -> Float[Array, "*shape"]:
        y, turn = fibres(x, self.order.shape[-1], axis), turn_of(self.angles, x.dtype)
        once = lambda _, z: permute(_analysis(turn, z), self.inverse)
        return jax.lax.fori_loop(0, 3, once, y).reshape(x.shape)

    def synthesis(
        self, y: Float[Array, "*shape"], axis: int = -1
    ) -> Float[Array, "*shape"]:
        x, turn = fibres(y, self.order.shape[-1], axis), turn_of(self.angles, y.dtype)
        once = lambda _, z: _synthesis(turn, permute(z, self.order))
        return jax.lax.fori_loop(0, 3, once, x).reshape(y.shape)


def make_butterfly(key: Key[Array, ""], n: int) -> ButterflyBasis:
    """A butterfly basis of R^n with random angles."""
    return ButterflyBasis(_draw_angles(key, n))


def make_butterfly3(key: Key[Array, ""], n: int) -> Butterfly3Basis:
    """The composition (B P)^3 of R^n with random angles and a random permutation."""
    angles_key, order_key = jax.random.split(key)
    order = draw_permutation(order_key, n)
    inverse = jnp.argsort(order).astype(jnp.int32)
    return Butterfly3Basis(_draw_angles(angles_key, n), order, inverse)


def count_pairs(n: int) -> int:
    """Plane rotations in a butterfly of order `n`; n / 2 log2(n) for powers of two."""
    return sum(_count_pairs(n, level) for level in range(_depth(n)))


def _draw_angles(key: Key[Array, ""], n: int) -> Float[Array, " {n}-1"]:
    # As the authors do. Each angle is uniform; neighbours share a Gaussian number.
    g = jax.random.normal(key, (n,), jnp.float32)
    return jnp.arctan2(g[:-1], g[1:])


def _depth(n: int) -> int:
    return (n - 1).bit_length()


def _analysis(turn: Turn, x: Float[Array, "b n k"]) -> Float[Array, "b n k"]:
    back = turn.inverse()
    for level in range(_depth(x.shape[1])):
        x = _factor(back, x, level)
    return x


def _synthesis(turn: Turn, x: Float[Array, "b n k"]) -> Float[Array, "b n k"]:
    for level in reversed(range(_depth(x.shape[1]))):
        x = _factor(turn, x, level)
    return x


def _factor(turn: Turn, x: Float[Array, "b n k"], level: int) -> Float[Array, "b n k"]:
    n = x.shape[1]
    if n % (2 << level):
        return _uneven_factor(turn, x, level)
    half = n >> (level + 1)
    of_blocks = Turn(*(values[half - 1 :: 2 * half] for values in turn))
    halves = x.reshape(x.shape[0], 1 << level, 2, half * x.shape[2])
    turned = turn_pairs(of_blocks, halves[:, :, 0], halves[:, :, 1])
    return jnp.stack(turned, axis=2).reshape(x.shape)


def _uneven_factor(
    turn: Turn, x: Float[Array, "b n k"], level: int
) -> Float[Array, "b n k"]:
    pairing = _pairing(x.shape[1], level)
    is_paired, sign = pairing.sign != 0, jnp.asarray(pairing.sign, x.dtype)
    cos = jnp.where(is_paired, turn.cos[pairing.angle], jnp.ones((), x.dtype))
    sin = sign * turn.sin[pairing.angle]
    other = permute(x, jnp.asarray(pairing.partner))
    return cos[None, :, None] * x + sin[None, :, None] * other


class _Pairing(NamedTuple):
    """Per coordinate: its partner, their angle, and the sign of the sine; 0 rests."""

    partner: np.ndarray
    angle: np.ndarray
    sign: np.ndarray


@lru_cache(maxsize=256)
def _pairing(n: int, level: int) -> _Pairing:
    i = np.arange(n)
    block = (((i + 1) << level) - 1) // n
    start, end = (block * n) >> level, ((block + 1) * n) >> level
    middle = ((2 * block + 1) * n) >> (level + 1)
    is_first = i < middle
    place = i - np.where(is_first, start, middle)
    is_paired = place < np.minimum(middle - start, end - middle)
    partner = place + np.where(is_first, middle, start)
    sign = np.where(is_first, -1, 1)
    return _Pairing(
        np.where(is_paired, partner, i).astype(np.int32),
        np.where(is_paired, middle - 1, 0).astype(np.int32),
        np.where(is_paired, sign, 0).astype(np.int8),
    )


def _count_pairs(n: int, level: int) -> int:
    return int(np.count_nonzero(_pairing(n, level).sign)) // 2
