"""Perplexity tables and their picture: means over seeds, rivals beside joint coding.

Rows that differ in their seed alone are one. A rival's perplexity stands beside that of
joint coding at the rival's stored bits: between the widths of joint coding the
logarithm of perplexity is interpolated linearly in stored bits; beyond them nothing is
said.
"""

import math
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.common.methods import FULL_PRECISION, JOINT
from experiments.common.plots import COLOURS, new_figure, save_picture
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
    "plot_perplexity",
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
            key = (
                record["method"], record.get("bits", stored), record.get("basis"),
                record.get("calibration"), record.get("calibration_tokens"),
            )  # fmt: skip
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
    "converged_share", "output_error", "data_free_output_error",
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


_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h", "<", ">", "d")
# Beyond these a model tells nothing of the others and flattens the figure: so many
# times the best one of about the same width, or the best one of all.
_FAR_AT_WIDTH = 2.0
_FAR = 8.0
_LOG_FROM = 1.6
_LINE_INCHES = 0.17


class _Series(NamedTuple):
    label: str
    style: dict[str, Any]
    near: list[SeedMean]
    far: list[SeedMean]


def plot_perplexity(
    records: Sequence[Record],
    path: Path,
    *,
    baseline: str = "full precision",
    title: str = "",
    logarithmic: bool = False,
) -> None:
    """Draws perplexity against the bits that a quantized weight really takes.

    One curve per method (per basis, where a method comes with several) through the
    means over seeds, with a bar of a standard deviation to both sides where there are
    several; full precision as a dashed line. Rows without a perplexity are left out.
    Models that are off the scale, or not finite, stand in a strip above the axes, each
    with its value.

    Args:
      records: With `method`, `perplexity`, `stored_bits_per_weight`, perhaps `bits`
        and `basis`.
      path: A PNG file, replaced in one step.
      baseline: The method drawn as a line.
      title: Above the figure.
      logarithmic: Takes a logarithmic axis, which has room for more of the models.
    """
    means = seed_means(records)
    reference = [mean.perplexity for mean in means if mean.method == baseline][:1]
    groups = _grouped([mean for mean in means if mean.method != baseline])
    series = _split(groups, _FAR if logarithmic else _FAR_AT_WIDTH)
    off_scale = [one for one in series if one.far]
    heights = [_LINE_INCHES * (len(off_scale) + 2 if off_scale else 0.1), 3.8]
    figure = new_figure(7.6, 0.4 + sum(heights))
    strip, axes = figure.subplots(2, sharex=True, height_ratios=heights)
    _draw_strip(strip, off_scale)
    for value in filter(math.isfinite, reference):
        label = f"{baseline} ({fixed(2)(value)})"
        axes.axhline(value, color="#404040", lw=1, ls=(0, (5, 3)), label=label)
    for one in series:
        # Without a near point the series still has its entry in the legend.
        axes.errorbar(
            [mean.stored_bits for mean in one.near],
            [mean.perplexity for mean in one.near],
            [mean.spread for mean in one.near],
            label=one.label, elinewidth=1, capsize=2, **one.style,
        )  # fmt: skip
    shown = [*reference, *(p.perplexity for one in series for p in one.near)]
    _scale(axes, shown, 1.0 if logarithmic else _LOG_FROM)
    _decorate(axes)
    strip.set_title(title, loc="left", fontsize=10)
    save_picture(figure, path)


def _grouped(means: Sequence[SeedMean]) -> dict[str, list[SeedMean]]:
    groups: dict[str, list[SeedMean]] = {}
    for mean in means:
        bases = {other.basis for other in means if other.method == mean.method}
        label = f"{mean.method}, {mean.basis}" if len(bases) > 1 else mean.method
        groups.setdefault(label, []).append(mean)
    return {
        label: sorted(group, key=lambda mean: mean.stored_bits)
        for label, group in groups.items()
    }


def _split(groups: dict[str, list[SeedMean]], far_at_width: float) -> list[_Series]:
    everything = [mean for rows in groups.values() for mean in rows]
    series = []
    for index, (label, rows) in enumerate(groups.items()):
        style = {
            "color": COLOURS[index % len(COLOURS)],
            "marker": _MARKERS[index % len(_MARKERS)],
            "markersize": 7,
            "markeredgecolor": "white",
            "markeredgewidth": 0.7,
            "linewidth": 1 if len(rows) > 1 else 0,
            # Earlier methods lie on top of later ones.
            "zorder": 3 + 1 / (1 + index),
        }
        near = [p for p in rows if _is_near(p, everything, far_at_width)]
        far = [p for p in rows if p not in near]
        series.append(_Series(textwrap.fill(label, 30), style, near, far))
    return series


def _is_near(
    point: SeedMean, everything: Sequence[SeedMean], far_at_width: float
) -> bool:
    finite = [p for p in everything if math.isfinite(p.perplexity)]
    same_width = [p for p in finite if abs(p.stored_bits - point.stored_bits) < 0.5]
    if not math.isfinite(point.perplexity):
        return False
    best, best_at_width = (min(p.perplexity for p in ps) for ps in (finite, same_width))
    return point.perplexity <= min(_FAR * best, far_at_width * best_at_width)


def _draw_strip(strip: Any, series: Sequence[_Series]) -> None:
    """One line of the strip for each method that has points off the scale."""
    strip.axis("off")
    strip.set_ylim(len(series), -1.5)
    if series:
        heading = {"fontsize": 7, "color": "#606060", "va": "center"}
        strip.text(
            0, -1, "off the scale", transform=strip.get_yaxis_transform(), **heading
        )
    for row, one in enumerate(series):
        style = one.style | {"linewidth": 0, "markersize": 5}
        strip.plot([p.stored_bits for p in one.far], [row] * len(one.far), **style)
        for point in one.far:
            strip.annotate(
                f"↑ {point.perplexity:.4g}", (point.stored_bits, row), va="center",
                xytext=(5, 0), textcoords="offset points", fontsize=7,
                color=one.style["color"],
            )  # fmt: skip


def _scale(axes: Any, perplexities: Sequence[float], log_from: float) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    finite = [p for p in perplexities if math.isfinite(p)]
    if finite and max(finite) > log_from * min(finite):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(ScalarFormatter())


def _decorate(axes: Any) -> None:
    axes.set_xlabel("stored bits per quantized weight")
    axes.set_ylabel("perplexity per token")
    axes.grid(color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.06, y=0.08)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=8,
            labelspacing=0.7,
        )  # fmt: skip
