"""Figure 5: the sparse factors of butterfly matrices.

    python -m experiments.fig5

It adds its numbers to fig5.jsonl in `--out`, and writes fig5.png and fig5.svg.

Exit code 0: done; 2: wrong flag; 130: Ctrl-C.
"""

import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from experiments.common.figures import Artifact, FigureConfig, Setting, run_figure
from experiments.common.plots import new_figure
from experiments.common.tables import Record
from kashin_jax.bases.basis import dense
from kashin_jax.bases.butterfly import ButterflyBasis, make_butterfly

__all__ = ["draw", "factors", "main", "make", "measure"]

ORDERS = (8, 6)
# Entries whose magnitude is below it stand for structural zeros.
_ZERO = 1e-7


def make(setting: Setting) -> Artifact:
    """The figure: the paper's order 8, and one that is no power of two."""
    records = measure(setting.key, ORDERS)
    facts = [
        f"order {r['order']}, {r['factor']}: {r['nonzeros']} entries are not 0."
        for r in records
    ]
    title = "Butterfly matrices and their factors"
    return Artifact(title, records, draw(records), facts=facts)


def measure(key: Key[Array, ""], orders: Sequence[int]) -> list[dict[str, Any]]:
    """Every factor and their product, entry by entry."""
    records = []
    for n in orders:
        basis = make_butterfly(jax.random.fold_in(key, n), n)
        named = factors(basis) | {"product": dense(basis, n)}
        for name, matrix in named.items():
            values = np.asarray(matrix, np.float64)
            records.append({
                "order": n, "factor": name, "entries": values,
                "nonzeros": int(np.sum(np.abs(values) > _ZERO)),
            })  # fmt: skip
    return records


def factors(basis: ButterflyBasis) -> dict[str, Float[Array, "n n"]]:
    """The factors in the order of the product, named after their block size.

    A factor is the butterfly whose other angles are zero.
    """
    n = basis.angles.shape[0] + 1
    result = {}
    for level in range((n - 1).bit_length()):
        own = np.zeros(n - 1, bool)
        for block in range(2**level):
            start, end = block * n >> level, (block + 1) * n >> level
            if end - start > 1:
                own[((2 * block + 1) * n >> (level + 1)) - 1] = True
        alone = ButterflyBasis(jnp.where(own, basis.angles, 0.0))
        size = -(-n >> level)
        result[f"B{size}"] = dense(alone, n)
    return result


def draw(records: Sequence[Record]) -> Any:
    """A row per order: the factors, then their product."""
    orders = list(dict.fromkeys(record["order"] for record in records))
    rows = {n: [r for r in records if r["order"] == n] for n in orders}
    width = max(map(len, rows.values()))
    figure = new_figure(7.6, 2.0 * len(orders) + 0.2)
    grid = figure.subplots(len(orders), width, squeeze=False)
    image = None
    for panels, row in zip(grid, rows.values(), strict=True):
        for column, axes in enumerate(panels):
            if column < len(row):
                image = _draw_matrix(axes, row[column], is_first=column == 0)
            else:
                axes.axis("off")
    bar = figure.colorbar(image, ax=grid, shrink=0.7, pad=0.02)
    bar.set_label("entry (no unit)", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def _draw_matrix(axes: Any, record: Record, *, is_first: bool) -> Any:
    values = np.asarray(record["entries"])
    n = len(values)
    # Zeros are blank, so that the pattern survives a black-and-white printer.
    shown = np.ma.masked_where(np.abs(values) <= _ZERO, values)
    image = axes.imshow(shown, cmap="PuOr", vmin=-1, vmax=1)
    for (i, j), value in np.ndenumerate(values):
        if abs(value) > _ZERO:
            text = f"{value:.2f}".replace("0.", ".").replace("-", "−")
            axes.text(j, i, text, ha="center", va="center", fontsize=4.5,
                      color="white" if abs(value) > 0.65 else "black")  # fmt: skip
    axes.set_xticks(np.arange(0, n), np.arange(1, n + 1), fontsize=6)
    axes.set_yticks(np.arange(0, n), np.arange(1, n + 1), fontsize=6)
    axes.set_xlabel("column", fontsize=8)
    if is_first:
        axes.set_ylabel(f"order {n}\nrow", fontsize=8)
    name = record["factor"]
    label = f"$B_{{{name[1:]}}}$" if name.startswith("B") else "product"
    axes.set_title(f"{label}, {record['nonzeros']} entries", fontsize=8)
    return image


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_figure("fig5", __doc__, make, FigureConfig, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
