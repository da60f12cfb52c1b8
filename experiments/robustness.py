"""Robustness of the matrix form: every matrix family in every family of bases.

    python -m experiments.robustness
    python -m experiments.robustness --size=64 --bases=haar,dct --families=comb,sparse

For every pair of families and every seed a matrix and a pair of bases are drawn and the
matrix is decomposed greedily. One compiled sweep for each family of bases. There is a
record for each pair, with steps, residual, verdict, levels of both factors and
convergence rates of all seeds, their mean and standard deviation. `worst-rank-one` is
e_i (Q2 e_j)^T, made for the bases at hand. It adds to
robustness.jsonl in `--out`, and writes robustness.md and robustness.png.

Exit code 0: done; 1: a file or its content is unusable; 2: wrong flag; 130: Ctrl-C.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from tqdm import tqdm

from experiments.common.flags import (
    ALL,
    GIVEN,
    POSITIVE,
    POSITIVE_COUNT,
    check_flags,
    chosen_names,
    command_line,
    flag,
    run_program,
)
from experiments.common.results import (
    atomic_path,
    environment_fields,
    prepare_output,
    write_results,
)
from experiments.common.seeds import spread_fields
from experiments.common.tables import (
    Column,
    Record,
    aligned_table,
    fixed,
    markdown_table,
)
from experiments.convergence.heat_map import draw_heat_map, one_decimal
from experiments.convergence.matrices import MATRICES, MAX_SIZE, draw_matrices
from experiments.convergence.sweep import Convergence, stack_bases, sweep
from kashin_jax.bases import FAMILIES
from kashin_jax.theory import rank_one_counter_example

__all__ = ["WORST", "RobustnessConfig", "main", "measure", "run", "table"]

WORST = "worst-rank-one"
"""Depends on the bases, so it is no family of `MATRICES`."""

MATRIX_NAMES = (*MATRICES, WORST)
# Below it rounding decides, and an exact decomposition has no logarithm.
FLOOR = 1e-7


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobustnessConfig:
    """A sweep; meanings are in the flags.

    Raises:
      UsageError: If a value cannot work; the message names the flag.
    """

    size: int = flag(
        128, "Side of the matrices.",
        (lambda n: 8 <= n <= MAX_SIZE, f"in [8, {MAX_SIZE}]"),
    )  # fmt: skip
    seeds: int = flag(8, "Matrices and bases drawn per family.", POSITIVE_COUNT)
    steps: int = flag(100, "Greedy steps allowed.", (lambda x: x >= 2, "at least 2"))
    rtol: float = flag(1e-6, "Relative tolerance, as a ratio of norms.", POSITIVE)
    bases: tuple[str, ...] = flag(
        ALL, f"all, or a list of: {', '.join(FAMILIES)}.", GIVEN
    )
    families: tuple[str, ...] = flag(
        ALL, f"Of matrices: all, or a list of: {', '.join(MATRIX_NAMES)}.", GIVEN
    )
    out: str = flag("runs", "Directory of the results.", GIVEN)

    def __post_init__(self) -> None:
        check_flags(self)
        chosen_names("bases", self.bases, FAMILIES)
        chosen_names("families", self.families, MATRIX_NAMES)


def run(config: RobustnessConfig) -> int:
    """Measures, prints and writes; returns the exit code.

    Raises:
      UsageError: If the output cannot be written.
      CheckpointError: If an embedded model is missing or damaged.
    """
    out = prepare_output(config.out)
    start = time.perf_counter()
    try:
        # TF32 would add an error of its own on a GPU.
        with jax.default_matmul_precision("highest"):
            records = measure(config)
    except KeyboardInterrupt:
        print("robustness: interrupted; nothing was written.", file=sys.stderr)
        return 130
    _present(config, records, time.perf_counter() - start, out)
    return 0


def measure(config: RobustnessConfig) -> list[dict[str, Any]]:
    """A record for every matrix family and basis family."""
    names = chosen_names("families", config.families, MATRIX_NAMES)
    bases_key, matrices_key = jax.random.split(jax.random.key(0))
    keys = jax.random.split(bases_key, config.seeds)
    drawn = tuple(name for name in names if name != WORST)
    matrices = draw_matrices(
        drawn, jax.random.split(matrices_key, config.seeds), config.size
    )
    records = []
    families = chosen_names("bases", config.bases, FAMILIES)
    for basis in tqdm(families, unit="basis", disable=None, leave=False):
        start = time.perf_counter()
        measured = _sweep_family(config, basis, keys, matrices, WORST in names)
        seconds = time.perf_counter() - start
        for index, matrix in enumerate(names):
            own = jax.tree.map(lambda leaf, i=index: leaf[:, i], measured)
            records.append(_record(config, matrix, basis, own, seconds))
    return records


def _sweep_family(
    config: RobustnessConfig,
    basis: str,
    keys: Key[Array, " s"],
    matrices: Float[Array, "s f n n"],
    has_worst: bool,
) -> Convergence:
    n = config.size
    bases = stack_bases(basis, keys, (n, n))
    if has_worst:
        worst = jax.vmap(
            partial(rank_one_counter_example, shape=(n, n), i=n // 3, j=n // 2),
            axis_size=config.seeds,
        )(bases)
        matrices = jnp.concatenate([matrices, worst[:, None]], axis=1)
    found = sweep(bases, matrices, rtol=config.rtol, max_steps=config.steps)
    return jax.device_get(found)


def _record(
    config: RobustnessConfig, matrix: str, basis: str, own: Convergence, seconds: float
) -> dict[str, Any]:
    return {
        "matrix": matrix,
        "basis": basis,
        "size": config.size,
        "seeds": config.seeds,
        "max_steps": config.steps,
        "rtol": config.rtol,
        "converged_share": float(np.mean(own.converged)),
        **spread_fields("steps", own.steps),
        **spread_fields("residual", own.residual),
        **spread_fields("log10_residual", np.log10(np.maximum(own.residual, FLOOR))),
        **spread_fields("rate", own.rate),
        **spread_fields("tail_rate", own.tail_rate),
        **spread_fields("u_level", own.u_level),
        **spread_fields("v_level", own.v_level),
        **spread_fields("level", np.maximum(own.u_level, own.v_level)),
        "sweep_seconds": seconds,
        **environment_fields(),
    }


class _Table(NamedTuple):
    heading: str
    show: Callable[[float], str]


_TABLES = {
    "log10_residual_mean": _Table("Log10 of the relative residual", one_decimal),
    "steps_mean": _Table("Greedy steps", fixed(0)),
    "converged_share": _Table("Share of seeds that converged", fixed(2)),
    "level_mean": _Table("Larger of the two levels, sqrt(N) |u|_inf / |x|_2", fixed(1)),
    "tail_rate_mean": _Table("Factor of the residual per step, later half", fixed(3)),
}


def table(
    records: Sequence[Record], field: str
) -> tuple[list[dict[str, Any]], list[Column]]:
    """Rows and columns of one field: families of matrices against those of bases."""
    show = _TABLES[field].show
    bases = dict.fromkeys(record["basis"] for record in records)
    columns = [Column("matrix", "matrix"), *(Column(b, b, show) for b in bases)]
    return _pivoted(records, field), columns


def _pivoted(records: Sequence[Record], field: str) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for record in records:
        row = rows.setdefault(record["matrix"], {"matrix": record["matrix"]})
        row[record["basis"]] = record[field]
    return list(rows.values())


def _present(
    config: RobustnessConfig, records: Sequence[Record], seconds: float, out: Path
) -> None:
    facts = _facts(config, records, seconds)
    field, *others = _TABLES
    heading, (rows, columns) = _TABLES[field].heading, table(records, field)
    shown = aligned_table(rows, columns)
    print("\n".join(facts) + f"\n\n{heading}, mean over seeds\n\n{shown}")
    appendix = [
        f"## {_TABLES[other].heading}, mean over seeds\n\n"
        + markdown_table(*table(records, other))
        for other in others
    ]
    written = write_results(
        out, "robustness", records, columns, title="Robustness of the matrix form",
        facts=[*facts, f"First table: {heading[0].lower()}{heading[1:]}."],
        rows=rows, appendix="\n\n".join(appendix),
        command=command_line("robustness", config, always=()),
    )  # fmt: skip
    picture = out / "robustness.png"
    title = (
        f"{config.size} x {config.size} matrices, at most {config.steps} steps to "
        f"{config.rtol:g}, mean of {config.seeds} seeds"
    )
    with atomic_path(picture) as temporary:
        draw_heat_map(records, title).savefig(temporary)
    print(f"\nWritten: {written.jsonl}, {written.markdown}, {picture}")


def _facts(
    config: RobustnessConfig, records: Sequence[Record], seconds: float
) -> list[str]:
    first = records[0]
    stuck = sum(record["converged_share"] < 1 for record in records)
    return [
        f"{config.size} x {config.size}, {config.seeds} seeds, at most {config.steps} "
        f"steps to a relative residual of {config.rtol:g}.",
        f"{stuck} of {len(records)} cells have a seed that did not converge.",
        f"{WORST}: e_i (Q2 e_j)^T, made for the bases of the cell. Residuals below "
        f"{FLOOR:g} count as that.",
        f"{seconds:.0f} s with compilation; {first['device']}, jax "
        f"{first['jax_version']}, kashin_jax {first['kashin_jax_version']}.",
    ]


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_program("robustness", __doc__, RobustnessConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
