"""Weight error against stored bits; matplotlib is imported only when it is drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.plots import COLOURS
from experiments.common.results import atomic_path
from experiments.common.tables import Record

__all__ = ["plot_rate_distortion"]

_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h", "<", ">", "d")
# Bits by which the Shannon line goes on beyond the points.
_BEYOND = 0.15


def plot_rate_distortion(records: Sequence[Record], path: Path, *, title: str) -> None:
    """Draws relative error, on a log axis, against stored bits; Shannon as a line.

    Args:
      records: As in the JSON lines; rows of dashes are left out.
      path: A PNG file, replaced in one step.
      title: Above the figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 4.4), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    shown = [r for r in records if r["relative_error"]]
    rates = [r["stored_bits_per_weight"] for r in shown]
    if rates:
        span = np.array([min(rates) - _BEYOND, max(rates) + _BEYOND])
        axes.plot(span, 4.0**-span, color="#404040", lw=1, ls=(0, (5, 3)),
                  label="Shannon, Gaussian source")  # fmt: skip
        _draw_methods(axes, shown)
        axes.legend(
            loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, fontsize=8
        )
    axes.set_yscale("log")
    axes.set_xlabel("stored bits per weight")
    axes.set_ylabel("relative squared error")
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, bbox_inches="tight", pad_inches=0.08)


def _draw_methods(axes: Any, records: Sequence[Record]) -> None:
    efforts = {r["effort"] for r in records if r["effort"]}
    series: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        label = record["method"]
        if record["effort"] and len(efforts) > 1:
            label = f"{label}, {record['effort']}"
        point = record["stored_bits_per_weight"], record["relative_error"]
        series.setdefault(label, []).append(point)
    for index, (label, points) in enumerate(series.items()):
        axes.plot(
            *zip(*sorted(points), strict=True), label=label, lw=1, markersize=6,
            color=COLOURS[index % len(COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            markeredgecolor="white", markeredgewidth=0.7,
        )  # fmt: skip
