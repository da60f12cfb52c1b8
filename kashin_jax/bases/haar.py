"""Haar-distributed orthogonal matrices, stored dense."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from kashin_jax.bases.axes import multiply_along

__all__ = ["HaarBasis", "make_haar"]


class HaarBasis(NamedTuple):
    """A dense orthogonal Q: O(n^2) memory and O(n^2) time per vector."""

    matrix: Float[Array, "n n"]

    def analysis(
        self, x: Float[Array, "*shape"], axis: int = -1
    ) -> Float[Array, "*shape"]:
        return multiply_along(self.matrix.T, x, axis)

    def synthesis(
        self, y: Float[Array, "*shape"], axis: int = -1
    ) -> Float[Array, "*shape"]:
        return multiply_along(self.matrix, y, axis)


def make_haar(key: Key[Array, ""], n: int) -> HaarBasis:
    """Q of a Gaussian matrix with the signs of R's diagonal moved into Q.

    Without that sign fix (as in the 2024 paper's code) Q is orthogonal but not Haar.
    Source: Mezzadri, "How to generate random matrices from the classical compact
    groups", Notices of the AMS 54 (2007).
    """
    return HaarBasis(jax.random.orthogonal(key, n, dtype=jnp.float32))
