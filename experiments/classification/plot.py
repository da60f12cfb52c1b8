"""The GLUE table as bars; matplotlib is imported only when one is drawn."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.classification.tasks import Task
from experiments.common.methods import FULL_PRECISION
from experiments.common.plots import COLOURS, new_figure, save_picture
from experiments.common.tables import Record

__all__ = ["plot_glue", "plot_refinement"]

_HATCHES = ("", "//", "..", "xx", "\\\\", "--", "++", "oo")


def plot_glue(
    records: Sequence[Record], tasks: Sequence[Task], path: Path, *, title: str
) -> None:
    """Draws a group of bars per metric, a panel per width, full precision as a line.

    Bars are means over seeds, whiskers go from the least to the greatest.

    Args:
      records: As in the JSON lines.
      tasks: In the order of the groups.
      path: A PNG file, replaced in one step.
      title: Above the figure.
    """
    groups = [(task, metric) for task in tasks for metric in task.metrics]
    quantized = [r for r in records if r["method"] != FULL_PRECISION]
    widths = sorted({r["bits"] for r in quantized}) or [0]
    series = _series([r for r in quantized if r["value"] is not None])
    size = (max(6.5, 1.25 * len(groups) + 2.6), 0.5 + 2.3 * len(widths))
    figure = new_figure(*size)
    panels = figure.subplots(len(widths), squeeze=False, sharex=True)[:, 0]
    for panel, width in zip(panels, widths, strict=True):
        _draw(panel, width, series, groups)
        _draw_reference(panel, records, groups)
        panel.set_ylabel(f"{width} bits\n" * bool(width) + "metric, percent")
        _decorate(panel)
    labels = [f"{task.title}\n{m.capitalize()}" for task, m in groups]
    panels[-1].set_xticks(range(len(groups)), labels, fontsize=8)
    panels[0].set_title(title, loc="left", fontsize=10)
    panels[0].legend(
        loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=8
    )
    save_picture(figure, path)


def _series(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The bars' records by label; bases are told apart where a method has several."""
    groups: dict[tuple[str, str | None], list[Record]] = {}
    for record in records:
        groups.setdefault((record["method"], record["basis"]), []).append(record)
    methods = [method for method, _ in groups]
    return {
        method if methods.count(method) == 1 else f"{method}, {basis}": rows
        for (method, basis), rows in groups.items()
    }


def _values(rows: Sequence[Record], task: Task, metric: str) -> list[float]:
    return [
        r["value"]
        for r in rows
        if (r["task"], r["metric"]) == (task.name, metric) and r["value"] is not None
    ]


def _draw(
    panel: Any,
    width: int,
    series: Mapping[str, Sequence[Record]],
    groups: Sequence[tuple[Task, str]],
) -> None:
    bar = 0.8 / max(len(series), 1)
    for index, (label, rows) in enumerate(series.items()):
        own = [r for r in rows if r["bits"] == width]
        places, heights, spans = [], [], []
        for place, (task, metric) in enumerate(groups):
            if values := _values(own, task, metric):
                mean = statistics.fmean(values)
                places.append(place - 0.4 + bar * (index + 0.5))
                heights.append(mean)
                spans.append((mean - min(values), max(values) - mean))
        # A method without a value at this width still has its entry in the legend.
        panel.bar(
            places or [0.0], heights or [0.0], bar * 0.92, label=label,
            color=COLOURS[index % len(COLOURS)],
            hatch=_HATCHES[index % len(_HATCHES)], edgecolor="white", linewidth=0.3,
            yerr=list(zip(*spans, strict=True)) if any(map(any, spans)) else None,
            error_kw={"elinewidth": 0.8, "capsize": 1.5},
        )  # fmt: skip


def _draw_reference(
    panel: Any, records: Sequence[Record], groups: Sequence[tuple[Task, str]]
) -> None:
    full = [r for r in records if r["method"] == FULL_PRECISION]
    label: str | None = FULL_PRECISION
    for place, (task, metric) in enumerate(groups):
        for value in _values(full, task, metric)[:1]:
            panel.hlines(
                value, place - 0.45, place + 0.45, color="#202020", lw=1.1,
                ls=(0, (4, 2)), label=label,
            )  # fmt: skip
            label = None


def _decorate(panel: Any) -> None:
    panel.grid(axis="y", color="#E5E5E5", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.axhline(0, color="#808080", lw=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def plot_refinement(
    records: Sequence[Record], task: Task, path: Path, *, title: str
) -> None:
    """Draws a line from before to after for every row, a panel per metric.

    Args:
      records: With `method`, `stored_bits_per_weight`, and `before_` and `after_` of
        each metric; full precision is a line.
      task: What was scored.
      path: A PNG file, replaced in one step.
      title: Above the figure.
    """
    width = 3.4 * len(task.metrics) + 1.8
    figure = new_figure(width, 3.2)
    panels = figure.subplots(1, len(task.metrics), squeeze=False)[0]
    for panel, metric in zip(panels, task.metrics, strict=True):
        _draw_refinement(panel, records, metric)
        _decorate(panel)
    panels[-1].legend(
        loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=8
    )
    figure.suptitle(title, fontsize=10)
    save_picture(figure, path)


def _draw_refinement(panel: Any, records: Sequence[Record], metric: str) -> None:
    rows = [r for r in records if r["method"] != FULL_PRECISION]
    methods = list(dict.fromkeys(r["method"] for r in rows))
    for index, method in enumerate(methods):
        own = [r for r in rows if r["method"] == method]
        # Aside of each other, since rows of one width have nearly the same bits.
        shift = 0.12 * (index - (len(methods) - 1) / 2)
        bits = [r["bits"] + shift for r in own]
        before, after = (
            [r[f"{when}_{metric}"] for r in own] for when in ("before", "after")
        )
        style = {"color": COLOURS[index % len(COLOURS)]}
        panel.vlines(bits, before, after, lw=1.2, **style)
        panel.plot(bits, before, "o", mfc="white", ms=6, **style)
        panel.plot(bits, after, "o", ms=6, label=method, **style)
    for record in records:
        if record["method"] == FULL_PRECISION:
            panel.axhline(
                record[f"before_{metric}"], color="#202020", lw=1, ls=(0, (4, 2)),
                label=FULL_PRECISION,
            )  # fmt: skip
    panel.set_xlabel("bits (hollow: before, filled: after)")
    panel.set_ylabel(f"{metric}, percent")
    panel.set_xticks(sorted({r["bits"] for r in rows}))
