"""Rows of a perplexity table that differ in their seed alone, as one."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from experiments.common.methods import FULL_PRECISION
from experiments.common.tables import Column, Record, fixed, increase, share

__all__ = ["SeedMean", "mean_columns", "mean_rows", "seed_means", "short_table"]


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
    return [_seed_mean(group) for group in _groups(records)]


def _groups(records: Iterable[Record]) -> list[list[Record]]:
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if record.get("perplexity") is not None:
            stored = record["stored_bits_per_weight"]
            key = record["method"], record.get("bits", stored), record.get("basis")
            groups.setdefault(key, []).append(record)
    return list(groups.values())


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


_MEANS = (
    "stored_bits_per_weight", "model_bits_per_weight", "increase", "relative_error",
    "converged_share",
)  # fmt: skip


def mean_rows(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Rows of a table, one for those that differ in their seed alone.

    Perplexity is a text with its standard deviation; rows without one are left out.
    """
    return [
        {
            **{name: group[0].get(name) for name in ("method", "bits", "basis")},
            "seeds": len(group) if group[0].get("seed") is not None else None,
            "perplexity": _seed_mean(group).text,
            **{name: _mean(group, name) for name in _MEANS},
            "note": group[0].get("note"),
        }
        for group in _groups(records)
    ]


def _mean(group: Sequence[Record], name: str) -> float | None:
    values = [record[name] for record in group if record.get(name) is not None]
    return statistics.fmean(values) if values else None


def mean_columns(rows: Sequence[Record]) -> tuple[Column, ...]:
    """The columns of `mean_rows`; bases are one only where there are several."""
    several = len({row["basis"] for row in rows} - {None}) > 1
    return (
        Column("method", "method"),
        Column("bits", "bits"),
        *((Column("basis", "basis"),) if several else ()),
        Column("stored_bits_per_weight", "bits/weight", fixed(3)),
        Column("model_bits_per_weight", "whole model", fixed(3)),
        Column("seeds", "seeds"),
        Column("perplexity", "perplexity"),
        Column("increase", "increase", increase),
        Column("relative_error", "rel. sq. error", fixed(5)),
        Column("converged_share", "converged", share),
    )


def short_table(
    records: Iterable[Record], methods: Sequence[str], widths: Sequence[int]
) -> tuple[list[dict[str, Any]], list[Column]]:
    """A row per method, and for each width what it stores and its perplexity.

    Args:
      records: Of one basis.
      methods: In the order of the rows; full precision is the same at every width.
      widths: In the order of the columns.

    Returns:
      Rows and columns.
    """
    means = {(mean.method, mean.bits): mean for mean in seed_means(records)}
    columns, rows = [Column("method", "method")], []
    for width in widths:
        columns.append(Column(f"stored_{width}", f"{width} bits: stored", fixed(2)))
        columns.append(Column(f"perplexity_{width}", "perplexity"))
    for method in methods:
        row: dict[str, Any] = {"method": method}
        for width in widths:
            bits = 16 if method == FULL_PRECISION else width
            if mean := means.get((method, bits)):
                row |= {f"stored_{width}": mean.stored_bits}
                row |= {f"perplexity_{width}": mean.text}
        rows.append(row)
    return rows, columns
