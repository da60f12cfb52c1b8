"""Table 1: how well each basis spreads a vector, as rows and as a picture of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Key
from tqdm import tqdm

from experiments.common.figures import Artifact
from experiments.common.results import environment_fields
from experiments.common.setting import Setting
from experiments.common.style import (
    FAMILY_STYLES,
    family_legend,
    finish_axes,
    new_figure,
)
from experiments.common.tables import Column, Record, fixed
from experiments.table1_rows import STEPS_OF_RATE, measure_row
from kashin_jax.bases import FAMILIES

__all__ = ["COLUMNS", "SEEDS", "SIZES", "STARTS", "STEPS", "draw", "make", "table1"]

SIZES = (64, 256, 512)
SEEDS = 3
STARTS = 8
STEPS = 400

_GAUSSIAN = (2 / np.pi) ** 0.5


def make(setting: Setting) -> Artifact:
    """The table at its default size; no weights."""
    return table1(setting.key)


def table1(
    key: Key[Array, ""],
    *,
    families: Sequence[str] = tuple(FAMILIES),
    sizes: Sequence[int] = SIZES,
    seeds: int = SEEDS,
    starts: int = STARTS,
    steps: int = STEPS,
) -> Artifact:
    """Measures and draws the table; a row for every basis and size.

    Args:
      key: Of bases and vectors.
      families: Which bases.
      sizes: Lengths of the vectors.
      seeds: Bases drawn per family and size.
      starts: As in `measure_row`.
      steps: Of each descent.
    """
    records = [
        measure_row(key, family, n, seeds=seeds, starts=starts, steps=steps)
        for family in tqdm(families, unit="basis", disable=None, leave=False)
        for n in sizes
    ]
    title = "The l1 ratio of every basis"
    facts = _facts(seeds, starts)
    return Artifact(title, records, draw(records), COLUMNS, facts)


def _facts(seeds: int, starts: int) -> list[str]:
    environment = environment_fields()
    return [
        f"Means and standard deviations over {seeds} seeds; a basis without random "
        "parts is the same for all of them.",
        "Eigenvectors: real and imaginary parts of unit length, one of two conjugate "
        "ones. Where eigenvalues are multiple (identity, sign-dct, hadamard of some "
        "sizes, householder) the eigenvectors are those that LAPACK chooses.",
        "c1 at most: the smallest l1 ratio that a descent found; gamma at least: "
        "sqrt(1 - c1^2) for it. Slowest step and rate: of the greedy decomposition of "
        f"the vector found, largest factor and geometric mean of {STEPS_OF_RATE} "
        f"steps. Gaussian x: the mean rate of {starts}; theory .603.",
        "The numbers of the paper's Table 1 are not known to us; its conclusion is "
        "that QR (here haar) and butterfly converge best in general.",
        f"{environment['device']}, jax {environment['jax_version']}, kashin_jax "
        f"{environment['kashin_jax_version']}.",
    ]


def _with_spread(values: Sequence[float]) -> str:
    show = fixed(3)
    return f"{show(float(np.mean(values)))} ± {show(float(np.std(values)))}"


COLUMNS = (
    Column("family", "basis"),
    Column("n", "N"),
    Column("eigenvector_minimum", "eigenvectors, min", _with_spread),
    Column("eigenvector_mean", "mean", _with_spread),
    Column("constant_bound", "c1 at most", _with_spread),
    Column("gamma", "gamma at least", _with_spread),
    Column("slowest_step", "slowest step", _with_spread),
    Column("worst_rate", "rate, worst x", _with_spread),
    Column("gaussian_rate", "rate, Gaussian x", _with_spread),
)


def draw(records: Sequence[Record]) -> Any:
    """Both constants against N, a curve per basis with the spread of its seeds."""
    figure = new_figure(9.2, 4.0)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    shown = {
        "eigenvector_minimum": "smallest over the eigenvectors",
        "constant_bound": "smallest found by descent",
    }
    for axes, (field, title) in zip(panels, shown.items(), strict=True):
        _draw_field(axes, records, field)
        axes.axhline(_GAUSSIAN, color="#404040", lw=1, ls=(0, (5, 3)),
                     label="Gaussian x, $\\sqrt{2/\\pi}$")  # fmt: skip
        axes.set(xscale="log", yscale="log")
        finish_axes(axes, x="N, length of the vector", y="", title=title)
    sizes = sorted({record["n"] for record in records})
    panels[0].set_xticks(sizes, list(map(str, sizes)))
    panels[0].minorticks_off()
    panels[0].set_yticks([0.03, 0.1, 0.3, 0.8], ["0.03", "0.1", "0.3", "0.8"])
    ratio = r"$\max(||x||_1, ||Q^T x||_1)\,/\,(\sqrt{N}\,||x||_2)$"
    panels[0].set_ylabel(f"l1 ratio {ratio}", fontsize=9)
    family_legend(figure, panels)
    return figure


def _draw_field(axes: Any, records: Sequence[Record], field: str) -> None:
    for family in dict.fromkeys(record["family"] for record in records):
        rows = [record for record in records if record["family"] == family]
        axes.errorbar(
            [row["n"] for row in rows],
            [np.mean(row[field]) for row in rows],
            [np.std(row[field]) for row in rows],
            label=family, elinewidth=1, capsize=2, **FAMILY_STYLES[family],
        )  # fmt: skip
