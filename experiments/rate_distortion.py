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
import hashlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from tqdm import tqdm

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
from experiments.common.methods import (
    JOINT,
    METHODS,
    RowKind,
    choose_methods,
    joint_config,
)
from experiments.common.plots import COLOURS, new_figure, save_picture
from experiments.common.results import environment_fields, prepare_output, write_results
from experiments.common.tables import Column, Record, aligned_table, fixed, increase
from kashin_jax import BasisSpec, quantize, stored_bits
from kashin_jax.errors import CheckpointError, DataError, NonFiniteError, UsageError
from kashin_jax.io import open_safetensors
from kashin_jax.methods import Method
from kashin_jax.methods.joint.coder import EFFORTS
from kashin_jax.methods.quantize import require_finite
from kashin_jax.pipeline import path_key

__all__ = [
    "COLUMNS",
    "MIN_SIDE",
    "ROWS",
    "SYNTHETIC",
    "RateDistortionConfig",
    "WeightSource",
    "load_source",
    "main",
    "plot_rate_distortion",
    "rate_row",
    "run",
    "won_matrices",
]

MIN_SIDE = 64
"""Both sides of a matrix from a file are at least this long."""

ROWS = 1024
"""Inputs of a synthetic matrix."""

_OUTLIER_SHARE = 256
_OUTLIER_FACTOR = 30.0


class WeightSource(NamedTuple):
    """Matrices in Flax's order `[in, out]`, by name, and how to call them all.

    Attributes:
      name: Of all of them.
      matrices: By name.
      sha256: Of the file; None where there is none.
    """

    name: str
    matrices: Mapping[str, Float[np.ndarray, "_ _"]]
    sha256: str | None = None

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(matrix.size for matrix in self.matrices.values())


def load_source(source: str, *, size: int, seed: int) -> WeightSource:
    """The matrices that a source stands for, in float32.

    Args:
      source: A name of `SYNTHETIC`, one matrix whose entries have variance 1, or the
        path of a safetensors file in torch's order `[out, in]`.
      size: Entries of a synthetic matrix, a multiple of `ROWS`.
      seed: Of a synthetic matrix.

    Raises:
      CheckpointError: If the file is missing or damaged.
      DataError: If it has no floating matrix with sides of at least `MIN_SIDE`, or
        nothing but zeros in them.
      NonFiniteError: If one of them holds NaN or infinity; names it.
    """
    if source not in SYNTHETIC:
        return _read(Path(source))
    shape = (ROWS, size // ROWS)
    matrix = SYNTHETIC[source](np.random.default_rng(seed), shape)
    return WeightSource(source, {source: matrix.astype(np.float32)})


def _gaussian(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.standard_normal(shape)


def _student_t3(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    # Three degrees of freedom have variance 3.
    return rng.standard_t(3, shape) / np.sqrt(3)


def _outlier_columns(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """One output in 256, at least one, is 30 times as strong as the others."""
    gain = np.ones(shape[1])
    count = max(1, shape[1] // _OUTLIER_SHARE)
    gain[rng.choice(shape[1], count, replace=False)] = _OUTLIER_FACTOR
    return rng.standard_normal(shape) * gain / np.sqrt(np.mean(gain**2))


_Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]

SYNTHETIC: Mapping[str, _Draw] = {
    "gaussian": _gaussian,
    "student_t3": _student_t3,
    "outlier_columns": _outlier_columns,
}
"""Sources that need no file."""


def _read(path: Path) -> WeightSource:
    if not path.is_file():
        raise CheckpointError(f"{path}: is no file; give `--source` another path.")
    stored = open_safetensors(path)
    tensors = ((name, stored.read(name)) for name in sorted(stored.specs))
    matrices = {name: _kernel(value) for name, value in tensors if _is_usable(value)}
    if not matrices:
        raise DataError(
            f"{path}: has no floating 2-D tensor with sides of at least {MIN_SIDE}; "
            "choose another file."
        )
    for name, matrix in matrices.items():
        require_finite(jnp.asarray(matrix), name)
    if not any(matrix.any() for matrix in matrices.values()):
        raise DataError(f"{path}: its matrices are all zero; choose another file.")
    # The file's own name alone is nearly always `model.safetensors`.
    name = f"{path.resolve().parent.name}/{path.name}"
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return WeightSource(name, matrices, digest)


def _is_usable(value: np.ndarray) -> bool:
    # NumPy itself does not count bfloat16 as floating.
    is_floating = jnp.issubdtype(value.dtype, jnp.floating)
    return is_floating and value.ndim == 2 and min(value.shape) >= MIN_SIDE


def _kernel(value: np.ndarray) -> Float[np.ndarray, "_ _"]:
    # What float32 cannot hold becomes infinite, and is reported as that.
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(value.T, np.float32)


_RTOL = 1e-6
_MAX_STEPS = 200
# Every record has every field, so that a reader of the file needs no special cases.
_ABSENT = dict.fromkeys((
    "stored_bits_per_weight", "mse", "relative_error", "shannon", "gap_db", "seconds",
    "weights_per_second", "matrices",
))  # fmt: skip
# Rivals that store up to this much less are compared at our bits, as if theirs bought
# as much as Shannon allows.
_FEWER_BITS = 0.1


def rate_row(
    source: WeightSource,
    name: str,
    method: RowKind,
    bits: float,
    *,
    seed: int,
    effort: str | None,
) -> dict[str, Any]:
    """One row; a method that does not exist here gives dashes and the reason.

    Args:
      source: What is quantized.
      name: Of the method.
      method: How its configuration is made.
      bits: Code width.
      seed: Of the method.
      effort: Of joint coding; None for other methods.
    """
    row = {
        "method": name, "bits": bits, **_ABSENT, "effort": effort,
        "source": source.name, "source_sha256": source.sha256, "weights": source.size,
        "seed": seed,
        **environment_fields(),
    }  # fmt: skip
    try:
        basis = BasisSpec.parse("hadamard")
        quantizer = method.make(bits, basis, _RTOL, _MAX_STEPS)
        if effort is not None:
            # Weight error is what this table is about.
            joint = joint_config(bits, basis)
            quantizer = dataclasses.replace(joint, effort=effort, unshrink=0.0)
    except ValueError as reason:
        return {**row, "note": str(reason)}
    try:
        measured = _measured(source, quantizer, jax.random.key(seed))
    except NonFiniteError as reason:
        # The source is finite, so it is this method whose scales overflow.
        return {**row, "note": str(reason)}
    return {**row, **measured, "note": method.note}


def _measured(
    source: WeightSource, quantizer: Method, key: Key[Array, ""]
) -> dict[str, Any]:
    stored, lost, energy, seconds = 0, 0.0, 0.0, 0.0
    each: dict[str, float] = {}
    for name, matrix in tqdm(
        source.matrices.items(), unit="matrix", disable=None, leave=False
    ):
        start = time.perf_counter()
        tensor, report = jax.block_until_ready(
            quantize(matrix, quantizer, path_key(key, name), path=name)
        )
        seconds += time.perf_counter() - start
        stored += stored_bits(tensor)
        own = _energy(matrix)
        energy += own
        each[name] = float(report.relative_squared_error)
        lost += own * each[name]
    rate, relative = stored / source.size, lost / energy
    shannon = 4.0**-rate
    return {
        "stored_bits_per_weight": rate,
        "mse": lost / source.size,
        "relative_error": relative,
        "shannon": shannon,
        "gap_db": 10 * math.log10(relative / shannon) if relative else None,
        "seconds": seconds,
        "weights_per_second": source.size / seconds,
        "matrices": each if len(each) > 1 else None,
    }


def _energy(matrix: Float[np.ndarray, "m n"]) -> float:
    return float(np.sum(np.square(matrix, dtype=np.float64)))


def won_matrices(records: Sequence[Record]) -> Iterator[str]:
    """Says on how many matrices the joint coder loses less than each rival.

    Rivals are the rows of the same width. Where one stores fewer bits, by 0.1 at most,
    its error is multiplied by 4^-(difference), which more bits could not better. Rows
    of a single matrix speak for themselves.
    """
    ours = [r for r in records if r["method"] == JOINT and r["matrices"]]
    for our in ours:
        counts = []
        for rival in records:
            if rival["method"] == JOINT or not rival["matrices"]:
                continue
            bits = rival["stored_bits_per_weight"]
            fewer = max(0.0, our["stored_bits_per_weight"] - bits)
            if rival["bits"] != our["bits"] or fewer > _FEWER_BITS:
                continue
            won = sum(
                error < 4.0**-fewer * rival["matrices"][name]
                for name, error in our["matrices"].items()
            )
            at = f"{bits:.2f} bits" + (", error adjusted to ours" if fewer else "")
            counts.append(f"{rival['method']} ({at}) on {won}")
        if counts:
            yield (
                f"{JOINT}, effort {our['effort']}, at "
                f"{our['stored_bits_per_weight']:.2f} stored bits loses less than "
                + ", ".join(counts)
                + f" of {len(our['matrices'])} matrices."
            )


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
        ("default",), f"Efforts of kashin-joint, a row for each: {', '.join(EFFORTS)}.",
        (lambda x: x and set(x) <= set(EFFORTS), f"a list of {', '.join(EFFORTS)}"),
    )  # fmt: skip
    weights: int = flag(
        2**20, f"Entries of a synthetic source, a multiple of {ROWS}.", _WEIGHTS
    )
    seed: int = flag(
        0, "Seed of a synthetic source and of the random methods.",
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


_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h", "<", ">", "d")
# Bits by which the Shannon line goes on beyond the points.
_BEYOND = 0.15


def plot_rate_distortion(records: Sequence[Record], path: Path, *, title: str) -> None:
    """Draws relative error, on a log axis, against stored bits; Shannon as a line.

    Args:
      records: As in the JSON lines; rows of dashes are left out.
      path: A PNG file, replaced in one step.
      title: Above the figure.
    """
    figure = new_figure(7.6, 4.4)
    axes = figure.subplots()
    shown = [r for r in records if r["relative_error"]]
    rates = [r["stored_bits_per_weight"] for r in shown]
    if rates:
        span = np.array([min(rates) - _BEYOND, max(rates) + _BEYOND])
        axes.plot(span, 4.0**-span, color="#404040", lw=1, ls=(0, (5, 3)),
                  label="Shannon, Gaussian source")  # fmt: skip
        _draw_methods(axes, shown)
        axes.legend(
            loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, fontsize=8
        )
    axes.set_yscale("log")
    axes.set_xlabel("stored bits per weight")
    axes.set_ylabel("relative squared error")
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    save_picture(figure, path)


def _draw_methods(axes: Any, records: Sequence[Record]) -> None:
    efforts = {r["effort"] for r in records if r["effort"]}
    series: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        label = record["method"]
        if record["effort"] and len(efforts) > 1:
            label = f"{label}, {record['effort']}"
        point = record["stored_bits_per_weight"], record["relative_error"]
        series.setdefault(label, []).append(point)
    for index, (label, points) in enumerate(series.items()):
        axes.plot(
            *zip(*sorted(points), strict=True), label=label, lw=1, markersize=6,
            color=COLOURS[index % len(COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            markeredgecolor="white", markeredgewidth=0.7,
        )  # fmt: skip


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_program("rate_distortion", __doc__, RateDistortionConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
