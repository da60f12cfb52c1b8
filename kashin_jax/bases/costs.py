"""What a basis costs: arithmetic per vector, and the bytes of its arrays."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax

from kashin_jax.bases.basis import SEED_IMPL
from kashin_jax.bases.butterfly import count_pairs
from kashin_jax.bases.families import REFLECTORS, make_basis
from kashin_jax.bases.givens import default_layers
from kashin_jax.bases.hadamard import fft_order, hadamard_factors

__all__ = ["Cost", "cost"]

# [[c, -s], [s, c]] applied to a pair: four multiplications, two additions.
_TURN = 6


class Cost(NamedTuple):
    """The arithmetic and memory of one `analysis` or `synthesis` of one vector.

    Attributes:
      flops: Real additions and multiplications, so a multiply-add is 2. Moving entries
        is free, and so is what depends on the basis alone (cosines, norms). An FFT of
        length n is 5 n log2(n) by convention, whatever n.
      parameter_bytes: Bytes of the arrays of the basis, as it is held in memory. In a
        quantized matrix they are derived from a seed of 8 bytes.
    """

    flops: int
    parameter_bytes: int


def cost(family: str, n: int) -> Cost:
    """The cost of a basis of R^n of the named family; nothing is computed.

    Raises:
      ValueError: If the family is unknown or `n < 1`.
    """
    leaves = jax.eval_shape(
        lambda: jax.tree.leaves(
            make_basis(family, jax.random.key(0, impl=SEED_IMPL), n)
        )
    )
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    return Cost(FLOPS[family](n), held)


def _dct(n: int) -> int:
    # Behind the FFT: the real part of a complex product, 3, and two scalings.
    return math.ceil(5 * n * math.log2(n)) + 5 * n


def _hadamard(n: int) -> int:
    order = fft_order(n)
    dense = n // order if order else n
    transforms = dense * _dct(order) if order else 0
    return n + transforms + sum(2 * f.shape[0] * n for f in hadamard_factors(dense))


def _householder(n: int, reflectors: int) -> int:
    # An inner product, then a multiple subtracted.
    return reflectors * 4 * n


FLOPS: Mapping[str, Callable[[int], int]] = MappingProxyType(
    {
        "identity": lambda n: 0,
        "dct": _dct,
        "sign-dct": lambda n: 2 * _dct(n) + n,
        "hadamard": _hadamard,
        "haar": lambda n: 2 * n * n,
        "householder": lambda n: _householder(n, 1),
        "householder8": lambda n: _householder(n, REFLECTORS),
        "givens": lambda n: default_layers(n) * (n // 2) * _TURN,
        "butterfly": lambda n: count_pairs(n) * _TURN,
        "butterfly3": lambda n: 3 * count_pairs(n) * _TURN,
    }
)
"""Arithmetic of one application by family."""
