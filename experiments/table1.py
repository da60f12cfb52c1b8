"""Table 1 of the 2024 paper: how well each basis spreads a vector.

    python -m experiments.table1
    python -m experiments.table1 --sizes=512 --bases=haar,butterfly3 --seeds=8

The l1 ratio is max(|x|_1, |Q^T x|_1) / (sqrt(N) |x|_2), .798 for a Gaussian vector.
Its infimum over all x is the constant c1 of Kashin's theorem, and a greedy step leaves
at most gamma = sqrt(1 - c1^2) of the residual. For every basis and size there is a row:
the ratio on real and imaginary parts of the eigenvectors of Q, as in the paper; the
smallest one that a descent from many starts finds, an upper bound of c1; the gamma that
follows; and rates of the decomposition, measured. Cells are means over seeds with
standard deviations. It adds to table1.jsonl in `--out`, and writes table1.md, .png and
.svg.

Exit code 0: done; 2: wrong flag; 130: Ctrl-C.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from tqdm import tqdm

from experiments.common.figures import Artifact, write_artifact
from experiments.common.flags import (
    COUNT,
    GIVEN,
    POSITIVE_COUNT,
    check_flags,
    chosen_names,
    command_line,
    flag,
    parse_numbers,
    run_program,
)
from experiments.common.plots import (
    FAMILY_STYLES,
    family_legend,
    finish_axes,
    new_figure,
)
from experiments.common.results import environment_fields, prepare_output
from experiments.common.tables import Column, Record, aligned_table, fixed
from kashin_jax.bases import FAMILIES, Basis, make_basis
from kashin_jax.theory import (
    eigenvector_ratios,
    rate_from_constant,
    search_worst_case,
    structured_starts,
    trace_greedy,
)

__all__ = [
    "COLUMNS",
    "SEEDS",
    "SIZES",
    "STARTS",
    "STEPS",
    "STEPS_OF_RATE",
    "Table1Config",
    "draw",
    "main",
    "measure_row",
    "run",
    "table1",
]

# At .603 per step 16 steps end at 3e-4, far above the rounding of float32.
STEPS_OF_RATE = 16
_EIGENVECTOR_STARTS = 4


class _Measured(NamedTuple):
    """One value per seed."""

    bound: Float[Array, " seeds"]
    gaussian_rate: Float[Array, " seeds"]
    worst_rate: Float[Array, " seeds"]
    slowest_step: Float[Array, " seeds"]


def measure_row(
    key: Key[Array, ""], family: str, n: int, *, seeds: int, starts: int, steps: int
) -> dict[str, Any]:
    """One basis at one size; numbers that depend on the seed are lists of `seeds`.

    Args:
      key: Of bases and vectors; the vectors are the same for every family.
      family: Which basis.
      n: Its size.
      seeds: Bases drawn.
      starts: Of the search, Gaussian ones and e_i + Q e_j, so many of each; also the
        Gaussian vectors whose rate is measured.
      steps: Of each descent.
    """
    start = time.perf_counter()
    bases_key, draws_key = jax.random.split(key)
    bases = [_drawn(k, family, n) for k in jax.random.split(bases_key, seeds)]
    # One that has no arrays is the same for every key.
    different = bases if jax.tree.leaves(bases) else bases[:1]
    parts = [eigenvector_ratios(basis, n) for basis in different]
    parts *= seeds // len(different)
    eigenvectors = [np.resize(p.vectors, (_EIGENVECTOR_STARTS, n)) for p in parts]
    draws = jax.random.normal(draws_key, (seeds, starts, n), jnp.float32)
    measured = _measure(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *bases),
        draws,
        jnp.asarray(np.stack(eigenvectors), jnp.float32),
        steps=steps,
    )
    bounds = np.asarray(measured.bound, np.float64).tolist()
    return {
        "family": family,
        "n": n,
        "seeds": seeds,
        "starts": starts,
        "steps": steps,
        "eigenvector_minimum": [float(p.ratios.min()) for p in parts],
        "eigenvector_mean": [float(p.ratios.mean()) for p in parts],
        "constant_bound": bounds,
        "gamma": [rate_from_constant(min(bound, 1.0)) for bound in bounds],
        "gaussian_rate": measured.gaussian_rate.tolist(),
        "worst_rate": measured.worst_rate.tolist(),
        "slowest_step": measured.slowest_step.tolist(),
        "seconds": time.perf_counter() - start,
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
        trace = jax.vmap(lambda x: trace_greedy(x, basis, steps=STEPS_OF_RATE))
        residuals = trace(jnp.concatenate([worst.x[None], draws])).residuals
        rates = residuals[:, -1] ** jnp.float32(1 / STEPS_OF_RATE)
        slowest = jnp.max(residuals[0, 1:] / residuals[0, :-1])
        return _Measured(worst.ratio, jnp.mean(rates[1:]), rates[0], slowest)

    return jax.vmap(of_seed)(bases, draws, eigenvectors)


SIZES = (64, 256, 512)
SEEDS = 3
STARTS = 8
STEPS = 400

_GAUSSIAN = (2 / np.pi) ** 0.5


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table1Config:
    """A table; meanings are in the flags.

    Raises:
      UsageError: If a value cannot work; the message names the flag.
    """

    sizes: tuple[str, ...] = flag(
        tuple(map(str, SIZES)), "Lengths N of the vectors, 2 to 4096.", GIVEN
    )
    bases: tuple[str, ...] = flag(
        ("all",), f"all, or a list of: {', '.join(FAMILIES)}.", GIVEN
    )
    seeds: int = flag(SEEDS, "Bases drawn per family and size.", POSITIVE_COUNT)
    starts: int = flag(
        STARTS, "Starts of the search: so many Gaussian ones, and so many e_i + Q e_j.",
        POSITIVE_COUNT,
    )  # fmt: skip
    steps: int = flag(STEPS, "Steps of each descent.", COUNT)
    seed: int = flag(
        0,
        "Seed of bases and vectors.",
        (lambda x: 0 <= x < 2**31, "in [0, 2147483647]"),
    )
    out: str = flag("runs", "Directory of the results.", GIVEN)

    def __post_init__(self) -> None:
        check_flags(self)
        parse_numbers("sizes", self.sizes, 2, 4096)
        chosen_names("bases", self.bases, FAMILIES)


def run(config: Table1Config) -> int:
    """Makes, prints and writes the table; returns the exit code.

    Raises:
      UsageError: If the output cannot be written.
    """
    out = prepare_output(config.out)
    try:
        # TF32 would add an error of its own on a GPU.
        with jax.default_matmul_precision("highest"):
            table = table1(
                jax.random.key(config.seed),
                families=list(chosen_names("bases", config.bases, FAMILIES)),
                sizes=parse_numbers("sizes", config.sizes, 2, 4096),
                seeds=config.seeds,
                starts=config.starts,
                steps=config.steps,
            )
    except KeyboardInterrupt:
        print("table1: interrupted; nothing was written.", file=sys.stderr)
        return 130
    print("\n".join(table.facts) + "\n\n" + aligned_table(table.records, table.columns))
    command = command_line("table1", config, always=())
    written = write_artifact(table, out, "table1", command, seed=config.seed)
    print(f"\nWritten: {', '.join(map(str, written))}")
    return 0


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_program("table1", __doc__, Table1Config, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
