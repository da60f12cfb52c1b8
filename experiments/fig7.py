"""Figures 7 and 8: good and bad clusterings in the (u, v) plane."""

from collections.abc import Sequence
from typing import Any

from experiments.common.clusterings import Clustering, cluster_layer, facts_of, range_of
from experiments.common.figures import Artifact
from experiments.common.plane import draw_plane
from experiments.common.setting import Setting
from experiments.common.style import new_figure

__all__ = ["draw", "make_bad", "make_good"]

GOOD = ("haar", "butterfly3", "hadamard", "sign-dct")
# Bases that do not spread.
BAD = ("householder", "identity")


def make_good(setting: Setting) -> Artifact:
    """Figure 7: an easy layer in four bases that spread."""
    layer = setting.good_layer
    return _make(setting, [(layer, family) for family in GOOD], "good clusterings")


def make_bad(setting: Setting) -> Artifact:
    """Figure 8: the layers that lose and resist most, and bases that do not spread."""
    hard = dict.fromkeys([setting.lossy_layer, setting.hard_layer])
    cases = [(layer, "haar") for layer in hard]
    cases += [(setting.good_layer, family) for family in BAD]
    return _make(setting, cases, "bad clusterings")


def _make(setting: Setting, cases: Sequence[tuple[str, str]], what: str) -> Artifact:
    clusterings = [
        cluster_layer(setting.kernels, setting.key, layer, family)
        for layer, family in cases
    ]
    title = f"{setting.model_name}: {what} of the pairs (u, v), 16 centroids"
    records = [clustering.record for clustering in clusterings]
    facts = [facts_of(record) for record in records]
    return Artifact(title, records, draw(clusterings, title), facts=facts)


def draw(clusterings: Sequence[Clustering], title: str) -> Any:
    """A panel per clustering, each on its own scale."""
    rows = -(-len(clusterings) // 2)
    figure = new_figure(6.6, 0.5 + 3.2 * rows)
    grid = figure.subplots(rows, 2, squeeze=False)
    image = None
    for axes, clustering in zip(grid.flat, clusterings, strict=False):
        record = clustering.record
        place = (
            record["layer"].removeprefix("decoder/layers/").replace("self_attn/", "")
        )
        image = draw_plane(
            axes, clustering, range_of([clustering]),
            title=f"{place}, {record['family']}: residual {record['residual']:.0e},\n"
            f"rel. sq. error {record['relative_squared_error']:.4f}, "
            f"overlap {record['overlap']:.2f}",
        )  # fmt: skip
    for axes in grid.flat[len(clusterings) :]:
        axes.axis("off")
    bar = figure.colorbar(image, ax=grid, shrink=0.6, pad=0.02)
    bar.set_label("share of the pairs in a bin", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure
