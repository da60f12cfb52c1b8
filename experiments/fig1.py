"""Figure 1: the greedy choice of the vector to project on, drawn in the plane.

    python -m experiments.fig1

In the plane the residual of one step lies on an atom of the same basis, so two steps
always end: what can be shown is the choice, and what it guarantees. There is nothing
random in it. It adds its numbers to fig1.jsonl in `--out`, and writes fig1.png and
fig1.svg.

Exit code 0: done; 2: wrong flag; 130: Ctrl-C.
"""

import math
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.figures import Artifact, FigureConfig, Setting, run_figure
from experiments.common.greedy import advance, begin
from experiments.common.plots import COLOURS, finish_axes, new_figure
from experiments.common.tables import Record
from kashin_jax.bases.butterfly import ButterflyBasis

__all__ = ["draw", "main", "make", "measure"]

# 45 degrees would put the atoms of the two bases as far apart as they can be, on the
# axes and the diagonals; at 30 none of Q's hides an axis.
DEGREES = 30.0
VECTOR = (0.92, 0.37)
DIRECTIONS = 361
_U, _V = COLOURS[0], COLOURS[1]
_REST = "#404040"


def make(setting: Setting) -> Artifact:
    """The figure; no seed, no weights."""
    del setting
    records = measure(VECTOR, DEGREES, DIRECTIONS)
    choice, sweep = records
    facts = [
        f"Coefficients {choice['coefficient_u']:.3f} on the nearest atom of the "
        f"standard basis, {choice['coefficient_v']:.3f} on that of Q: "
        f"`{choice['choice']}` is taken, residual {choice['residual']:.3f}.",
        f"Over all directions the larger one is at least {sweep['least_of_both']:.3f}, "
        f"with the standard basis alone {sweep['least_of_u']:.3f}.",
    ]
    title = "Greedy choice in the plane"
    return Artifact(title, records, draw(records), facts=facts)


def measure(
    x: tuple[float, float], degrees: float, directions: int
) -> list[dict[str, Any]]:
    """The first greedy step on a vector, and both coefficients in every direction.

    Args:
      x: A vector of the plane.
      degrees: By which the second basis is turned.
      directions: Unit vectors of the sweep, evenly from 0 to 180 degrees.
    """
    # Two coordinates are one block: the butterfly is the rotation.
    basis = ButterflyBasis(jnp.asarray([math.radians(degrees)], jnp.float32))
    start = begin(jnp.asarray(x, jnp.float32))
    after = advance(start, basis, 1)
    signs = jnp.sign(basis.analysis(start.x))
    of_u, of_v = (float(values[0]) for values in _coefficients(start.x[None], basis))
    choice = {
        "part": "choice", "angle_degrees": degrees, "x": start.x,
        "atom_u": np.sign(start.x) / math.sqrt(2),
        "atom_v": np.asarray(basis.synthesis(signs)) / math.sqrt(2),
        "coefficient_u": of_u, "coefficient_v": of_v,
        "choice": "u" if bool(jnp.any(after.u != 0)) else "v",
        "to": after.residual,
        "residual": float(np.linalg.norm(after.residual) / np.linalg.norm(x)),
    }  # fmt: skip
    angles = np.linspace(0, 180, directions)
    units = np.stack([np.cos(np.radians(angles)), np.sin(np.radians(angles))], axis=1)
    all_u, all_v = _coefficients(jnp.asarray(units, jnp.float32), basis)
    sweep = {
        "part": "directions", "angle_degrees": degrees, "degrees": angles,
        "coefficient_u": all_u, "coefficient_v": all_v,
        "least_of_u": float(all_u.min()),
        "least_of_both": float(np.maximum(all_u, all_v).min()),
    }  # fmt: skip
    return [choice, sweep]


def _coefficients(x: jax.Array, basis: ButterflyBasis) -> tuple[np.ndarray, np.ndarray]:
    """l1 norms over sqrt(2) of the rows: in the standard basis, and in Q."""
    both = (np.asarray(x), np.asarray(basis.analysis(x)))
    of_u, of_v = (np.abs(values).sum(axis=1) / math.sqrt(2) for values in both)
    return of_u, of_v


def draw(records: Sequence[Record]) -> Any:
    """Left the choice for one vector, right both coefficients in all directions."""
    choice, sweep = records
    figure = new_figure(7.6, 4.1)
    left, right = figure.subplots(1, 2)
    _draw_choice(left, choice)
    _draw_sweep(right, choice, sweep)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8
    )
    return figure


def _draw_choice(axes: Any, record: Record) -> None:
    x = np.asarray(record["x"])
    for name, colour, label in (
        ("atom_u", _U, r"standard basis: atoms $\pm 1/\sqrt{2}$, coefficient of u"),
        ("atom_v", _V, f"Q, turned by {record['angle_degrees']:.0f}°: the same for v"),
    ):
        atom = np.asarray(record[name])
        for end in (atom, [-atom[1], atom[0]], -atom, [atom[1], -atom[0]]):
            _arrow(axes, (0, 0), end, colour, width=1.0)
        axes.plot([], [], color=colour, label=label)
        foot = atom * (x @ atom)
        axes.plot(*zip(x, foot, strict=True), color=colour, lw=1, ls=(0, (3, 2)))
        axes.plot(*foot, "o", color=colour, ms=5, zorder=4)
    _arrow(axes, (0, 0), x, "black", width=2.2)
    axes.plot([], [], color="black", lw=2.2, label="x")
    axes.plot([], [], color=_REST, lw=1, ls=(0, (3, 2)), marker="o", ms=5,
              label="projections of x on the nearest atoms")  # fmt: skip
    axes.set_xlim(-1.15, 1.15)
    axes.set_ylim(-1.15, 1.15)
    axes.set_aspect("equal")
    sizes = (record["coefficient_u"], record["coefficient_v"])
    compare = ">" if sizes[0] > sizes[1] else "≤"
    finish_axes(
        axes, x="first coordinate (no unit)", y="second coordinate (no unit)",
        title=f"{sizes[0]:.3f} {compare} {sizes[1]:.3f}: {record['choice']} is taken",
    )  # fmt: skip


def _draw_sweep(axes: Any, choice: Record, sweep: Record) -> None:
    degrees = np.asarray(sweep["degrees"])
    of_u, of_v = (np.asarray(sweep[f"coefficient_{name}"]) for name in "uv")
    axes.plot(degrees, of_u, color=_U, lw=1.5)
    axes.plot(degrees, of_v, color=_V, lw=1.5, ls=(0, (5, 1.5)))
    axes.fill_between(degrees, np.maximum(of_u, of_v), 0.6, color="#EDEDED", lw=0)
    least = sweep["least_of_both"]
    axes.axhline(least, color="black", lw=0.8, ls=(0, (1, 2)))
    axes.text(179, 0.645, f"dotted: the larger one is at least {least:.3f}",
              fontsize=8, ha="right")  # fmt: skip
    own = math.degrees(math.atan2(*np.asarray(choice["x"])[::-1])) % 180
    axes.axvline(own, color="black", lw=0.8)
    axes.text(own + 2, 0.615, "x of the left panel", fontsize=8)
    axes.set_xlim(0, 180)
    axes.set_ylim(0.6, 1.02)
    axes.set_xticks(range(0, 181, 30))
    finish_axes(
        axes, x="direction of x (degrees)",
        y=r"coefficient $||\cdot||_1 / (\sqrt{2}\,||x||_2)$",
        title="Both coefficients in every direction",
    )  # fmt: skip


def _arrow(axes: Any, start: Any, end: Any, colour: str, *, width: float) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "lw": width, "shrinkA": 0,
             "shrinkB": 0, "mutation_scale": 9}  # fmt: skip
    axes.annotate("", tuple(end), tuple(start), arrowprops=style)


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_figure("fig1", __doc__, make, FigureConfig, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
