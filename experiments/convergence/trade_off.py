"""A figure of the ablation: what a family of bases keeps against what a step costs."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.common.style import (
    FAMILY_STYLES,
    family_legend,
    finish_axes,
    new_figure,
)
from experiments.common.tables import Record

__all__ = ["draw_trade_off"]

_FIELDS = {
    "relative_squared_error": "relative squared error",
    "residual": "relative residual",
}


def draw_trade_off(records: Sequence[Record], title: str) -> Any:
    """A column for each layer, quantization error above, residual below."""
    layers = list(dict.fromkeys((r["model"], r["layer"]) for r in records))
    figure = new_figure(1.2 + 2.2 * len(layers), 5.6)
    panels = figure.subplots(2, len(layers), squeeze=False, sharey="row", sharex="col")
    for column, (model, layer) in enumerate(layers):
        own = [r for r in records if (r["model"], r["layer"]) == (model, layer)]
        for row, field in enumerate(_FIELDS):
            _draw_points(panels[row, column], own, field)
        _label(panels[:, column], own[0], is_first=column == 0)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    family_legend(figure, panels.ravel(), columns=5)
    return figure


def _draw_points(axes: Any, records: Sequence[Record], field: str) -> None:
    for record in records:
        style = {**FAMILY_STYLES[record["basis"]], "markersize": 7, "linestyle": "none"}
        values = np.array(record[field])
        middle = values.mean()
        axes.errorbar(
            [record["ms_per_step"]], [middle],
            [[middle - values.min()], [values.max() - middle]],
            label=record["basis"], elinewidth=1, capsize=2, **style,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log")


def _label(panels: Sequence[Any], record: Record, *, is_first: bool) -> None:
    m, n = record["shape"]
    short = record["layer"].partition("layers/")[2] or record["layer"]
    title = f"{record['model']}\n{short}\n{m} × {n}"
    for axes, (name, heading) in zip(
        panels, zip(_FIELDS.values(), (title, ""), strict=True), strict=True
    ):
        finish_axes(axes, x="", y=name if is_first else "", title=heading)
        axes.tick_params(which="minor", labelsize=8)
    panels[-1].set_xlabel("ms per greedy step", fontsize=9)
