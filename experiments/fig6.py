"""Figure 6: entries of U and V with the centroids, one good basis and one bad.

    python -m experiments.fig6
    python -m experiments.fig6 --model=facebook/opt-125m

The layer is the paper's query projection or, in a model without it, the one that
converges best. It adds its numbers to fig6.jsonl in `--out`, and writes fig6.png and
fig6.svg.

Exit code 0: done; 1: a file or its content is unusable; 2: wrong flag; 130: Ctrl-C.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.common.clusterings import (
    Clustering,
    cluster_layer,
    draw_plane,
    facts_of,
    range_of,
)
from experiments.common.figures import Artifact, ModelFigureConfig, Setting, run_figure
from experiments.common.plots import COLOURS, finish_axes, new_figure

__all__ = ["draw", "main", "make"]

FAMILIES_SHOWN = ("haar", "householder")
BINS = 160


def make(setting: Setting) -> Artifact:
    """The figure, on one layer."""
    layer = setting.good_layer
    clusterings = [
        cluster_layer(setting.kernels, setting.key, layer, family)
        for family in FAMILIES_SHOWN
    ]
    title = f"{setting.model_name}, {layer}: entries of U and V"
    records = [
        clustering.record | _histograms(clustering) for clustering in clusterings
    ]
    return Artifact(
        title, records, draw(clusterings, title),
        facts=[facts_of(record) for record in records],
    )  # fmt: skip


def _histograms(clustering: Clustering) -> dict[str, Any]:
    limit = range_of([clustering])
    edges = np.linspace(-limit, limit, BINS + 1)
    counts = {
        f"histogram_{name}": np.histogram(values, edges)[0] / values.size
        for name, values in (("u", clustering.u), ("v", clustering.v))
    }
    return {"histogram_edges": edges, **counts}


def draw(clusterings: Sequence[Clustering], title: str) -> Any:
    """A row per basis: the entries of U, those of V, and the plane of both."""
    figure = new_figure(7.6, 0.5 + 2.5 * len(clusterings))
    grid = figure.subplots(len(clusterings), 3, squeeze=False)
    limit = range_of(clusterings)
    for row, clustering in zip(grid, clusterings, strict=True):
        family, book = clustering.record["family"], clustering.record["centroids"]
        for axes, name, values, coordinate in (
            (row[0], "U", clustering.u, 0), (row[1], "V", clustering.v, 1),
        ):  # fmt: skip
            inside = values[np.abs(values) <= limit]
            axes.hist(inside, BINS, range=(-limit, limit), density=True,
                      color=COLOURS[1], histtype="stepfilled")  # fmt: skip
            # Below the axis, where no bar hides them.
            axes.plot(book[:, coordinate], np.full(len(book), -0.04),
                      "|", ms=7, mew=1.2, color=COLOURS[0], clip_on=False,
                      transform=axes.get_xaxis_transform())  # fmt: skip
            axes.set_xlim(-limit, limit)
            finish_axes(axes, x=f"entry of {name} / rms of the layer",
                        y="density", title=f"{family}: {name}")  # fmt: skip
            axes.tick_params(axis="x", pad=9)
        draw_plane(row[2], clustering, limit, title=f"{family}: pairs")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_figure("fig6", __doc__, make, ModelFigureConfig, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
