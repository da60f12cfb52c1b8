"""The names of `--only`: to add one, write a `make` and one line here."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from experiments import fig1, fig2, fig3, fig4, fig5, fig6, fig7
from experiments.common.figures import Artifact
from experiments.common.setting import Setting
from experiments.paper import depth, table1_ratios

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
        "fig1": Part(fig1.make, "greedy choice in the plane"),
        "fig2": Part(fig2.make, "convergence on random vectors"),
        "fig3": Part(fig3.make, "convergence on layers", True),
        "fig4": Part(fig4.make, "cost as size grows"),
        "fig5": Part(fig5.make, "butterfly factors"),
        "fig6": Part(fig6.make, "entries of U and V, centroids", True),
        "fig7": Part(fig7.make_good, "good clusterings", True),
        "fig8": Part(fig7.make_bad, "bad clusterings", True),
        "table1": Part(table1_ratios.make, "l1 ratio of every basis"),
        "depth": Part(depth.make, "quality against depth", True, "depth_curves"),
    }
)
