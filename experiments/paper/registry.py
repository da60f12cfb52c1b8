"""The names of `--only`: to add one, write a `make` and one line here."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from experiments.paper import (
    depth,
    fig1_choice,
    fig2_vectors,
    fig3_matrices,
    fig4_costs,
    fig5_factors,
    fig6_entries,
    fig78_clusterings,
    table1_ratios,
)
from experiments.paper.artifact import Artifact
from experiments.paper.setting import Setting

__all__ = ["PARTS", "Part"]


class Part(NamedTuple):
    """One name of `--only`.

    Attributes:
      make: Measures and draws it.
      about: A few words for `--help`.
      needs_model: Whether it depends on `--model`.
      file: Of `RESULT_FILES`, where the name is that of another one.
    """

    make: Callable[[Setting], Artifact]
    about: str
    needs_model: bool = False
    file: str = ""


PARTS: Mapping[str, Part] = MappingProxyType(
    {
        "fig1": Part(fig1_choice.make, "greedy choice in the plane"),
        "fig2": Part(fig2_vectors.make, "convergence on random vectors"),
        "fig3": Part(fig3_matrices.make, "convergence on layers", True),
        "fig4": Part(fig4_costs.make, "cost as size grows"),
        "fig5": Part(fig5_factors.make, "butterfly factors"),
        "fig6": Part(fig6_entries.make, "entries of U and V, centroids", True),
        "fig7": Part(fig78_clusterings.make_good, "good clusterings", True),
        "fig8": Part(fig78_clusterings.make_bad, "bad clusterings", True),
        "table1": Part(table1_ratios.make, "l1 ratio of every basis"),
        "depth": Part(depth.make, "quality against depth", True, "depth_curves"),
    }
)
