"""The randomised Walsh-Hadamard basis, for any length.

Length rule: n = c * 2^p with c odd. The matrix is core (x) Sylvester, where

* c = 1: Sylvester's matrix H_(2^p) alone;
* 4c - 1 prime and p >= 2: Paley's matrix of order 4c, with 2^(p-2) left to Sylvester.
  384, 768, 1536, 3072 (c = 3) get H_12; 320, 640, 1280 (c = 5) get H_20. All entries
  are +-1 / sqrt(n);
* otherwise: the orthonormal DCT-II of order c; entries are at most sqrt(2 / n).
  11008 = 43 * 256 is of this kind. Cost O(n (c + log n)), c being dense up to 1024;
  beyond, as for a prime vocabulary, the same matrix is applied by the FFT.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int8, Key

from kashin_jax.bases.axes import along, fibres, multiply_kronecker_along
from kashin_jax.bases.basis import draw_signs

__all__ = [
    "HadamardBasis",
    "fft_order",
    "hadamard_factors",
    "make_hadamard",
    "paley_matrix",
]

# Largest Sylvester factor multiplied as one dense matrix: see `axes`.
MAX_FACTOR_LOG2 = 5

# Largest odd order that is held as a matrix. One of 4093 is 67 MB, of which a compiled
# program keeps dozens of copies: coding 1 MB of weights took 1.8 GB.
MAX_DENSE_ORDER = 1024


class HadamardBasis(NamedTuple):
    """Q = diag(signs) H: `analysis` flips random signs, then applies H^T."""

    signs: Int8[Array, " n"]

    def analysis(
        self, x: Float[Array, "*shape"], axis: int = -1
    ) -> Float[Array, "*shape"]:
        flipped = x * along(self.signs, x, axis)
        if order := fft_order(self.signs.shape[-1]):
            return _by_fft(flipped, axis, order, inverse=True)
        factors = [f.T for f in hadamard_factors(self.signs.shape[-1])]
        return multiply_kronecker_along(factors, flipped, axis)

    def synthesis(
        self, y: Float[Array, "*shape"], axis: int = -1
    ) -> Float[Array, "*shape"]:
        if order := fft_order(self.signs.shape[-1]):
            x = _by_fft(y, axis, order, inverse=False)
        else:
            factors = hadamard_factors(self.signs.shape[-1])
            x = multiply_kronecker_along(factors, y, axis)
        return x * along(self.signs, x, axis)


def fft_order(n: int) -> int:
    """Order of the DCT in the matrix of order `n` that is applied by the FFT, or 0."""
    power, odd = _split(n)
    return odd if odd > MAX_DENSE_ORDER and not _is_paley(power, odd) else 0


def _by_fft(
    x: Float[Array, "*shape"], axis: int, order: int, *, inverse: bool
) -> Float[Array, "*shape"]:
    """Applies DCT (x) Sylvester, or its inverse, along an axis."""
    n = x.shape[axis]
    before, _, after = fibres(x, n, axis).shape
    transform = jax.scipy.fft.idct if inverse else jax.scipy.fft.dct
    y = x.reshape(before, order, n // order, after)
    y = transform(y, axis=1, norm="ortho")
    # Sylvester's matrices are symmetric.
    y = multiply_kronecker_along(hadamard_factors(n // order), y, 2)
    return y.reshape(x.shape)


def make_hadamard(key: Key[Array, ""], n: int) -> HadamardBasis:
    """A randomised Hadamard basis of R^n."""
    return HadamardBasis(draw_signs(key, n))


@lru_cache(maxsize=64)
def hadamard_factors(n: int) -> tuple[np.ndarray, ...]:
    """Orthogonal factors whose Kronecker product is the matrix of order `n`."""
    power, odd = _split(n)
    factors = []
    if odd > 1:
        if _is_paley(power, odd):
            factors.append(paley_matrix(4 * odd) / math.sqrt(4 * odd))
            power -= 2
        else:
            factors.append(_dct_matrix(odd))
    count = -(-power // MAX_FACTOR_LOG2)
    for i in range(count):
        log2 = power // count + (i < power % count)
        factors.append(_sylvester_matrix(log2) / math.sqrt(2**log2))
    return tuple(factors) or (np.ones((1, 1)),)


def _split(n: int) -> tuple[int, int]:
    """P and the odd c of n = c * 2^p."""
    power = (n & -n).bit_length() - 1
    return power, n >> power


def _is_paley(power: int, odd: int) -> bool:
    return power >= 2 and is_prime(4 * odd - 1)


def paley_matrix(order: int) -> np.ndarray:
    """Paley's first construction: a Hadamard matrix of order q + 1, q = 3 mod 4 prime.

    Source: Paley, "On orthogonal matrices", J. Math. Phys. 12 (1933).
    """
    q = order - 1
    residues = np.zeros(q)
    residues[np.arange(1, q) ** 2 % q] = 1
    chi = np.where(np.arange(q) == 0, 0, 2 * residues - 1)
    jacobsthal = chi[(np.arange(q)[None, :] - np.arange(q)[:, None]) % q]
    skew = np.zeros((order, order))
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = jacobsthal
    return skew + np.eye(order)


def is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _sylvester_matrix(log2: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    for _ in range(log2):
        matrix = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix


def _dct_matrix(n: int) -> Float[np.ndarray, "n n"]:
    k, i = np.arange(n)[:, None], np.arange(n)[None, :]
    matrix = np.cos(np.pi * k * (2 * i + 1) / (2 * n)) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix
