"""Figure 2: convergence on random vectors of length 1000, with 95 % bands.

    python -m experiments.fig2

It adds its numbers to fig2.jsonl in `--out`, and writes fig2.png and fig2.svg.

Exit code 0: done; 2: wrong flag; 130: Ctrl-C.
"""

import math
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from tqdm import tqdm

from experiments.common.figures import Artifact, FigureConfig, Setting, run_figure
from experiments.common.greedy import residual_curve
from experiments.common.plots import (
    FAMILY_STYLES,
    family_legend,
    finish_axes,
    new_figure,
)
from experiments.common.tables import Record
from kashin_jax import make_basis
from kashin_jax.bases import FAMILIES

__all__ = ["GAUSSIAN_RATE", "draw", "main", "make", "measure"]

LENGTH = 1000
STEPS = 60
# A dense basis of its own for each of 120 vectors would be half a gigabyte.
BASES = 6
VECTORS = 20
BAND = (2.5, 97.5)

GAUSSIAN_RATE = math.sqrt(1 - 2 / math.pi)
"""Factor per step on a residual with Gaussian entries."""


def make(setting: Setting) -> Artifact:
    """The figure at its default size; no weights."""
    records = measure(setting.key, n=LENGTH, bases=BASES, vectors=VECTORS, steps=STEPS)
    facts = [
        f"{r['family']}: mean residual {r['mean'][10]:.2e} after 10 steps, "
        f"{r['mean'][-1]:.2e} after {STEPS}."
        for r in records
    ]
    title = f"{BASES * VECTORS} Gaussian vectors of length {LENGTH}"
    return Artifact(title, records, draw(records), facts=facts)


def measure(
    key: Key[Array, ""],
    *,
    n: int,
    bases: int,
    vectors: int,
    steps: int,
    families: Sequence[str] = tuple(FAMILIES),
) -> list[dict[str, Any]]:
    """Residuals of Gaussian vectors against steps, one record per family.

    All families decompose the same vectors.

    Args:
      key: Of vectors and bases.
      n: Length of the vectors.
      bases: Draws of the basis.
      vectors: Draws of the vector for each of them.
      steps: Greedy steps.
      families: Which bases.
    """
    draws_key, bases_key = jax.random.split(key)
    draws = jax.random.normal(draws_key, (bases, vectors, n), jnp.float32)
    keys = jax.random.split(bases_key, bases)
    records = []
    for family in tqdm(families, "families", disable=None, leave=False):
        curves = np.asarray(_curves(keys, draws, family, steps), np.float64)
        flat = curves.reshape(-1, steps + 1)
        low, high = np.percentile(flat, BAND, axis=0)
        records.append({
            "family": family, "length": n, "draws": len(flat), "bases": bases,
            "steps": list(range(steps + 1)), "mean": flat.mean(axis=0),
            "low": low, "high": high, "band_percent": BAND[1] - BAND[0],
        })  # fmt: skip
    return records


@partial(jax.jit, static_argnames=("family", "steps"))
def _curves(
    keys: Key[Array, " b"],
    draws: Float[Array, "b d n"],
    family: str,
    steps: int,
) -> Float[Array, "b d k"]:
    def of_basis(key: Key[Array, ""], xs: Float[Array, "d n"]) -> Float[Array, "d k"]:
        basis = make_basis(family, key, xs.shape[-1])
        return jax.vmap(lambda x: residual_curve(x, basis, steps))(xs)

    return jax.vmap(of_basis)(keys, draws)


def draw(records: Sequence[Record]) -> Any:
    """Mean and band per family on a logarithmic axis, with the Gaussian law."""
    figure = new_figure(7.6, 4.2)
    axes = figure.subplots()
    steps = np.asarray(records[0]["steps"])
    for index, record in enumerate(records):
        style = FAMILY_STYLES[record["family"]]
        every = max(1, len(steps) // 8)
        start = index * every // max(1, len(records))
        axes.fill_between(
            steps, record["low"], record["high"], color=style["color"], alpha=0.25, lw=0
        )
        axes.plot(
            steps, record["mean"], label=record["family"], markevery=(start, every),
            **style,
        )  # fmt: skip
    lowest = min(min(record["low"]) for record in records)
    law = GAUSSIAN_RATE**steps
    shown = law >= lowest
    axes.plot(steps[shown], law[shown], color="#404040", lw=0.9, ls=(0, (5, 3)),
              label=r"$(1 - 2/\pi)^{k/2}$", zorder=1)  # fmt: skip
    axes.set_yscale("log")
    first = records[0]
    finish_axes(
        axes, x="greedy steps k", y="relative residual $||r_k||_2 / ||x||_2$",
        title=f"Gaussian vectors of length {first['length']}: mean and central "
        f"{first['band_percent']:.0f} % of {first['draws']} draws",
    )  # fmt: skip
    family_legend(figure, [axes])
    return figure


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_figure("fig2", __doc__, make, FigureConfig, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
