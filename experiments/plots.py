"""Figures of results; matplotlib is imported only when one is drawn."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.results import atomic_path
from experiments.tables import Record, fixed

__all__ = ["COLOURS", "plot_perplexity"]

# The colours of Okabe and Ito, told apart by all common kinds of colour vision. Markers
# differ as well, so the figure survives a black-and-white printer.
COLOURS = (
    "#D55E00", "#0072B2", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#000000",
    "#7F7F7F",
)  # fmt: skip
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h", "<", ">", "d")
# Beyond these a model tells nothing of the others and flattens the figure: so many
# times the best one of about the same width, or the best one of all.
_FAR_AT_WIDTH = 2.0
_FAR = 8.0
_LOG_FROM = 1.6
_LINE_INCHES = 0.17


class _Point(NamedTuple):
    bits: float
    perplexity: float


class _Series(NamedTuple):
    label: str
    style: dict[str, Any]
    near: list[_Point]
    far: list[_Point]


def plot_perplexity(
    records: Sequence[Record],
    path: Path,
    *,
    baseline: str = "full precision",
    title: str = "",
) -> None:
    """Draws perplexity against the bits that a quantized weight really takes.

    One marker per method (per basis, where a method comes with several), full precision
    as a dashed line. Rows without a perplexity are left out. Models that are off the
    scale, or not finite, stand in a strip above the axes, each with its value.

    Args:
      records: With `method`, `perplexity`, `stored_bits_per_weight`, perhaps `basis`.
      path: A PNG file, replaced in one step.
      baseline: The method drawn as a line.
      title: Above the figure.
    """
    # The object interface with a canvas of its own leaves pyplot's global state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [record for record in records if record.get("perplexity") is not None]
    reference = [r["perplexity"] for r in shown if r["method"] == baseline][:1]
    series = _split(_grouped([r for r in shown if r["method"] != baseline]))
    off_scale = [one for one in series if one.far]
    heights = [_LINE_INCHES * (len(off_scale) + 2 if off_scale else 0.1), 3.8]
    figure = Figure(figsize=(7.6, 0.4 + sum(heights)), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    strip, axes = figure.subplots(2, sharex=True, height_ratios=heights)
    _draw_strip(strip, off_scale)
    for value in filter(math.isfinite, reference):
        label = f"{baseline} ({fixed(2)(value)})"
        axes.axhline(value, color="#404040", lw=1, ls=(0, (5, 3)), label=label)
    for one in series:
        # Without a near point the series still has its entry in the legend.
        axes.plot(*_coordinates(one.near), label=one.label, **one.style)
    _scale(axes, [*reference, *(p.perplexity for one in series for p in one.near)])
    _decorate(axes)
    strip.set_title(title, loc="left", fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, bbox_inches="tight", pad_inches=0.08)


def _grouped(records: Iterable[Record]) -> dict[str, list[Record]]:
    records = list(records)
    groups: dict[str, list[Record]] = {}
    for record in records:
        method, basis = record["method"], record.get("basis")
        bases = {r.get("basis") for r in records if r["method"] == method}
        label = f"{method}, {basis}" if len(bases) > 1 else method
        groups.setdefault(label, []).append(record)
    return groups


def _split(groups: dict[str, list[Record]]) -> list[_Series]:
    points = {
        label: sorted(
            _Point(r["stored_bits_per_weight"], r["perplexity"]) for r in rows
        )
        for label, rows in groups.items()
    }
    everything = [p for rows in points.values() for p in rows]
    series = []
    for index, (label, rows) in enumerate(points.items()):
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
        near = [p for p in rows if _is_near(p, everything)]
        far = [p for p in rows if not _is_near(p, everything)]
        series.append(_Series(textwrap.fill(label, 30), style, near, far))
    return series


def _is_near(point: _Point, everything: Sequence[_Point]) -> bool:
    finite = [p for p in everything if math.isfinite(p.perplexity)]
    same_width = [p for p in finite if abs(p.bits - point.bits) < 0.5]
    if not math.isfinite(point.perplexity):
        return False
    best, best_at_width = (min(p.perplexity for p in ps) for ps in (finite, same_width))
    return point.perplexity <= min(_FAR * best, _FAR_AT_WIDTH * best_at_width)


def _coordinates(points: Sequence[_Point]) -> tuple[list[float], list[float]]:
    return [p.bits for p in points], [p.perplexity for p in points]


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
        strip.plot([p.bits for p in one.far], [row] * len(one.far), **style)
        for point in one.far:
            strip.annotate(
                f"↑ {point.perplexity:.4g}", (point.bits, row), va="center",
                xytext=(5, 0), textcoords="offset points", fontsize=7,
                color=one.style["color"],
            )  # fmt: skip


def _scale(axes: Any, perplexities: Sequence[float]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    finite = [p for p in perplexities if math.isfinite(p)]
    if finite and max(finite) > _LOG_FROM * min(finite):
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
