"""A heat map of the robustness records: matrix families down, bases across."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.common.style import new_figure
from experiments.common.tables import Record

__all__ = ["draw_heat_map", "one_decimal"]

# Light is good, dark is bad; told apart by all common kinds of colour vision.
_COLOURS = "viridis_r"
_DARK_FROM = 0.5
_CLIPPED = "log10_residual_mean"


def one_decimal(value: float) -> str:
    """Shows -0.04 as 0.0."""
    return f"{round(value, 1) + 0:.1f}"


class _Panel(NamedTuple):
    field: str
    title: str
    text: Callable[[float], str]


_PANELS = (
    _Panel(_CLIPPED, "log10 of the relative residual", one_decimal),
    _Panel("steps_mean", "greedy steps taken", "{:.0f}".format),
)


def draw_heat_map(records: Sequence[Record], title: str) -> Any:
    """A panel for the residual and one for the steps; every cell has its number."""
    matrices = list(dict.fromkeys(record["matrix"] for record in records))
    bases = list(dict.fromkeys(record["basis"] for record in records))
    width, height = 1.9 + 0.88 * len(bases), 1.8 + 0.24 * len(matrices)
    figure = new_figure(width, height)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, panel in zip(panels, _PANELS, strict=True):
        cells = {(r["matrix"], r["basis"]): r[panel.field] for r in records}
        grid = np.array([[cells[m, b] for b in bases] for m in matrices])
        image = axes.imshow(grid, cmap=_COLOURS, aspect="auto")
        if panel.field == _CLIPPED:
            # What is within the tolerance is all one colour.
            image.set_clim(vmin=np.log10(records[0]["rtol"]))
        _write_cells(axes, image, grid, panel.text)
        axes.set_xticks(range(len(bases)), bases, rotation=45, ha="right", fontsize=9)
        axes.set_title(panel.title, loc="left", fontsize=10)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        figure.colorbar(image, ax=axes, shrink=0.6, pad=0.02).ax.tick_params(
            labelsize=8
        )
    panels[0].set_yticks(range(len(matrices)), matrices, fontsize=9)
    panels[0].set_ylabel("matrix family")
    figure.supxlabel("basis family", fontsize=10)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure


def _write_cells(
    axes: Any, image: Any, grid: np.ndarray, text: Callable[[float], str]
) -> None:
    shades = image.norm(grid)
    for (row, column), value in np.ndenumerate(grid):
        axes.text(
            column, row, text(value), ha="center", va="center", fontsize=8,
            color="white" if shades[row, column] > _DARK_FROM else "black",
        )  # fmt: skip
