"""Table 1 of the 2024 paper: how well each basis spreads a vector.

    python -m experiments.table1
    python -m experiments.table1 --sizes=512 --bases=haar,butterfly3 --seeds=8

The l1 ratio is max(|x|_1, |Q^T x|_1) / (sqrt(N) |x|_2), .798 for a Gaussian vector.
Its infimum over all x is the constant c1 of Kashin's theorem, and a greedy step leaves
at most gamma = sqrt(1 - c1^2) of the residual. For every basis and size there is a row:
the ratio on real and imaginary parts of the eigenvectors of Q, as in the paper; the
smallest one that a descent from many starts finds, an upper bound of c1; the gamma that
follows; and rates of the decomposition, measured. Cells are means over seeds with
standard deviations. It writes STEM.jsonl, STEM.md and STEM.png to `--out`.

Exit code 0: done; 2: wrong flag; 130: Ctrl-C.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from tqdm import tqdm

from experiments.cli import COUNT, GIVEN, POSITIVE_COUNT, check_flags, flag, run_program
from experiments.flag_values import (
    command_line,
    file_stem,
    flag_text,
    parse_numbers,
    plain_differences,
)
from experiments.plots import COLOURS
from experiments.results import (
    atomic_path,
    environment_fields,
    prepare_output,
    write_results,
)
from experiments.tables import Column, Record, aligned_table, fixed
from kashin_jax.bases import FAMILIES, Basis, make_basis
from kashin_jax.errors import UsageError
from kashin_jax.theory import (
    eigenvector_ratios,
    rate_from_constant,
    search_worst_case,
    structured_starts,
    trace_greedy,
)

__all__ = ["Table1Config", "main", "run"]

_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h", "<", ">", "d")
_GAUSSIAN = (2 / np.pi) ** 0.5
_EIGENVECTOR_STARTS = 4
# At .603 per step 16 steps end at 3e-4, far above the rounding of float32.
_STEPS_OF_RATE = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table1Config:
    """A table; meanings are in the flags.

    Raises:
      UsageError: If a value cannot work; the message names the flag.
    """

    sizes: tuple[str, ...] = flag(("64", "256", "512"), "N, 2 to 4096.", GIVEN)
    bases: tuple[str, ...] = flag(
        ("all",), f"all, or a list of: {', '.join(FAMILIES)}.", GIVEN
    )
    seeds: int = flag(3, "Bases drawn per family and size.", POSITIVE_COUNT)
    starts: int = flag(
        8, "Of the search, Gaussian ones and e_i + Q e_j, so many of each.",
        POSITIVE_COUNT,
    )  # fmt: skip
    steps: int = flag(400, "Of each descent.", COUNT)
    out: str = flag("results", "Directory of the results.", GIVEN)

    def __post_init__(self) -> None:
        check_flags(self)
        parse_numbers("sizes", self.sizes, 2, 4096)
        unknown = [name for name in self.bases if name not in ("all", *FAMILIES)]
        if unknown:
            raise UsageError(
                f"`--bases` must be all or a list of: {', '.join(FAMILIES)}. "
                f"Got {flag_text(self.bases)!r}."
            )


def run(config: Table1Config) -> int:
    """Makes, prints and writes the table; returns the exit code.

    Raises:
      UsageError: If the output cannot be written.
    """
    out = prepare_output(config.out)
    families = [f for f in FAMILIES if f in config.bases or "all" in config.bases]
    sizes = parse_numbers("sizes", config.sizes, 2, 4096)
    records = []
    try:
        # TF32 would add an error of its own on a GPU.
        with jax.default_matmul_precision("highest"):
            for family in tqdm(families, unit="basis", disable=None, leave=False):
                records += [_row(config, family, n) for n in sizes]
    except KeyboardInterrupt:
        print("table1: interrupted; nothing was written.", file=sys.stderr)
        return 130
    _present(config, records, out)
    return 0


class _Measured(NamedTuple):
    """One value per seed."""

    bound: Float[Array, " seeds"]
    gaussian_rate: Float[Array, " seeds"]
    worst_rate: Float[Array, " seeds"]
    slowest_step: Float[Array, " seeds"]


def _row(config: Table1Config, family: str, n: int) -> dict[str, Any]:
    start = time.perf_counter()
    keys = jax.random.split(jax.random.key(0), config.seeds)
    bases = [_drawn(key, family, n) for key in keys]
    # One that has no arrays is the same for every key.
    different = bases if jax.tree.leaves(bases) else bases[:1]
    parts = [eigenvector_ratios(basis, n) for basis in different]
    parts *= config.seeds // len(different)
    eigenvectors = [np.resize(p.vectors, (_EIGENVECTOR_STARTS, n)) for p in parts]
    draws = jax.random.normal(jax.random.key(1), (config.seeds, config.starts, n))
    measured = _measure(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *bases),
        draws.astype(jnp.float32),
        jnp.asarray(np.stack(eigenvectors), jnp.float32),
        steps=config.steps,
    )
    bounds = np.asarray(measured.bound, np.float64).tolist()
    return {
        "family": family,
        "n": n,
        "seeds": config.seeds,
        "starts": config.starts,
        "steps": config.steps,
        "eigenvector_minimum": [float(p.ratios.min()) for p in parts],
        "eigenvector_mean": [float(p.ratios.mean()) for p in parts],
        "constant_bound": bounds,
        "gamma": [rate_from_constant(min(bound, 1.0)) for bound in bounds],
        "gaussian_rate": measured.gaussian_rate.tolist(),
        "worst_rate": measured.worst_rate.tolist(),
        "slowest_step": measured.slowest_step.tolist(),
        "seconds": time.perf_counter() - start,
        **environment_fields(),
    }


@partial(jax.jit, static_argnums=(1, 2))
def _drawn(key: Key[Array, ""], family: str, n: int) -> Basis:
    return make_basis(family, key, n)


@partial(jax.jit, static_argnames=("steps",))
def _measure(
    bases: Any,
    draws: Float[Array, "seeds s n"],
    eigenvectors: Float[Array, "seeds e n"],
    *,
    steps: int,
) -> _Measured:
    count, n = draws.shape[1:]

    def of_seed(basis: Any, draws: Array, eigenvectors: Array) -> _Measured:
        structured = structured_starts(basis, n=n, count=count)
        starts = jnp.concatenate([draws, structured, eigenvectors])
        worst = search_worst_case(basis, starts, steps=steps)
        trace = jax.vmap(lambda x: trace_greedy(x, basis, steps=_STEPS_OF_RATE))
        residuals = trace(jnp.concatenate([worst.x[None], draws])).residuals
        rates = residuals[:, -1] ** jnp.float32(1 / _STEPS_OF_RATE)
        slowest = jnp.max(residuals[0, 1:] / residuals[0, :-1])
        return _Measured(worst.ratio, jnp.mean(rates[1:]), rates[0], slowest)

    return jax.vmap(of_seed)(bases, draws, eigenvectors)


def _with_spread(values: Sequence[float]) -> str:
    show = fixed(3)
    return f"{show(float(np.mean(values)))} ± {show(float(np.std(values)))}"


_COLUMNS = (
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


def _present(config: Table1Config, records: Sequence[Record], out: Path) -> None:
    first = records[0]
    facts = [
        f"Means and standard deviations over {config.seeds} seeds; a basis without "
        "random parts is the same for all of them.",
        "Eigenvectors: real and imaginary parts of unit length, one of two conjugate "
        "ones. Where eigenvalues are multiple (identity, sign-dct, hadamard of some "
        "sizes, householder) the eigenvectors are those that LAPACK chooses.",
        "c1 at most: the smallest l1 ratio that a descent found; gamma at least: "
        "sqrt(1 - c1^2) for it. Slowest step and rate: of the greedy decomposition of "
        f"the vector found, largest factor and geometric mean of {_STEPS_OF_RATE} "
        f"steps. Gaussian x: the mean rate of {config.starts}; theory .603.",
        "The numbers of the paper's Table 1 are not known to us; its conclusion is "
        "that QR (here haar) and butterfly converge best in general.",
        f"{first['device']}, jax {first['jax_version']}, kashin_jax "
        f"{first['kashin_jax_version']}.",
    ]
    print("\n".join(facts) + "\n\n" + aligned_table(records, _COLUMNS))
    title = "The l1 ratio of every basis"
    written = write_results(
        out, _stem(config), records, _COLUMNS, title=title, facts=facts,
        command=command_line("table1", config, always=()),
    )  # fmt: skip
    picture = out / f"{_stem(config)}.png"
    _plot(records, picture)
    print(f"\nWritten: {written.jsonl}, {written.markdown}, {picture}")


def _stem(config: Table1Config) -> str:
    names = {"sizes": "", "bases": "", "seeds": "seeds", "starts": "starts"}
    return file_stem(["table1", *plain_differences(config, names | {"steps": "steps"})])


def _plot(records: Sequence[Record], path: Path) -> None:
    """Draws both constants against N, a curve per basis; replaced in one step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 4.0), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    titles = ("smallest over the eigenvectors", "smallest found by descent")
    fields = ("eigenvector_minimum", "constant_bound")
    for axes, title, field in zip(panels, titles, fields, strict=True):
        _draw(axes, records, field)
        axes.axhline(_GAUSSIAN, color="#404040", lw=1, ls=(0, (5, 3)),
                     label="Gaussian x, sqrt(2 / pi)")  # fmt: skip
        axes.set_title(title, loc="left", fontsize=10)
        axes.set(xscale="log", yscale="log", xlabel="N, length of the vector")
        axes.grid(color="#E5E5E5", linewidth=0.6, which="both")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    sizes = sorted({record["n"] for record in records})
    panels[0].set_xticks(sizes, list(map(str, sizes)))
    panels[0].minorticks_off()
    panels[0].set_yticks([0.03, 0.1, 0.3, 0.8], ["0.03", "0.1", "0.3", "0.8"])
    panels[0].set_ylabel("l1 ratio max(|x|₁, |Qᵀx|₁) / (√N |x|₂)")
    panels[1].legend(
        loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, fontsize=8
    )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, bbox_inches="tight", pad_inches=0.08)


def _draw(axes: Any, records: Sequence[Record], field: str) -> None:
    for index, family in enumerate(dict.fromkeys(r["family"] for r in records)):
        rows = [r for r in records if r["family"] == family]
        axes.errorbar(
            [r["n"] for r in rows],
            [np.mean(r[field]) for r in rows],
            [np.std(r[field]) for r in rows],
            label=family, lw=1, elinewidth=1, capsize=2, markersize=6,
            color=COLOURS[index % len(COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            markeredgecolor="white", markeredgewidth=0.7,
        )  # fmt: skip


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_program("table1", __doc__, Table1Config, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
