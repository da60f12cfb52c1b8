"""How pictures look: colours, one style per basis family, plain axes.

matplotlib is imported only when a picture is drawn, and its global state left alone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kashin_jax.bases import FAMILIES
from kashin_jax.io import atomic_path

__all__ = [
    "COLOURS",
    "FAMILY_STYLES",
    "family_legend",
    "finish_axes",
    "new_figure",
    "save_picture",
]

# The colours of Okabe and Ito, told apart by all common kinds of colour vision. Markers
# differ as well, so the figure survives a black-and-white printer.
COLOURS = (
    "#D55E00", "#0072B2", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#000000",
    "#7F7F7F",
)  # fmt: skip
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h", "<", ">", "d", "p", "*")
_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)))


def _family_styles() -> dict[str, dict[str, Any]]:
    """Colour, dashes and marker, so that two families differ in two of them at least.

    A family keeps its style in every figure.
    """
    return {
        family: {
            "color": COLOURS[index % len(COLOURS)],
            "linestyle": _DASHES[index // len(COLOURS) % len(_DASHES)],
            "marker": _MARKERS[index % len(_MARKERS)],
            "linewidth": 1.3,
            "markersize": 5,
            "markeredgecolor": "white",
            "markeredgewidth": 0.5,
        }
        for index, family in enumerate(FAMILIES)
    }


FAMILY_STYLES: Mapping[str, dict[str, Any]] = _family_styles()


def new_figure(width: float, height: float) -> Any:
    """A figure of so many inches with a canvas of its own."""
    # The object interface leaves pyplot's global state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_picture(figure: Any, path: Path, **options: Any) -> None:
    """Writes a figure in one step: an SVG by the name `*.svg`, else a PNG.

    Args:
      figure: Of matplotlib.
      path: The file.
      **options: Of `savefig`; by default empty margins are cut off.

    Raises:
      CheckpointError: If the file cannot be written.
    """
    kind = "svg" if path.suffix == ".svg" else "png"
    cut = {"bbox_inches": "tight", "pad_inches": 0.08}
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=kind, **cut | options)


def finish_axes(axes: Any, *, x: str, y: str, title: str = "") -> None:
    """Labels, a light grid behind the data, no box."""
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.set_title(title, loc="left", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def family_legend(figure: Any, axes: Any, *, columns: int = 1) -> None:
    """One legend for all panels, outside them; every label once."""
    entries: dict[str, Any] = {}
    for one in axes:
        handles, labels = one.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(
        list(entries.values()), list(entries), ncols=columns, frameon=False,
        fontsize=8, handlelength=3,
        loc="outside lower center" if columns > 1 else "outside right upper",
    )  # fmt: skip
