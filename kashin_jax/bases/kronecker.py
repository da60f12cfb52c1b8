"""Pairs of bases acting on the two sides of a matrix: Q2 (x) Q1 on vec(X)."""

from typing import NamedTuple

from jaxtyping import Array, Float

from kashin_jax.bases.basis import Basis

__all__ = ["KroneckerBasis"]


class KroneckerBasis(NamedTuple):
    """`analysis(X) = Q1^T X Q2` and `synthesis(Y) = Q1 Y Q2^T` on the last two axes.

    Costs m^2 + n^2 numbers at most, not (mn)^2, but has no dimension-free guarantee:
    the rank-one matrix e_i (Q2 e_j)^T is hard for every pair of bases.

    Attributes:
      left: Q1, on columns (axis -2, the input side of a Flax kernel).
      right: Q2, on rows (axis -1, the output side of a Flax kernel).
    """

    left: Basis
    right: Basis

    def analysis(self, x: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
        return self.right.analysis(self.left.analysis(x, axis=-2), axis=-1)

    def synthesis(self, y: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
        return self.right.synthesis(self.left.synthesis(y, axis=-2), axis=-1)
