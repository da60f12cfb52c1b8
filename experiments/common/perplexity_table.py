"""Perplexity tables: means over seeds, and each rival beside joint coding.

Rows that differ in their seed alone are one. A rival's perplexity stands beside that of
joint coding at the rival's stored bits: between the widths of joint coding the
logarithm of perplexity is interpolated linearly in stored bits; beyond them nothing is
said.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from experiments.common.methods import FULL_PRECISION, JOINT
from experiments.common.tables import (
    Column,
    Record,
    aligned_table,
    fixed,
    increase,
    markdown_table,
    share,
)

__all__ = [
    "COMPARISON_TITLE",
    "SeedMean",
    "comparison_rows",
    "comparison_tables",
    "interpolated",
    "mean_columns",
    "mean_rows",
    "seed_means",
    "short_table",
]


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


COMPARISON_TITLE = "Joint coding at the stored bits of each rival"
_FIELD = "joint_perplexity"

_COLUMNS = (
    Column("method", "rival"),
    Column("bits", "bits"),
    Column("basis", "basis"),
    Column("stored_bits_per_weight", "bits/weight", fixed(3)),
    Column("perplexity", "perplexity"),
    Column("below_bits", f"{JOINT} at most", fixed(3)),
    Column("below_perplexity", "perplexity"),
    Column(_FIELD, "interpolated at the rival's", fixed(2)),
    Column("difference", "ours - rival", increase),
)


def interpolated(curve: Sequence[SeedMean], stored_bits: float) -> float | None:
    """Perplexity of a method at so many stored bits; None outside its rows."""
    points = sorted((p.stored_bits, p.perplexity) for p in curve)
    for bits, perplexity in points:
        if bits == stored_bits:
            return perplexity
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 < stored_bits < x1:
            share = (stored_bits - x0) / (x1 - x0)
            return math.exp((1 - share) * math.log(y0) + share * math.log(y1))
    return None


def _curve_for(rival: SeedMean, means: Sequence[SeedMean]) -> list[SeedMean]:
    """Joint coding with the rival's basis, or with the first one where it has none."""
    joint = [mean for mean in means if mean.method == JOINT]
    bases = [mean.basis for mean in joint]
    basis = rival.basis if rival.basis in bases else next(iter(bases), None)
    return [mean for mean in joint if mean.basis == basis]


def comparison_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One line per rival, method and width; none without joint coding.

    Shows the best row of joint coding that stores no more than the rival, and its
    perplexity interpolated at just what the rival stores. Rivals include joint coding
    with mixed widths, which so stands beside uniform widths.
    """
    means = seed_means(records)
    rows = []
    for rival in means:
        curve = _curve_for(rival, means)
        if rival.method in (JOINT, FULL_PRECISION) or not curve:
            continue
        ours = interpolated(curve, rival.stored_bits)
        below = [mean for mean in curve if mean.stored_bits <= rival.stored_bits]
        best = min(below, key=lambda mean: mean.perplexity, default=None)
        rows.append({
            "method": rival.method,
            "bits": rival.bits,
            "basis": rival.basis,
            "stored_bits_per_weight": rival.stored_bits,
            "perplexity": rival.text,
            "below_bits": best and best.stored_bits,
            "below_perplexity": best and best.text,
            _FIELD: ours,
            "difference": None if ours is None else ours - rival.perplexity,
        })  # fmt: skip
    return rows


def comparison_tables(records: Sequence[Record]) -> tuple[str, str]:
    """`comparison_rows` for the terminal and for Markdown; empty if there are none."""
    rows = comparison_rows(records)
    if not rows:
        return "", ""
    has_bases = len({row["basis"] for row in rows} - {None}) > 1
    columns = [one for one in _COLUMNS if one.key != "basis" or has_bases]
    return aligned_table(rows, columns), markdown_table(rows, columns)
