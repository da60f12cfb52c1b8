"""Where the decomposition is stopped: by a number of steps, or by a tolerance."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from experiments.common.methods import METHODS
from kashin_jax import BasisSpec
from kashin_jax.methods import Method

__all__ = ["METHOD", "RTOL", "STEPS", "Point", "grid"]

METHOD = "kashin"
"""The paper's method: decompose, then cluster the pairs."""

STEPS = "steps"
RTOL = "rtol"


class Point(NamedTuple):
    """One setting of the method.

    Attributes:
      axis: `STEPS` or `RTOL`: which of the two limits is varied.
      bits: Code width.
      max_steps: Greedy steps allowed.
      rtol: Relative residual at which the decomposition stops earlier.
      basis: Pair of families.
      seed: Of bases and codebooks.
    """

    axis: str
    bits: int
    max_steps: int
    rtol: float
    basis: BasisSpec
    seed: int

    @property
    def x(self) -> float:
        """The limit that is varied."""
        return self.max_steps if self.axis == STEPS else self.rtol

    @property
    def config(self) -> Method:
        """The configuration of every layer."""
        make = METHODS[METHOD].make
        return make(self.bits, self.basis, self.rtol, self.max_steps)

    @property
    def label(self) -> str:
        """For progress bars."""
        limit = f"{self.axis} {self.x:g}"
        return f"{self.bits} bits, {limit}, seed {self.seed}"


def grid(
    bits: Sequence[int],
    steps: Sequence[int],
    rtols: Sequence[float],
    seeds: Sequence[int],
    *,
    basis: BasisSpec,
    rtol: float,
    max_steps: int,
) -> Iterator[Point]:
    """All settings; the widths of one limit follow each other, they compile once.

    Args:
      bits: Code widths.
      steps: Numbers of steps, each at the tolerance `rtol`.
      rtols: Tolerances, each with `max_steps` steps at the most.
      seeds: Of bases and codebooks.
      basis: Pair of families.
      rtol: Tolerance of the first axis.
      max_steps: Limit of the second.
    """
    limits = [(STEPS, count, rtol) for count in steps]
    limits += [(RTOL, max_steps, tolerance) for tolerance in rtols]
    for seed, (axis, count, tolerance), width in itertools.product(seeds, limits, bits):
        yield Point(axis, width, count, tolerance, basis, seed)
