"""Figure 4: matrix against vector form, and cost by basis, as size grows.

    python -m experiments.fig4

It adds its numbers to fig4.jsonl in `--out`, and writes fig4.png and fig4.svg. Seconds
mean something on a quiet machine only.

Exit code 0: done; 2: wrong flag; 130: Ctrl-C.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from tqdm import tqdm

from experiments.common.figures import Artifact, FigureConfig, Setting, run_figure
from experiments.common.plots import COLOURS, FAMILY_STYLES, finish_axes, new_figure
from experiments.common.tables import Record
from experiments.common.timing import median_seconds
from kashin_jax import (
    BasisSpec,
    KroneckerBasis,
    kashin_decompose,
    make_basis,
    make_pair,
)
from kashin_jax.bases import FAMILIES, Basis
from kashin_jax.bases.basis import dense
from kashin_jax.bases.haar import HaarBasis
from kashin_jax.decomposition import Frame

__all__ = ["Sizes", "draw", "fitted_slopes", "main", "make", "measure"]

DENSE = "haar"
# Never reached: the number of steps is the same for all.
_RTOL = 1e-30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How far the figure goes; every size is a power of two but for `vector`.

    Attributes:
      vector: Sides of the square matrices decomposed in vector form; its basis has
        `side**4` entries.
      matrix: Sides in matrix form.
      step: Sides at which the bases are compared.
      analysis: Lengths of the vectors that are analysed.
      dense: The longest of them for the dense basis.
      steps: Greedy steps, and analyses, in one timed call.
      repeats: Timed calls, of which the median counts.
    """

    vector: tuple[int, ...] = (16, 32, 64, 80)
    matrix: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    step: tuple[int, ...] = (64, 128, 256, 512)
    analysis: tuple[int, ...] = (2**10, 2**12, 2**14, 2**16, 2**18)
    dense: int = 2**14
    steps: int = 5
    repeats: int = 5


def make(setting: Setting) -> Artifact:
    """The figure at its default size; no weights."""
    records = measure(setting.key, Sizes())
    slopes = fitted_slopes(records)
    facts = [
        f"{s['part']}, {s['curve']}: log-log slope {s['slope']:.2f} in "
        f"{s['against']}, {s['smallest']} to {s['largest']}."
        for s in slopes
    ]
    title = "Cost of one step and of one analysis"
    return Artifact(title, [*records, *slopes], draw(records, slopes), facts=facts)


def measure(
    key: Key[Array, ""], sizes: Sizes, *, families: Sequence[str] = tuple(FAMILIES)
) -> list[dict[str, Any]]:
    """Seconds of a step in both forms, of a step by basis, of an analysis by basis."""
    cases = [
        *_forms(key, sizes), *_steps(key, sizes, families),
        *_analyses(key, sizes, families),
    ]  # fmt: skip
    records = []
    for record, case in tqdm(cases, "timings", disable=None, leave=False):
        seconds = median_seconds(case(), sizes.repeats) / sizes.steps
        records.append({**record, "seconds": seconds, "repeats": sizes.repeats})
    return records


# What is timed is made when its turn comes: a dense basis takes up to a gigabyte.
_Case = tuple[dict[str, Any], Callable[[], Callable[[], Any]]]


def _forms(key: Key[Array, ""], sizes: Sizes) -> Iterator[_Case]:
    for form, sides in (("matrix", sizes.matrix), ("vector", sizes.vector)):
        for side in sides:
            record = _record("form", form, DENSE, side * side, "entries")
            yield record, partial(_form, key, form, side, sizes.steps)


def _form(key: Key[Array, ""], form: str, side: int, steps: int) -> Callable[[], Any]:
    x_key, basis_key = jax.random.split(key)
    x = jax.random.normal(x_key, (side, side), jnp.float32)
    pair = make_pair(BasisSpec(DENSE, DENSE), basis_key, (side, side))
    if form == "matrix":
        return partial(_decompose, x, pair, steps)
    return partial(_decompose, x.reshape(-1), _vectorised(pair, side), steps)


def _vectorised(pair: KroneckerBasis, side: int) -> HaarBasis:
    """The pair as one dense basis of the entries row by row: the same decomposition."""
    return HaarBasis(jnp.kron(dense(pair.left, side), dense(pair.right, side)))


def _steps(
    key: Key[Array, ""], sizes: Sizes, families: Sequence[str]
) -> Iterator[_Case]:
    for family in families:
        for side in sizes.step:
            record = _record("step", family, family, side, "side")
            yield record, partial(_step, key, family, side, sizes.steps)


def _step(key: Key[Array, ""], family: str, side: int, steps: int) -> Callable[[], Any]:
    x_key, basis_key = jax.random.split(key)
    x = jax.random.normal(x_key, (side, side), jnp.float32)
    pair = make_pair(BasisSpec(family, family), basis_key, (side, side))
    return partial(_decompose, x, pair, steps)


def _analyses(
    key: Key[Array, ""], sizes: Sizes, families: Sequence[str]
) -> Iterator[_Case]:
    for family in families:
        for n in sizes.analysis:
            if family != DENSE or n <= sizes.dense:
                record = _record("analysis", family, family, n, "length")
                yield record, partial(_analysis, key, family, n, sizes.steps)


def _analysis(
    key: Key[Array, ""], family: str, n: int, times: int
) -> Callable[[], Any]:
    x_key, basis_key = jax.random.split(key)
    x = jax.random.normal(x_key, (n,), jnp.float32)
    if family == DENSE:
        # Orthogonalising takes minutes at 2^14, and no product's time depends on it.
        basis: Basis = HaarBasis(jnp.full((n, n), 1 / n, jnp.float32))
    else:
        basis = make_basis(family, basis_key, n)
    return partial(_analyse, x, basis, times)


def _record(
    part: str, curve: str, family: str, size: int, against: str
) -> dict[str, Any]:
    return {"part": part, "curve": curve, "family": family, "against": against,
            "size": size}  # fmt: skip


@partial(jax.jit, static_argnames="steps")
def _decompose(x: Float[Array, "*shape"], basis: Frame, steps: int) -> Any:
    return kashin_decompose(x, basis, rtol=_RTOL, max_steps=steps)


@partial(jax.jit, static_argnames="times")
def _analyse(x: Float[Array, " n"], basis: Basis, times: int) -> Any:
    # Inside one program, so that dispatch, some 20 us a call, does not hide the rest.
    return jax.lax.fori_loop(0, times, lambda _, y: basis.analysis(y), x)


def fitted_slopes(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Least-squares slopes of log seconds against log size, one record per curve.

    Curves of a single size have none.
    """
    slopes = []
    for part, curve in dict.fromkeys((r["part"], r["curve"]) for r in records):
        own = [r for r in records if (r["part"], r["curve"]) == (part, curve)]
        if len({r["size"] for r in own}) < 2:
            continue
        logs = np.log([[r["size"], r["seconds"]] for r in own])
        slope, intercept = np.polyfit(logs[:, 0], logs[:, 1], 1)
        sizes = [r["size"] for r in own]
        slopes.append({
            "part": part, "curve": curve, "fit": True, "against": own[0]["against"],
            "slope": float(slope), "seconds_at_1": math.exp(float(intercept)),
            "smallest": min(sizes), "largest": max(sizes),
        })  # fmt: skip
    return slopes


_FORM_STYLES: Mapping[str, dict[str, Any]] = {
    "matrix": {"color": COLOURS[1], "marker": "s"},
    "vector": {"color": COLOURS[0], "marker": "o", "linestyle": (0, (4, 1.5))},
}
_PANELS = {
    "form": ("one greedy step, Haar", "entries of the matrix"),
    "step": ("one greedy step, n × n", "side of the matrix"),
    "analysis": ("one analysis", "length of the vector"),
}


def draw(records: Sequence[Record], slopes: Sequence[Record]) -> Any:
    """A panel per part; the legend of each has the slopes of its curves."""
    figure = new_figure(7.6, 5.6)
    panels = figure.subplots(1, len(_PANELS))
    for axes, (part, (title, size)) in zip(panels, _PANELS.items(), strict=True):
        own = [record for record in records if record["part"] == part]
        fits = {s["curve"]: s["slope"] for s in slopes if s["part"] == part}
        for curve in dict.fromkeys(record["curve"] for record in own):
            points = [(r["size"], r["seconds"]) for r in own if r["curve"] == curve]
            style = _FORM_STYLES.get(curve) or FAMILY_STYLES[curve]
            slope = f" {fits[curve]:.2f}" if curve in fits else ""
            axes.plot(*zip(*points, strict=True), label=f"{curve}{slope}", **style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        finish_axes(axes, x=size, y="seconds", title=title)
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.17), frameon=False, fontsize=7,
            handlelength=2.6, title="curve, log-log slope", title_fontsize=7,
        )  # fmt: skip
    return figure


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_figure("fig4", __doc__, make, FigureConfig, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
