"""Figures of results; matplotlib is imported only when one is drawn."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.common.perplexity_table import SeedMean, seed_means
from experiments.common.results import atomic_path
from experiments.common.tables import Record, fixed

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
    # The object interface with a canvas of its own leaves pyplot's global state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    means = seed_means(records)
    reference = [mean.perplexity for mean in means if mean.method == baseline][:1]
    groups = _grouped([mean for mean in means if mean.method != baseline])
    series = _split(groups, _FAR if logarithmic else _FAR_AT_WIDTH)
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
    with atomic_path(path) as temporary:
        figure.savefig(temporary, bbox_inches="tight", pad_inches=0.08)


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
