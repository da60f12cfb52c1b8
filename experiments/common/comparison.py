"""Each rival's perplexity beside that of joint coding at the rival's stored bits.

Between the widths of joint coding the logarithm of perplexity is interpolated linearly
in stored bits; beyond them nothing is said.
"""

import math
from collections.abc import Sequence
from typing import Any

from experiments.common.methods import FULL_PRECISION, JOINT
from experiments.common.seed_means import SeedMean, seed_means
from experiments.common.tables import (
    Column,
    Record,
    aligned_table,
    fixed,
    increase,
    markdown_table,
)

__all__ = [
    "COMPARISON_TITLE",
    "comparison_rows",
    "comparison_tables",
    "interpolated",
]

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
