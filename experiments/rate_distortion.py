"""Weight error against stored bits, for every method, beside the Shannon curve.

    python -m experiments.rate_distortion --bits=2,3,4
    python -m experiments.rate_distortion --source=student_t3 --effort=fast,default,max
    python -m experiments.rate_distortion --source=model.safetensors --methods=all

A source is one random matrix of variance 1 (gaussian, student_t3, or outlier_columns:
Gaussian, one output in 256 being 30 times as strong), or a safetensors file in torch's
order, of which every floating matrix with sides of at least 64 is quantized. No model
runs. kashin-joint has a row per effort, without the `unshrink` that trades error for
perplexity. It prints one row per method and width, adds them to
rate_distortion.jsonl in `--out`, and writes rate_distortion.md and .png.

Exit code 0: done; 1: a file or its content is unusable; 2: wrong flag; 130: Ctrl-C.
"""

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.common.flags import (
    GIVEN,
    Allowed,
    check_flags,
    command_line,
    flag,
    flag_text,
    parse_widths,
    run_program,
)
from experiments.common.methods import JOINT, METHODS, choose_methods
from experiments.common.results import prepare_output, write_results
from experiments.common.tables import Column, Record, aligned_table, fixed, increase
from experiments.rate_distortion_plot import plot_rate_distortion
from experiments.rate_distortion_rows import rate_row, won_matrices
from experiments.weight_sources import (
    MIN_SIDE,
    ROWS,
    SYNTHETIC,
    WeightSource,
    load_source,
)
from kashin_jax.errors import UsageError
from kashin_jax.methods.joint.coder import EFFORTS

__all__ = ["COLUMNS", "RateDistortionConfig", "main", "run"]

# The authors' variant differs in what a model does with layers that did not converge.
RATE_METHODS = tuple(name for name in METHODS if name != "kashin-authors")

_MIN_WEIGHTS = ROWS * MIN_SIDE
_SUFFIX = ".safetensors"
_SOURCE: Allowed = (
    lambda x: x in SYNTHETIC or x.endswith(_SUFFIX),
    f"one of {', '.join(SYNTHETIC)}, or a file *{_SUFFIX}",
)
_WEIGHTS: Allowed = (
    lambda x: x >= _MIN_WEIGHTS and x % ROWS == 0,
    f"a multiple of {ROWS} and at least {_MIN_WEIGHTS}",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RateDistortionConfig:
    """A table; meanings are in the flags.

    Raises:
      UsageError: If a value cannot work; the message names the flag.
    """

    bits: tuple[str, ...] = flag(("2", "3", "4"), "Code widths, 1 to 8.", GIVEN)
    methods: tuple[str, ...] = flag(
        ("all",), f"all, or a list of: {', '.join(RATE_METHODS)}."
    )
    source: str = flag(
        "gaussian", f"One of {', '.join(SYNTHETIC)}, or FILE{_SUFFIX}.", _SOURCE
    )
    effort: tuple[str, ...] = flag(
        ("default",), f"Of kashin-joint, a row for each: {', '.join(EFFORTS)}.",
        (lambda x: x and set(x) <= set(EFFORTS), f"a list of {', '.join(EFFORTS)}"),
    )  # fmt: skip
    weights: int = flag(
        2**20, f"Entries of a synthetic source, a multiple of {ROWS}.", _WEIGHTS
    )
    seed: int = flag(
        0, "Of a synthetic source and of the random methods.",
        (lambda x: 0 <= x < 2**31, "in [0, 2147483647]"),
    )  # fmt: skip
    out: str = flag("runs", "Directory of the results.", GIVEN)

    def __post_init__(self) -> None:
        check_flags(self)
        parse_widths("bits", self.bits, 1, 8)
        chosen = choose_methods(self.methods, RATE_METHODS)
        if not chosen or not chosen.keys() <= set(RATE_METHODS):
            raise UsageError(
                f"`--methods` must be all or a list of: {', '.join(RATE_METHODS)}. "
                f"Got {flag_text(self.methods)!r}."
            )


def run(config: RateDistortionConfig) -> int:
    """Makes, prints and writes the table; returns the exit code.

    Raises:
      UsageError: If the output cannot be written.
      CheckpointError: If the file is missing or damaged.
      DataError: If it has no matrix to quantize.
      NonFiniteError: If one of them holds NaN or infinity.
    """
    out = prepare_output(config.out)
    source = load_source(config.source, size=config.weights, seed=config.seed)
    try:
        # TF32 would add an error of its own on a GPU.
        with jax.default_matmul_precision("highest"):
            records = _records(config, source)
    except KeyboardInterrupt:
        print("rate_distortion: interrupted; nothing was written.", file=sys.stderr)
        return 130
    _present(config, source, records, out)
    return 0


def _records(
    config: RateDistortionConfig, source: WeightSource
) -> list[dict[str, Any]]:
    records = []
    methods = choose_methods(config.methods, RATE_METHODS)
    for bits, (name, method) in itertools.product(
        parse_widths("bits", config.bits, 1, 8), methods.items()
    ):
        for effort in config.effort if name == JOINT else [None]:
            row = rate_row(source, name, method, bits, seed=config.seed, effort=effort)
            records.append(row)
            error = row["relative_error"]
            value = "-" if error is None else f"{error:.5f}"
            print(f"{name}, {bits} bits: {value}", file=sys.stderr)
    return records


COLUMNS = (
    Column("method", "method"),
    Column("bits", "bits"),
    Column("effort", "effort", lambda effort: effort or "-"),
    Column("stored_bits_per_weight", "bits/weight", fixed(3)),
    Column("mse", "mse", "{:.4g}".format),
    Column("relative_error", "rel. sq. error", fixed(5)),
    Column("shannon", "Shannon", fixed(5)),
    Column("gap_db", "gap, dB", increase),
    Column("seconds", "seconds", fixed(1)),
    Column("weights_per_second", "weights/s", "{:,.0f}".format),
)


def _present(
    config: RateDistortionConfig,
    source: WeightSource,
    records: Sequence[Record],
    out: Path,
) -> None:
    first, count = records[0], len(source.matrices)
    facts = [
        f"Source {source.name}, {source.size:,} weights in {count} "
        f"{'matrix' if count == 1 else 'matrices'}; seed {config.seed}.",
        "Shannon: least relative error of a Gaussian source at the stored bits, "
        "4^-bits. Other sources of equal variance are easier, and codes may fall below "
        "it. The gap is that of the relative squared error, all matrices together.",
        "Sizes are stored bits: codes, centroids, scales, zero points, seeds. Seconds "
        "of quantization on this device, compilation included.",
        *won_matrices(records),
        f"{first['device']}, jax {first['jax_version']}, kashin_jax "
        f"{first['kashin_jax_version']}.",
    ]
    print("\n".join(facts) + "\n\n" + aligned_table(records, COLUMNS))
    title = f"{source.name}: weight error against stored bits"
    written = write_results(
        out, "rate_distortion", records, COLUMNS, title=title, facts=facts,
        command=command_line("rate_distortion", config, always=("bits",)),
    )  # fmt: skip
    picture = out / "rate_distortion.png"
    plot_rate_distortion(records, picture, title=title)
    print(f"\nWritten: {written.jsonl}, {written.markdown}, {picture}")


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_program("rate_distortion", __doc__, RateDistortionConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
