"""Rows of a perplexity table that differ in their seed alone, as one."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from experiments.tables import Record, fixed

__all__ = ["SeedMean", "seed_means"]


class SeedMean(NamedTuple):
    """What the seeds of one row have in common, and how far they are apart.

    Attributes:
      method: Name.
      bits: Width or budget.
      basis: Its name; None where it does not matter.
      stored_bits: Per weight; mean.
      perplexity: Mean.
      spread: Standard deviation of perplexity; 0 for one seed.
    """

    method: str
    bits: float
    basis: str | None
    stored_bits: float
    perplexity: float
    spread: float

    @property
    def text(self) -> str:
        """Perplexity, and its spread where there are several seeds."""
        spread = f" ± {self.spread:.2f}" if self.spread else ""
        return fixed(2)(self.perplexity) + spread


def seed_means(records: Iterable[Record]) -> list[SeedMean]:
    """Rows that differ in nothing but their seed as one, in order of appearance.

    Rows without perplexity are left out.
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if record.get("perplexity") is not None:
            stored = record["stored_bits_per_weight"]
            key = record["method"], record.get("bits", stored), record.get("basis")
            groups.setdefault(key, []).append(record)
    return [_seed_mean(group) for group in groups.values()]


def _seed_mean(group: Sequence[Record]) -> SeedMean:
    first = group[0]
    mean, spread = _mean_and_spread([r["perplexity"] for r in group])
    return SeedMean(
        method=first["method"],
        bits=first.get("bits", first["stored_bits_per_weight"]),
        basis=first.get("basis"),
        stored_bits=statistics.fmean(r["stored_bits_per_weight"] for r in group),
        perplexity=mean,
        spread=spread,
    )


def _mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    if not all(map(math.isfinite, values)):
        return sum(values), 0.0
    return statistics.fmean(values), statistics.stdev(values) if values[1:] else 0.0
