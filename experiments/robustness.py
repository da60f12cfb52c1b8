"""Robustness of the matrix form: every matrix family in every family of bases.

    python -m experiments.robustness
    python -m experiments.robustness --size=64 --bases=haar,dct --families=comb,sparse

For every pair of families and every seed a matrix and a pair of bases are drawn and the
matrix is decomposed greedily. One compiled sweep for each family of bases. There is a
record for each pair, with steps, residual, verdict, levels of both factors and
convergence rates of all seeds, their mean and standard deviation. `worst-rank-one` is
e_i (Q2 e_j)^T, made for the bases at hand, and hard for them; the other families depend
on a key and a size alone, and have entries of unit root-mean-square. It adds to
robustness.jsonl in `--out`, and writes robustness.md and robustness.png.

Exit code 0: done; 1: a file or its content is unusable; 2: wrong flag; 130: Ctrl-C.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key
from tqdm import tqdm

from experiments.common.checkpoints import EMBEDDED, model_kernels
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
from experiments.common.plots import new_figure, save_picture
from experiments.common.results import environment_fields, prepare_output, write_results
from experiments.common.seeds import spread_fields, stack_bases
from experiments.common.tables import (
    Column,
    Record,
    aligned_table,
    fixed,
    markdown_table,
)
from kashin_jax import kashin_decompose
from kashin_jax.bases import FAMILIES
from kashin_jax.decomposition import Frame, at_unit_rms, peak_and_rms
from kashin_jax.pipeline import path_key
from kashin_jax.theory import rank_one_counter_example

__all__ = [
    "MATRICES",
    "MAX_SIZE",
    "WORST",
    "Convergence",
    "RobustnessConfig",
    "convergence_of",
    "draw_heat_map",
    "draw_matrices",
    "draw_matrix",
    "low_rank",
    "main",
    "measure",
    "one_decimal",
    "run",
    "sweep",
    "table",
]

MAX_SIZE = 384
"""The shorter side of the smallest layer of the embedded models."""

OUTLIER_COLUMNS, COLUMN_FACTOR = 4, 30.0
OUTLIER_ENTRIES, ENTRY_FACTOR = 1 / 200, 100.0
NONZERO_ENTRIES = 0.02

Draw = Callable[[Key[Array, ""], int], Float[Array, "n n"]]


def _gaussian(key: Key[Array, ""], n: int) -> Float[Array, "n n"]:
    return jax.random.normal(key, (n, n), jnp.float32)


def _student_t3(key: Key[Array, ""], n: int) -> Float[Array, "n n"]:
    return jax.random.t(key, jnp.float32(3), (n, n), jnp.float32)


def _outlier_columns(key: Key[Array, ""], n: int) -> Float[Array, "n n"]:
    body_key, place_key = jax.random.split(key)
    is_outlier = jax.random.permutation(place_key, n) < OUTLIER_COLUMNS
    gain = jnp.where(is_outlier, COLUMN_FACTOR, 1.0).astype(jnp.float32)
    return _gaussian(body_key, n) * gain[None, :]


def _scattered_outliers(key: Key[Array, ""], n: int) -> Float[Array, "n n"]:
    body_key, place_key = jax.random.split(key)
    gain = jnp.where(_places(place_key, n, OUTLIER_ENTRIES), ENTRY_FACTOR, 1.0)
    return _gaussian(body_key, n) * gain.astype(jnp.float32)


def _diagonal(key: Key[Array, ""], n: int) -> Float[Array, "n n"]:
    return jnp.diag(jax.random.normal(key, (n,), jnp.float32))


def _sparse(key: Key[Array, ""], n: int) -> Float[Array, "n n"]:
    body_key, place_key = jax.random.split(key)
    x = _gaussian(body_key, n)
    return jnp.where(_places(place_key, n, NONZERO_ENTRIES), x, jnp.zeros_like(x))


def _places(key: Key[Array, ""], n: int, share: float) -> Array:
    """Exactly so large a share of the entries, at least one."""
    order = jax.random.permutation(key, n * n).reshape(n, n)
    return order < max(1, round(share * n * n))


def low_rank(key: Key[Array, ""], n: int, rank: int) -> Float[Array, "n n"]:
    """A product of two Gaussian matrices."""
    left_key, right_key = jax.random.split(key)
    left = jax.random.normal(left_key, (n, rank), jnp.float32)
    right = jax.random.normal(right_key, (rank, n), jnp.float32)
    return jnp.matmul(left, right, precision="highest")


def _sixteenth_rank(key: Key[Array, ""], n: int) -> Float[Array, "n n"]:
    return low_rank(key, n, max(1, n // 16))


@partial(jax.jit, static_argnames=("n", "condition"))
def _conditioned(key: Key[Array, ""], n: int, condition: float) -> Float[Array, "n n"]:
    """Haar singular vectors, singular values evenly spaced in their logarithms.

    Singular values below 1e-7 of the largest drown in the rounding of float32.
    """
    left_key, right_key = jax.random.split(key)
    values = jnp.asarray(np.geomspace(1, 1 / condition, n), jnp.float32)
    left = jax.random.orthogonal(left_key, n, dtype=jnp.float32)
    right = jax.random.orthogonal(right_key, n, dtype=jnp.float32)
    return jnp.matmul(left * values[None, :], right, precision="highest")


def _constant(key: Key[Array, ""], n: int) -> Float[Array, "n n"]:
    return jnp.ones((n, n), jnp.float32)


def _constant_rows(key: Key[Array, ""], n: int) -> Float[Array, "n n"]:
    """A Gaussian number for every row."""
    return jnp.repeat(jax.random.normal(key, (n, 1), jnp.float32), n, axis=1)


def _hadamard(key: Key[Array, ""], n: int) -> Float[Array, "n n"]:
    """Rows of Sylvester's matrix in random order, cut to size; all entries +-1."""
    return jax.random.permutation(key, _sylvester(n), axis=0)[:n, :n]


def _hadamard_row(key: Key[Array, ""], n: int) -> Float[Array, "n n"]:
    """A Gaussian column times a row of Sylvester's matrix other than the first."""
    column_key, row_key = jax.random.split(key)
    row = _sylvester(n)[jax.random.randint(row_key, (), min(1, n - 1), n), :n]
    return jnp.outer(jax.random.normal(column_key, (n,), jnp.float32), row)


def _comb(key: Key[Array, ""], n: int) -> Float[Array, "n n"]:
    """An outer product of two combs with teeth about sqrt(n) apart.

    Sylvester's matrix turns combs into combs: as sparse on both sides as can be.
    """
    period = 2 ** ((n - 1).bit_length() // 2)
    phases = jax.random.randint(key, (2,), 0, period)
    teeth = (jnp.arange(n)[None, :] % period == phases[:, None]).astype(jnp.float32)
    return jnp.outer(teeth[0], teeth[1])


def _sylvester(n: int) -> Float[Array, "p p"]:
    return jax.scipy.linalg.hadamard(2 ** (n - 1).bit_length(), dtype=jnp.float32)


def _layer_block(key: Key[Array, ""], n: int, model: str) -> Float[Array, "n n"]:
    """A block of any place of any layer of an embedded model; not for `jit`."""
    kernels = [k for k in model_kernels(EMBEDDED[model]).values() if min(k.shape) >= n]
    layer_key, row_key, column_key = jax.random.split(key, 3)
    kernel = kernels[int(jax.random.randint(layer_key, (), 0, len(kernels)))]
    row = jax.random.randint(row_key, (), 0, kernel.shape[0] - n + 1)
    column = jax.random.randint(column_key, (), 0, kernel.shape[1] - n + 1)
    return jax.lax.dynamic_slice(kernel, (row, column), (n, n))


MATRICES: Mapping[str, Draw] = MappingProxyType(
    {
        "gaussian": _gaussian,
        "student-t3": _student_t3,
        "outlier-columns": _outlier_columns,
        "scattered-outliers": _scattered_outliers,
        "diagonal": _diagonal,
        "sparse": _sparse,
        "low-rank": _sixteenth_rank,
        "rank-one": partial(low_rank, rank=1),
        "condition-1e2": partial(_conditioned, condition=1e2),
        "condition-1e4": partial(_conditioned, condition=1e4),
        "condition-1e8": partial(_conditioned, condition=1e8),
        "constant": _constant,
        "constant-rows": _constant_rows,
        "hadamard": _hadamard,
        "hadamard-row": _hadamard_row,
        "comb": _comb,
        "opt-layer": partial(_layer_block, model="opt"),
        "minilm-layer": partial(_layer_block, model="minilm"),
    }
)
"""To add a family, write a function of key and size and one line here."""


def draw_matrix(family: str, key: Key[Array, ""], n: int) -> Float[Array, "n n"]:
    """One matrix of a family, at unit root-mean-square.

    Args:
      family: A name of `MATRICES`.
      key: Root key; each family has a key of its own, folded from its name.
      n: Side, `MAX_SIZE` at the most for blocks of layers.

    Raises:
      ValueError: If the family is unknown or the side cannot be had.
    """
    if family not in MATRICES:
        raise ValueError(
            f"Unknown matrix family `{family}`. Choose from {', '.join(MATRICES)}."
        )
    if not 1 <= n <= MAX_SIZE:
        raise ValueError(f"`n` must lie in [1, {MAX_SIZE}]. Got n={n}.")
    x = MATRICES[family](path_key(key, family), n)
    return at_unit_rms(x, *peak_and_rms(x))


def draw_matrices(
    families: tuple[str, ...], keys: Key[Array, " s"], n: int
) -> Float[Array, "s f n n"]:
    """A matrix of every family for every key."""
    drawn = [[draw_matrix(family, key, n) for family in families] for key in keys]
    return jnp.stack([jnp.stack(row) for row in drawn])


class Convergence(NamedTuple):
    """How decompositions went; in a sweep every leaf has the axes seed and matrix.

    Attributes:
      steps: Greedy steps taken.
      residual: Relative to the matrix, of the returned factors.
      converged: Whether the residual is within the tolerance.
      u_level: `sqrt(N) |u|_inf / |x|_2`.
      v_level: `sqrt(N) |v|_inf / |x|_2`; v in the coordinates of the basis.
      rate: Geometric mean of the factors by which steps multiply the residual.
      tail_rate: The same over the later half of the steps allowed; NaN for a
        decomposition that was done before.
    """

    steps: Int[Array, "*b"]
    residual: Float[Array, "*b"]
    converged: Bool[Array, "*b"]
    u_level: Float[Array, "*b"]
    v_level: Float[Array, "*b"]
    rate: Float[Array, "*b"]
    tail_rate: Float[Array, "*b"]


def convergence_of(
    x: Float[Array, "m n"], basis: Frame, *, rtol: float, max_steps: int
) -> Convergence:
    """One matrix in one pair of bases, by `kashin_decompose`.

    The tail is seen by a second, shorter run: the algorithm is deterministic, so it is
    the first half of the long one.

    Raises:
      ValueError: If `rtol <= 0` or `max_steps < 2`. Checked while tracing.
    """
    if max_steps < 2:
        raise ValueError(f"`max_steps` must be at least 2. Got {max_steps}.")
    end = kashin_decompose(x, basis, rtol=rtol, max_steps=max_steps)
    half = kashin_decompose(x, basis, rtol=rtol, max_steps=max_steps // 2)
    tail = _rate(end.residual / half.residual, end.num_steps - half.num_steps)
    return Convergence(
        steps=end.num_steps,
        residual=end.residual,
        converged=end.converged,
        u_level=jnp.max(jnp.abs(end.u)),
        v_level=jnp.max(jnp.abs(end.v)),
        rate=_rate(end.residual, end.num_steps),
        tail_rate=jnp.where(half.converged, jnp.float32(jnp.nan), tail),
    )


def _rate(factor: Float[Array, ""], steps: Int[Array, ""]) -> Float[Array, ""]:
    return factor ** (1 / jnp.maximum(steps, 1).astype(jnp.float32))


@partial(jax.jit, static_argnames=("rtol", "max_steps"))
def sweep(
    bases: Any, matrices: Float[Array, "s f m n"], *, rtol: float, max_steps: int
) -> Convergence:
    """Every matrix of a seed in the bases of that seed: one program for a family.

    Seeds are a `vmap`, matrices a `map` around it: one slow matrix family then holds up
    its own seeds alone, and the buffers stay in the cache. With 18 x 8 matrices of
    128 x 128 that took 4 s where a `vmap` over both took 14 s (haar), 24 s where it
    took 41 s (butterfly3).

    Args:
      bases: As made by `stack_bases`, one pair for each seed.
      matrices: By seed and matrix family.
      rtol: Relative tolerance.
      max_steps: Greedy steps allowed. The slowest seed decides how many are computed.

    Raises:
      ValueError: If `rtol <= 0` or `max_steps < 2`. Checked while tracing.
    """
    run = partial(convergence_of, rtol=rtol, max_steps=max_steps)
    over_seeds = jax.vmap(run)
    by_matrix = jax.lax.map(
        lambda x: over_seeds(x, bases), jnp.swapaxes(matrices, 0, 1)
    )
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), by_matrix)


# Light is good, dark is bad; told apart by all common kinds of colour vision.
_COLOURS = "viridis_r"
_DARK_FROM = 0.5
_CLIPPED = "log10_residual_mean"


def one_decimal(value: float) -> str:
    """Shows -0.04 as 0.0."""
    return f"{round(value, 1) + 0:.1f}"


class _Panel(NamedTuple):
    field: str
    title: str
    text: Callable[[float], str]


_PANELS = (
    _Panel(_CLIPPED, "log10 of the relative residual", one_decimal),
    _Panel("steps_mean", "greedy steps taken", "{:.0f}".format),
)


def draw_heat_map(records: Sequence[Record], title: str) -> Any:
    """A panel for the residual and one for the steps; every cell has its number."""
    matrices = list(dict.fromkeys(record["matrix"] for record in records))
    bases = list(dict.fromkeys(record["basis"] for record in records))
    width, height = 1.9 + 0.88 * len(bases), 1.8 + 0.24 * len(matrices)
    figure = new_figure(width, height)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, panel in zip(panels, _PANELS, strict=True):
        cells = {(r["matrix"], r["basis"]): r[panel.field] for r in records}
        grid = np.array([[cells[m, b] for b in bases] for m in matrices])
        image = axes.imshow(grid, cmap=_COLOURS, aspect="auto")
        if panel.field == _CLIPPED:
            # What is within the tolerance is all one colour.
            image.set_clim(vmin=np.log10(records[0]["rtol"]))
        _write_cells(axes, image, grid, panel.text)
        axes.set_xticks(range(len(bases)), bases, rotation=45, ha="right", fontsize=9)
        axes.set_title(panel.title, loc="left", fontsize=10)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        figure.colorbar(image, ax=axes, shrink=0.6, pad=0.02).ax.tick_params(
            labelsize=8
        )
    panels[0].set_yticks(range(len(matrices)), matrices, fontsize=9)
    panels[0].set_ylabel("matrix family")
    figure.supxlabel("basis family", fontsize=10)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure


def _write_cells(
    axes: Any, image: Any, grid: np.ndarray, text: Callable[[float], str]
) -> None:
    shades = image.norm(grid)
    for (row, column), value in np.ndenumerate(grid):
        axes.text(
            column, row, text(value), ha="center", va="center", fontsize=8,
            color="white" if shades[row, column] > _DARK_FROM else "black",
        )  # fmt: skip


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
        ALL, f"Kinds of matrices: all, or a list of: {', '.join(MATRIX_NAMES)}.", GIVEN
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
    save_picture(draw_heat_map(records, title), picture, bbox_inches=None)
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
