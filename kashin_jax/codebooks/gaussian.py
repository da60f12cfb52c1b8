"""Lloyd-Max levels of the unit Gaussian, where searches for codes begin."""

import math
from functools import lru_cache

__all__ = ["lloyd_max_levels"]

_STEPS = 2000


@lru_cache
def lloyd_max_levels(count: int) -> tuple[float, ...]:
    """The scalar quantizer of least mean squared error for a unit Gaussian.

    Lloyd's algorithm with the exact means of truncated Gaussians.

    Args:
      count: Number of levels.

    Returns:
      The levels, ascending.

    Source: Max, "Quantizing for minimum distortion" (1960).
    """
    levels = [2.0 * (i + 0.5) / count - 1.0 for i in range(count)]
    for _ in range(_STEPS):
        inner = [(a + b) / 2 for a, b in zip(levels, levels[1:], strict=False)]
        edges = [-math.inf, *inner, math.inf]
        levels = [_mean(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    return tuple(levels)


def _mean(low: float, high: float) -> float:
    mass = (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))) / 2
    return (_density(low) - _density(high)) / mass


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)
