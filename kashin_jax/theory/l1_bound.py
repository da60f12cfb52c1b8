"""The l1 bound behind Kashin's theorem, and its value on eigenvectors of a basis.

    max(|x|_1, |Q^T x|_1) >= c1 sqrt(N) |x|_2    for every x.

A greedy step leaves at most `sqrt(1 - ratio(r)^2)` of the residual r, so the constant
c1 of a basis bounds the rate of the decomposition and the max-norms of its factors.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kashin_jax.bases import Basis, dense
from kashin_jax.decomposition import Frame
from kashin_jax.theory.solution import unit_block

__all__ = [
    "EigenvectorRatios",
    "eigenvector_ratios",
    "l1_ratio",
    "level_from_rate",
    "rate_from_constant",
]

# Shorter real or imaginary parts of a unit eigenvector are rounding.
_SHORTEST = 1e-6
# One by one, the small products of a butterfly take a second to compile.
_dense = jax.jit(dense, static_argnums=1)


@jax.jit
def l1_ratio(basis: Frame, x: Float[Array, "*shape"]) -> Float[Array, ""]:
    """`max(|x|_1, |Q^T x|_1) / (sqrt(N) |x|_2)`, at most 1; .798 on Gaussian blocks.

    NaN for a zero block, where it is not defined. Source: Kashin (1977), as in Merkulov
    et al. (2024), arXiv 2404.09737, Theorem 1 and Table 1.
    """
    unit, scale = unit_block(x)
    own, other = jnp.mean(jnp.abs(unit)), jnp.mean(jnp.abs(basis.analysis(unit)))
    return jnp.where(scale > 0, jnp.maximum(own, other), jnp.nan)


def rate_from_constant(constant: float) -> float:
    """Gamma = sqrt(1 - c1^2): what a greedy step leaves of the residual at most."""
    return float(np.sqrt(1 - np.square(constant)))


def level_from_rate(gamma: float) -> float:
    """Bound 1 / (1 - gamma) of `sqrt(N) |u|_inf / |x|_2`: a sum of gamma^k.

    A step adds |r|_1 / N, at most |r|_2 / sqrt(N), to every entry.
    """
    return 1 / (1 - gamma) if gamma < 1 else float("inf")


class EigenvectorRatios(NamedTuple):
    """The l1 ratio on real and imaginary parts of the eigenvectors of Q.

    Attributes:
      ratios: Ascending, one for each part that is not zero.
      vectors: The parts themselves, of unit length, a row each, in the same order.
    """

    ratios: Float[np.ndarray, " p"]
    vectors: Float[np.ndarray, "p n"]


def eigenvector_ratios(basis: Basis, n: int) -> EigenvectorRatios:
    """The l1 ratio on the eigenvectors of Q, where Q does not help to spread x.

    On the host, in float64, from the dense matrix: O(n^3) time and O(n^2) memory. Of
    two conjugate eigenvectors one is taken. Where an eigenvalue is multiple, as for
    reflections, the eigenvectors, and so the ratios, are those that LAPACK chooses.

    Raises:
      ValueError: If the basis is made for another length.

    Source: Merkulov et al. (2024), arXiv 2404.09737, Table 1.
    """
    q = np.asarray(_dense(basis, n), np.float64)
    values, vectors = np.linalg.eig(q)
    upper = vectors[:, values.imag >= 0].T
    parts = np.concatenate([upper.real, upper.imag])
    norms = np.linalg.norm(parts, axis=1)
    parts = parts[norms > _SHORTEST] / norms[norms > _SHORTEST, None]
    l1 = [np.abs(rows).sum(axis=1) for rows in (parts, parts @ q)]
    ratios = np.maximum(*l1) / np.sqrt(n)
    order = np.argsort(ratios)
    return EigenvectorRatios(ratios[order], parts[order])
