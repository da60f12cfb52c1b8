"""The (u, v) plane as a picture: density of the pairs, centroids, cell borders."""

from typing import Any

import numpy as np

from experiments.common.clusterings import Clustering
from experiments.common.plots import COLOURS
from experiments.common.style import finish_axes

__all__ = ["draw_plane"]

BINS = 140
_GRID = 240


def draw_plane(axes: Any, clustering: Clustering, limit: float, *, title: str) -> Any:
    """Draws one clustering; returns the image of the density, for a colour bar.

    Args:
      axes: Where.
      clustering: What.
      limit: Of both axes; the few pairs beyond it are not shown.
      title: Above the axes.
    """
    from matplotlib.colors import LogNorm

    edges = np.linspace(-limit, limit, BINS + 1)
    counts, _, _ = np.histogram2d(clustering.u, clustering.v, [edges, edges])
    share = counts.T / len(clustering.u)
    # An image, not a point each: a layer has 10^5 to 10^7 pairs.
    image = axes.imshow(
        np.ma.masked_equal(share, 0), origin="lower", cmap="Blues", aspect="equal",
        extent=(-limit, limit, -limit, limit), norm=LogNorm(3e-6, 3e-3, clip=True),
        interpolation="nearest",
    )  # fmt: skip
    book = clustering.record["centroids"]
    _draw_borders(axes, book, limit)
    axes.plot(book[:, 0], book[:, 1], "o", ms=4, color=COLOURS[0],
              markeredgecolor="white", markeredgewidth=0.6)  # fmt: skip
    axes.set_xlim(-limit, limit)
    axes.set_ylim(-limit, limit)
    finish_axes(axes, x="u / rms of the layer", y="v / rms of the layer", title=title)
    axes.grid(False)
    return image


def _draw_borders(axes: Any, book: np.ndarray, limit: float) -> None:
    line = np.linspace(-limit, limit, _GRID)
    points = np.stack(np.meshgrid(line, line), axis=-1)
    nearest = np.argmin(
        np.sum((points[:, :, None] - book[None, None]) ** 2, axis=-1), axis=-1
    )
    for code in range(len(book)):
        cell = nearest == code
        # A cell may lie outside, or be all there is.
        if cell.any() and not cell.all():
            axes.contour(
                line, line, cell.astype(float), [0.5], colors="#7F7F7F", linewidths=0.4
            )
