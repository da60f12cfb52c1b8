"""The orthonormal DCT-II, plain and with random signs.

Both run in O(n log n) through the FFT, for any n.
"""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int8, Key

from kashin_jax.bases.axes import along
from kashin_jax.bases.basis import draw_signs

__all__ = ["DCTBasis", "SignDCTBasis", "make_dct", "make_sign_dct"]


class DCTBasis(NamedTuple):
    """Columns of Q are the orthonormal DCT-II vectors; deterministic.

    `analysis` is the DCT and `synthesis` its inverse. The 2024 paper's code has the
    two exchanged, which is the transposed basis.
    """

    def analysis(
        self, x: Float[Array, "*shape"], axis: int = -1
    ) -> Float[Array, "*shape"]:
        return jax.scipy.fft.dct(x, axis=axis, norm="ortho")

    def synthesis(
        self, y: Float[Array, "*shape"], axis: int = -1
    ) -> Float[Array, "*shape"]:
        return jax.scipy.fft.idct(y, axis=axis, norm="ortho")


class SignDCTBasis(NamedTuple):
    """Q = F^-1 diag(signs) F with F the orthonormal DCT-II; Q = Q^T = Q^-1.

    The accelerated form of Kashin's theorem: Kashin, Oseledets, Rudikov (2025), as
    used in Cherniuk et al. (2026), arXiv 2609.11687.
    """

    signs: Int8[Array, " n"]

    def analysis(
        self, x: Float[Array, "*shape"], axis: int = -1
    ) -> Float[Array, "*shape"]:
        spectrum = jax.scipy.fft.dct(x, axis=axis, norm="ortho")
        flipped = spectrum * along(self.signs, spectrum, axis)
        return jax.scipy.fft.idct(flipped, axis=axis, norm="ortho")

    def synthesis(
        self, y: Float[Array, "*shape"], axis: int = -1
    ) -> Float[Array, "*shape"]:
        return self.analysis(y, axis)


def make_dct(key: Key[Array, ""], n: int) -> DCTBasis:
    """The DCT-II basis; `key` and `n` are not used."""
    return DCTBasis()


def make_sign_dct(key: Key[Array, ""], n: int) -> SignDCTBasis:
    """A sign-randomised DCT basis of R^n."""
    return SignDCTBasis(draw_signs(key, n))
