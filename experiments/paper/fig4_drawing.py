"""Drawing of Figure 4: times on log-log axes, slopes in the labels."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.common.plots import COLOURS
from experiments.common.style import FAMILY_STYLES, finish_axes, new_figure
from experiments.common.tables import Record

__all__ = ["draw"]

_FORMS: Mapping[str, dict[str, Any]] = {
    "matrix": {"color": COLOURS[1], "marker": "s"},
    "vector": {"color": COLOURS[0], "marker": "o", "linestyle": (0, (4, 1.5))},
}
_PANELS = {
    "form": ("one greedy step, Haar", "entries of the matrix"),
    "step": ("one greedy step, n × n", "side of the matrix"),
    "analysis": ("one analysis", "length of the vector"),
}


def draw(records: Sequence[Record], slopes: Sequence[Record]) -> Any:
    """A panel per part; the legend of each has the slopes of its curves."""
    figure = new_figure(7.6, 5.6)
    panels = figure.subplots(1, len(_PANELS))
    for axes, (part, (title, size)) in zip(panels, _PANELS.items(), strict=True):
        own = [record for record in records if record["part"] == part]
        fits = {s["curve"]: s["slope"] for s in slopes if s["part"] == part}
        for curve in dict.fromkeys(record["curve"] for record in own):
            points = [(r["size"], r["seconds"]) for r in own if r["curve"] == curve]
            style = _FORMS.get(curve) or FAMILY_STYLES[curve]
            slope = f" {fits[curve]:.2f}" if curve in fits else ""
            axes.plot(*zip(*points, strict=True), label=f"{curve}{slope}", **style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        finish_axes(axes, x=size, y="seconds", title=title)
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.17), frameon=False, fontsize=7,
            handlelength=2.6, title="curve, log-log slope", title_fontsize=7,
        )  # fmt: skip
    return figure
