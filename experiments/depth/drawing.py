"""The figure of the depth study, for its own program and for the paper's."""

from collections.abc import Sequence
from typing import Any

from experiments.common.plots import COLOURS
from experiments.common.style import finish_axes, new_figure
from experiments.common.tables import Record
from experiments.depth.points import STEPS
from experiments.depth_curves import AXES, METRICS, Curve, CurvePoint, curves, reference

__all__ = ["draw"]

_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h")
# Marks of several widths at one depth stand side by side, so many points apart.
_SHIFT = 2.2
# Curves coincide where a few steps leave fewer pairs than any codebook has: markers of
# wider codes are smaller and lie on top, so all of them are seen.
_LARGEST = 8.0
# Panels whose greatest value is so many times their least are logarithmic.
_LOG_FROM = 1.5


def draw(records: Sequence[Record], title: str) -> Any:
    """A row per metric, a column per limit, a curve per width; full precision dashed.

    The ring on a curve, with a line down from it, marks where more depth stops helping.

    Args:
      records: Of `experiments.depth`.
      title: Above the figure.
    """
    all_curves = curves(records)
    metrics = [m for m in METRICS if any(c.metric == m for c in all_curves)]
    axes_names = [a for a in AXES if any(c.axis == a for c in all_curves)]
    widths = sorted({curve.bits for curve in all_curves})
    figure = new_figure(max(5.2, 0.4 + 3.6 * len(axes_names)), 0.9 + 2.3 * len(metrics))
    panels = figure.subplots(
        len(metrics), len(axes_names), squeeze=False, sharex="col", sharey="row"
    )
    for row, metric in zip(panels, metrics, strict=True):
        for panel, axis in zip(row, axes_names, strict=True):
            own = [c for c in all_curves if (c.metric, c.axis) == (metric, axis)]
            _draw_panel(panel, own, widths, reference(records, metric))
            is_last, is_first = metric == metrics[-1], axis == axes_names[0]
            finish_axes(
                panel,
                x=AXES[axis].title if is_last else "",
                y=METRICS[metric].title if is_first else "",
            )
    for panel, axis in zip(panels[0], axes_names, strict=True):
        panel.set_title(_heading(records, axis), loc="left", fontsize=8)
        _scale_x(panel, axis)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    _legend(figure, panels.flat)
    return figure


def _heading(records: Sequence[Record], axis: str) -> str:
    """What the other limit is fixed at."""
    (other,) = set(AXES) - {axis}
    fixed_at = {r[AXES[other].field] for r in records if r["axis"] == axis}
    values = ", ".join(map(AXES[other].show, sorted(fixed_at)))
    return f"tolerance {values}" if axis == STEPS else f"at most {values} steps"


def _draw_panel(
    panel: Any, own: Sequence[Curve], widths: Sequence[int], full: float | None
) -> None:
    if full is not None:
        panel.axhline(
            full, color="#404040", lw=0.9, ls=(0, (5, 3)), label="full precision",
            zorder=1,
        )  # fmt: skip
    if own:
        _scale_y(panel, own)
    for curve in own:
        index = widths.index(curve.bits)
        colour = COLOURS[index % len(COLOURS)]
        xs, ys, spreads = zip(*curve.points, strict=True)
        panel.errorbar(
            xs, ys, spreads if any(spreads) else None, color=colour, lw=1.2,
            marker=_MARKERS[index % len(_MARKERS)], capsize=2,
            markersize=max(3.5, _LARGEST - 1.4 * index),
            markeredgecolor="white", markeredgewidth=0.5, elinewidth=0.9,
            label=f"{curve.bits} bits",
        )  # fmt: skip
        if curve.enough is not None:
            _mark(panel, curve.enough, colour, index - (len(widths) - 1) / 2)


def _mark(panel: Any, point: CurvePoint, colour: str, place: float) -> None:
    from matplotlib.transforms import offset_copy

    panel.plot(
        [point.x], [point.mean], marker="o", markersize=12, markerfacecolor="none",
        markeredgecolor=colour, markeredgewidth=1.3, lw=0, zorder=4,
    )  # fmt: skip
    shifted = {"fig": panel.figure, "x": place * _SHIFT, "units": "points"}
    panel.annotate(
        "", (point.x, 0), (point.x, point.mean),
        xycoords=offset_copy(panel.get_xaxis_transform(), **shifted),
        textcoords=offset_copy(panel.transData, **shifted),
        arrowprops={"arrowstyle": "-", "color": colour, "lw": 1.2, "ls": ":"},
    )  # fmt: skip


def _scale_y(panel: Any, own: Sequence[Curve]) -> None:
    """Logarithmic for losses of several magnitudes, never for scores."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    means = [point.mean for curve in own for point in curve.points]
    is_score = any(METRICS[curve.metric].is_score for curve in own)
    if is_score or min(means) <= 0 or max(means) < _LOG_FROM * min(means):
        return
    panel.set_yscale("log")
    panel.margins(y=0.08)
    panel.yaxis.set_minor_formatter(NullFormatter())
    if min(means) > 1:
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _scale_x(panel: Any, axis: str) -> None:
    """Logarithmic, with depth growing to the right; holds for the whole column."""
    from matplotlib.ticker import FixedLocator, NullFormatter, ScalarFormatter

    panel.set_xscale("log")
    if AXES[axis].falls:
        panel.invert_xaxis()
    else:
        ticks = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 100, 200, 500, 1000]
        panel.xaxis.set_major_locator(FixedLocator(ticks))
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.xaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Any, panels: Any) -> None:
    from matplotlib.lines import Line2D

    entries: dict[str, Any] = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    ring = Line2D(
        [], [], marker="o", markersize=12, markerfacecolor="none", lw=0,
        markeredgecolor="#404040",
    )  # fmt: skip
    entries["enough: as good as the best, shallower"] = ring
    figure.legend(
        list(entries.values()), list(entries), ncols=3, frameon=False, fontsize=8,
        loc="outside lower center",
    )  # fmt: skip
