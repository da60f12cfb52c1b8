"""Figure 3: convergence on real layers, good ones and the hardest of the model.

    python -m experiments.fig3
    python -m experiments.fig3 --model=facebook/opt-125m

The layers are the paper's, where the model has them, and the one that converges worst.
It adds its numbers to fig3.jsonl in `--out`, and writes fig3.png and fig3.svg.

Exit code 0: done; 1: a file or its content is unusable; 2: wrong flag; 130: Ctrl-C.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Key
from tqdm import tqdm

from experiments.common.figures import (
    PAPER_LAYERS,
    Artifact,
    ModelFigureConfig,
    Setting,
    layer_basis,
    run_figure,
)
from experiments.common.greedy import advance, begin, relative_residual
from experiments.common.plots import (
    FAMILY_STYLES,
    family_legend,
    finish_axes,
    new_figure,
)
from experiments.common.tables import Record
from kashin_jax import KroneckerBasis
from kashin_jax.bases import FAMILIES

__all__ = ["curve", "draw", "main", "make", "measure"]

STEPS = 60
# The paper gave its hard layer 6000 steps; here the curves are straight long before.
HARD_STEPS = 1000
# Residuals are looked at after each of so many steps, then after every so many.
DENSE_STEPS = 12
EVERY = 4
# Below it rounding, not the algorithm, decides whether a step helps.
FLOOR = 6e-7


def make(setting: Setting) -> Artifact:
    """The figure: the paper's layers, as far as the model has them, and the hardest."""
    hard = setting.hard_layer
    layers = [path for path in PAPER_LAYERS if path in setting.kernels and path != hard]
    steps = dict.fromkeys(layers, STEPS) | {hard: HARD_STEPS}
    records = measure(setting.kernels, setting.key, steps)
    stuck = [r["layer"] for r in setting.survey if not r["converged"]]
    facts = [
        f"{len(stuck)} of {len(setting.survey)} layers keep a residual above "
        f"{setting.survey[0]['rtol']:g} after {setting.survey[0]['max_steps']} steps "
        f"({setting.survey[0]['family']}): {', '.join(stuck) or 'none'}.",
        *(_sentence(record) for record in records),
    ]
    title = f"{setting.model_name}: layers, matrix form"
    figure = draw(records, title)
    return Artifact(title, [*setting.survey, *records], figure, facts=facts)


def _sentence(record: Record) -> str:
    return (
        f"{record['layer']}, {record['family']}: {record['residuals'][-1]:.2e} after "
        f"{record['steps'][-1]} steps."
    )


def measure(
    kernels: Mapping[str, Float[Array, "_ _"]],
    key: Key[Array, ""],
    steps: Mapping[str, int],
    *,
    families: Sequence[str] = tuple(FAMILIES),
) -> list[dict[str, Any]]:
    """One record for every layer and family.

    Args:
      kernels: Layers by path.
      key: Root of the keys.
      steps: Greedy steps at the most, by layer; only these are decomposed.
      families: Which bases.
    """
    records = []
    cases = [(layer, family) for layer in steps for family in families]
    for layer, family in tqdm(cases, "curves", disable=None, leave=False):
        kernel = kernels[layer]
        basis = layer_basis(key, layer, family, kernel)
        taken, residuals = curve(kernel, basis, steps[layer])
        records.append({
            "part": "curve", "layer": layer, "shape": list(kernel.shape),
            "family": family, "max_steps": steps[layer],
            "steps": taken, "residuals": residuals,
        })  # fmt: skip
    return records


def curve(
    kernel: Float[Array, "m n"], basis: KroneckerBasis, max_steps: int
) -> tuple[list[int], list[float]]:
    """Steps looked at, and the relative residuals there.

    Ends early where rounding does not let the residual fall any more.
    """
    progress = begin(kernel)
    steps, residuals = [0], [float(relative_residual(progress))]
    while steps[-1] < max_steps:
        more = 1 if steps[-1] < DENSE_STEPS else EVERY
        more = min(more, max_steps - steps[-1])
        progress = advance(progress, basis, more)
        residual = float(jax.device_get(relative_residual(progress)))
        at_floor = residual < FLOOR and residual > 0.9 * residuals[-1]
        steps.append(steps[-1] + more)
        residuals.append(residual)
        if at_floor or residual == 0:
            break
    return steps, residuals


def draw(records: Sequence[Record], title: str) -> Any:
    """A panel per layer."""
    layers = list(dict.fromkeys(record["layer"] for record in records))
    rows = -(-len(layers) // 2)
    figure = new_figure(7.6, 0.6 + 2.9 * rows)
    panels = np.ravel(figure.subplots(rows, min(2, len(layers)), squeeze=False))
    for axes, layer in zip(panels, layers, strict=False):
        _draw_layer(axes, [record for record in records if record["layer"] == layer])
    for axes in panels[len(layers) :]:
        axes.axis("off")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    family_legend(figure, panels[: len(layers)], columns=5)
    return figure


def _draw_layer(axes: Any, records: Sequence[Record]) -> None:
    for index, record in enumerate(records):
        every = max(1, len(record["steps"]) // 6)
        axes.plot(
            record["steps"], record["residuals"], label=record["family"],
            markevery=(index * every // len(records) + 1, every),
            **FAMILY_STYLES[record["family"]],
        )  # fmt: skip
    axes.set_yscale("log")
    first = records[0]
    m, n = first["shape"]
    finish_axes(
        axes, x="greedy steps k", y="relative residual $||R_k||_F / ||X||_F$",
        title=f"{first['layer'].removeprefix('decoder/')}, {m} × {n}",
    )  # fmt: skip


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_figure("fig3", __doc__, make, ModelFigureConfig, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
