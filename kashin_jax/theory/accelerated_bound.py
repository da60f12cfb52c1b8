"""The accelerated form of Kashin's theorem, for bases with random signs.

Let F be orthonormal with entries of at most K / sqrt(N), and P = F^T diag(signs) F. For
most signs and every x of unit length

    max(|x|_1, |P x|_1) >= R(N) / (K sqrt(2)),
    R(N) = sqrt(N) / (c3 (log N)^(1/2) (log log N)^3).

Source: Kashin, Oseledets and Rudikov (2025), as stated in Cherniuk et al. (2026), arXiv
2609.11687, Theorem 2. The absolute constant c3 is not given there: what can be checked
is that vectors on which P does badly ask for no larger one as N grows.
"""

import math

import numpy as np
from jaxtyping import Float

__all__ = ["accelerated_constant", "accelerated_ratio", "spread"]

SPREAD_OF_DCT = math.sqrt(2)
"""K of the orthonormal DCT-II."""


def spread(rows: Float[np.ndarray, "n n"]) -> float:
    """K: the largest entry of an orthonormal matrix of order N, times sqrt(N)."""
    return float(np.abs(rows).max() * math.sqrt(len(rows)))


def accelerated_ratio(n: int, c3: float, k: float = SPREAD_OF_DCT) -> float:
    """The l1 ratio that the theorem promises: `R(N) / (K sqrt(2 N))`.

    The constant c1 of the basis, so that `rate_from_constant` and `round_rate` take it:
    its square is the theorem's alpha.

    Args:
      n: Length of the vectors.
      c3: The absolute constant.
      k: Spread of the matrix.

    Raises:
      ValueError: If `n < 3`, where log log N is not positive, or a constant is not.
    """
    if n < 3:
        raise ValueError(f"`n` must be at least 3, so that log log n > 0. Got {n}.")
    if not (c3 > 0 and k > 0):
        raise ValueError(f"`c3` and `k` must be positive. Got {c3} and {k}.")
    growth = math.sqrt(math.log(n)) * math.log(math.log(n)) ** 3
    return 1 / (c3 * growth * k * math.sqrt(2))


def accelerated_constant(ratio: float, n: int, k: float = SPREAD_OF_DCT) -> float:
    """The least c3 with which the theorem allows a vector of that l1 ratio.

    Args:
      ratio: From `l1_ratio`, or the smallest one of `search_worst_case`.
      n: Length of the vector.
      k: Spread of the matrix.

    Raises:
      ValueError: As `accelerated_ratio`; and if the ratio is not positive.
    """
    if not ratio > 0:
        raise ValueError(f"`ratio` must be positive. Got {ratio}.")
    return accelerated_ratio(n, 1.0, k) / ratio
