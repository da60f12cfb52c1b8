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
.svg. `python -m experiments.paper --only=table1` makes the same at the default flags.

Exit code 0: done; 2: wrong flag; 130: Ctrl-C.
"""

import dataclasses
import sys

import jax

from experiments.common.figures import write_artifact
from experiments.common.flag_values import chosen_names, command_line, parse_numbers
from experiments.common.flags import (
    COUNT,
    GIVEN,
    POSITIVE_COUNT,
    check_flags,
    flag,
    run_program,
)
from experiments.common.results import prepare_output
from experiments.common.tables import aligned_table
from experiments.paper.table1_ratios import SEEDS, SIZES, STARTS, STEPS, table1
from kashin_jax.bases import FAMILIES

__all__ = ["Table1Config", "main", "run"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table1Config:
    """A table; meanings are in the flags.

    Raises:
      UsageError: If a value cannot work; the message names the flag.
    """

    sizes: tuple[str, ...] = flag(tuple(map(str, SIZES)), "N, 2 to 4096.", GIVEN)
    bases: tuple[str, ...] = flag(
        ("all",), f"all, or a list of: {', '.join(FAMILIES)}.", GIVEN
    )
    seeds: int = flag(SEEDS, "Bases drawn per family and size.", POSITIVE_COUNT)
    starts: int = flag(
        STARTS, "Of the search, Gaussian ones and e_i + Q e_j, so many of each.",
        POSITIVE_COUNT,
    )  # fmt: skip
    steps: int = flag(STEPS, "Of each descent.", COUNT)
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
                jax.random.key(0),
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
    written = write_artifact(table, out, "table1", command, seed=0)
    print(f"\nWritten: {', '.join(map(str, written))}")
    return 0


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_program("table1", __doc__, Table1Config, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
