"""Structured versus random bases on real layers: quality, size and time.

    python -m experiments.ablate_bases
    python -m experiments.ablate_bases --model=opt --layers=all --bases=haar,hadamard
    python -m experiments.ablate_bases --model=facebook/opt-125m --seeds=8

A loop over families and layers; for each a `vmap` over a stack of bases, one for each
seed, decomposes the layer and quantizes it by the 2024 paper's method (pairs (u, v)
clustered by k-means). It compiles once for a family and a shape. Beside the means and
standard deviations over seeds stand the arithmetic and memory of a basis, and
milliseconds of a greedy step without compilation. It adds to
ablate_bases.jsonl in `--out`, and writes ablate_bases.md and ablate_bases.png.

Exit code 0: done; 1: a file or its content is unusable; 2: wrong flag; 130: Ctrl-C.
"""

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key
from tqdm import tqdm

from experiments.common.checkpoints import EMBEDDED, Kernels, model_kernels
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
    short_model_name,
)
from experiments.common.plots import (
    FAMILY_STYLES,
    family_legend,
    finish_axes,
    new_figure,
    save_picture,
)
from experiments.common.results import environment_fields, prepare_output, write_results
from experiments.common.seeds import spread_fields, stack_bases
from experiments.common.tables import (
    Column,
    Record,
    aligned_table,
    fixed,
    markdown_table,
)
from experiments.common.timing import median_seconds
from kashin_jax import GreedyKashin, KroneckerBasis, kashin_decompose
from kashin_jax.bases import FAMILIES, cost, key_from_seed, seed_from_key
from kashin_jax.errors import UsageError
from kashin_jax.methods.kashin import KashinCode, kashin_code
from kashin_jax.pipeline import path_key

__all__ = [
    "FEW",
    "SUMMARY",
    "Ablation",
    "AblationConfig",
    "SeededBases",
    "ablate",
    "cost_fields",
    "draw_trade_off",
    "main",
    "measure",
    "run",
    "seeded_bases",
    "summary",
]

# Never reached: the number of steps is the same for all bases.
_RTOL = 1e-30
_TIMED_STEPS = 5


class Ablation(NamedTuple):
    """One family on one layer; an entry for each seed.

    Attributes:
      residual: Relative to the layer, after the decomposition.
      steps: Greedy steps taken.
      converged: Whether the residual is within the tolerance.
      u_level: `sqrt(N) |u|_inf / |x|_2`.
      v_level: The same for v, in the coordinates of the basis.
      relative_squared_error: Of the layer decoded from its codes.
    """

    residual: Float[Array, " s"]
    steps: Int[Array, " s"]
    converged: Bool[Array, " s"]
    u_level: Float[Array, " s"]
    v_level: Float[Array, " s"]
    relative_squared_error: Float[Array, " s"]


class SeededBases(NamedTuple):
    """Bases stacked over seeds, and a key for the codebook of each."""

    bases: Any
    codebook_keys: Key[Array, " s"]


def seeded_bases(
    family: str, keys: Key[Array, " s"], shape: tuple[int, int]
) -> SeededBases:
    """The bases and codebook keys that `quantize` takes from each of these keys."""
    halves = jax.vmap(jax.random.split)(keys)
    basis_keys = jax.vmap(lambda key: key_from_seed(seed_from_key(key)))(halves[:, 0])
    return SeededBases(stack_bases(family, basis_keys, shape), halves[:, 1])


def ablate(
    kernel: Float[Array, "m n"], seeded: SeededBases, config: GreedyKashin
) -> Ablation:
    """Decomposes and quantizes one layer in every basis of the stack, by one `vmap`.

    The errors are those that `quantize` reports. As in `quantize` the stages are
    compiled one by one: what depends on the basis once for a family and a shape, the
    clustering once for a size of layer, the same for all families with random parts.

    Args:
      kernel: The layer; must be finite.
      seeded: As made by `seeded_bases`.
      config: The paper's method; its `basis` is not read, `seeded` has the bases.
    """
    shape = (kernel.shape[0], kernel.shape[1])

    def of_seed(basis: KroneckerBasis, key: Key[Array, ""]) -> Ablation:
        code = kashin_code(kernel, basis, key, config, shape)
        return Ablation(
            residual=code.residual[0, 0],
            steps=code.num_steps[0, 0],
            converged=code.converged[0, 0],
            u_level=code.max_u[0, 0],
            v_level=code.max_v[0, 0],
            relative_squared_error=_error_of_code(kernel, basis, code),
        )

    return jax.vmap(of_seed)(*seeded)


@jax.jit
def _error_of_code(
    kernel: Float[Array, "m n"], basis: KroneckerBasis, code: KashinCode
) -> Float[Array, ""]:
    pairs = code.scale[0, 0] * code.centroids[code.codes]
    lost = kernel - pairs[..., 0] - basis.synthesis(pairs[..., 1])
    return jnp.sum(jnp.square(lost)) / jnp.sum(jnp.square(kernel))


def cost_fields(
    family: str, kernel: Float[Array, "m n"], seeded: SeededBases, repeats: int
) -> dict[str, float]:
    """Fields of a record: arithmetic, memory and time of one pair of bases.

    `flops_per_step` counts the one analysis and the one synthesis of a greedy step,
    `basis_bytes` the arrays in memory. On disk every basis is a seed of 8 bytes.

    Args:
      family: Of both bases.
      kernel: The layer.
      seeded: Bases of which the first is timed.
      repeats: Timed calls, of which the median counts; compilation does not.
    """
    m, n = kernel.shape
    left, right = cost(family, m), cost(family, n)
    first = jax.tree.map(lambda leaf: leaf[0], seeded.bases)
    seconds = median_seconds(lambda: _fixed_steps(kernel, first), repeats)
    return {
        "flops_per_step": 2 * (left.flops * n + right.flops * m),
        "basis_bytes": left.parameter_bytes + right.parameter_bytes,
        "stored_basis_bytes": 8,
        "ms_per_step": 1e3 * seconds / _TIMED_STEPS,
    }


@jax.jit
def _fixed_steps(kernel: Float[Array, "m n"], basis: KroneckerBasis) -> Any:
    return kashin_decompose(kernel, basis, rtol=_RTOL, max_steps=_TIMED_STEPS)


FEW = {
    "opt": ("decoder/layers/0/self_attn/q_proj", "decoder/layers/5/self_attn/k_proj"),
    "minilm": ("encoder/layers/0/query", "encoder/layers/5/output"),
}
"""Layers of `--layers=few`: a usual one of each model, and the one with the largest
residual after 100 steps in Hadamard bases."""

KINDS = {"identity": "none", "dct": "fixed", "haar": "random dense"}
_STRUCTURED = "random structured"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """What is compared; meanings are in the flags.

    Raises:
      UsageError: If a value cannot work; the message names the flag.
    """

    model: tuple[str, ...] = flag(
        tuple(EMBEDDED), f"A list of: {', '.join(EMBEDDED)}, directories, hub ids.",
        GIVEN,
    )  # fmt: skip
    layers: tuple[str, ...] = flag(
        ("few",),
        "few (chosen ones of embedded models; of others first, middle and last), all, "
        "or a list of paths.",
        GIVEN,
    )
    bases: tuple[str, ...] = flag(
        ALL, f"all, or a list of: {', '.join(FAMILIES)}.", GIVEN
    )
    bits: int = flag(4, "Width of a code.", (lambda b: 1 <= b <= 8, "in [1, 8]"))
    seeds: int = flag(3, "Bases drawn per family and layer.", POSITIVE_COUNT)
    steps: int = flag(50, "Greedy steps allowed.", POSITIVE_COUNT)
    rtol: float = flag(1e-6, "Relative tolerance, as a ratio of norms.", POSITIVE)
    restarts: int = flag(8, "k-means++ starts of a codebook.", POSITIVE_COUNT)
    repeats: int = flag(5, "Timed calls, of which the median counts.", POSITIVE_COUNT)
    out: str = flag("runs", "Directory of the results.", GIVEN)

    def __post_init__(self) -> None:
        check_flags(self)
        chosen_names("bases", self.bases, FAMILIES)

    @property
    def quantizer(self) -> GreedyKashin:
        """The paper's method with these choices."""
        return GreedyKashin(
            bits=self.bits, rtol=self.rtol, max_steps=self.steps,
            num_restarts=self.restarts,
        )  # fmt: skip


class _Layer(NamedTuple):
    model: str
    path: str
    kernel: Float[Array, "m n"]


def run(config: AblationConfig) -> int:
    """Measures, prints and writes; returns the exit code.

    Raises:
      UsageError: If the output cannot be written, or a layer is in no model.
      CheckpointError: If a model is missing or damaged.
    """
    out = prepare_output(config.out)
    start = time.perf_counter()
    try:
        # TF32 would add an error of its own on a GPU.
        with jax.default_matmul_precision("highest"):
            records = measure(config)
    except KeyboardInterrupt:
        print("ablate_bases: interrupted; nothing was written.", file=sys.stderr)
        return 130
    _present(config, records, time.perf_counter() - start, out)
    return 0


def measure(config: AblationConfig) -> list[dict[str, Any]]:
    """A record for every layer and family."""
    families = chosen_names("bases", config.bases, FAMILIES)
    layers = list(_chosen_layers(config))
    cases = [(layer, family) for layer in layers for family in families]
    return [
        _record(config, layer, family)
        for layer, family in tqdm(cases, unit="basis", disable=None, leave=False)
    ]


def _chosen_layers(config: AblationConfig) -> Iterator[_Layer]:
    kernels = {m: model_kernels(EMBEDDED.get(m, m)) for m in config.model}
    everywhere = {path for own in kernels.values() for path in own}
    unknown = set(config.layers) - everywhere - {"few", "all"}
    if unknown:
        raise UsageError(
            f"`--layers` has {min(unknown)!r}, which is in none of the models; "
            f"their first is {next(iter(kernels[config.model[0]]))!r}."
        )
    for model, own in kernels.items():
        few = _few(model, own) if "few" in config.layers else ()
        for path, kernel in own.items():
            if path in (*few, *config.layers) or "all" in config.layers:
                yield _Layer(short_model_name(model), path, kernel)


def _few(model: str, kernels: Kernels) -> tuple[str, ...]:
    paths = tuple(kernels)
    return FEW.get(model, (paths[0], paths[len(paths) // 2], paths[-1]))


def _record(config: AblationConfig, layer: _Layer, family: str) -> dict[str, Any]:
    key = path_key(jax.random.key(0), f"{layer.model}/{layer.path}")
    m, n = layer.kernel.shape
    seeded = seeded_bases(family, jax.random.split(key, config.seeds), (m, n))
    found = jax.device_get(ablate(layer.kernel, seeded, config.quantizer))
    levels = np.maximum(found.u_level, found.v_level)
    return {
        "model": layer.model,
        "layer": layer.path,
        "shape": [m, n],
        "basis": family,
        "kind": KINDS.get(family, _STRUCTURED),
        "bits": config.bits,
        "seeds": config.seeds,
        "max_steps": config.steps,
        "rtol": config.rtol,
        "restarts": config.restarts,
        "converged_share": float(np.mean(found.converged)),
        **spread_fields("relative_squared_error", found.relative_squared_error),
        **spread_fields("residual", found.residual),
        **spread_fields("steps", found.steps),
        **spread_fields("u_level", found.u_level),
        **spread_fields("v_level", found.v_level),
        **spread_fields("level", levels),
        **cost_fields(family, layer.kernel, seeded, config.repeats),
        **environment_fields(),
    }


def _with_spread(digits: int) -> Any:
    def show(values: Sequence[float]) -> str:
        mean, spread = float(np.mean(values)), float(np.std(values))
        return f"{mean:.{digits}f} ± {spread:.{digits}f}"

    return show


_COLUMNS = (
    Column("place", "layer"),
    Column("basis", "basis"),
    Column("kind", "kind"),
    Column("relative_squared_error", "rel. sq. error", _with_spread(5)),
    Column("residual_mean", "residual", "{:.1e}".format),
    Column("steps", "steps", _with_spread(0)),
    Column("level", "level", _with_spread(2)),
    Column("flops_per_step", "flops/step", "{:.2e}".format),
    Column("basis_bytes", "basis bytes", "{:,}".format),
    Column("ms_per_step", "ms/step", fixed(2)),
)
SUMMARY = (
    Column("basis", "basis"),
    Column("kind", "kind"),
    Column("error", "mean rel. sq. error", fixed(5)),
    Column("worst", "largest", fixed(5)),
    Column("converged", "converged", "{:.0%}".format),
    Column("milliseconds", "ms/step, all layers", fixed(1)),
)


def summary(records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row per family of bases: means over all layers."""
    rows = []
    for family in dict.fromkeys(record["basis"] for record in records):
        own = [record for record in records if record["basis"] == family]
        errors = [record["relative_squared_error_mean"] for record in own]
        rows.append({
            "basis": family, "kind": own[0]["kind"], "error": float(np.mean(errors)),
            "worst": max(errors),
            "converged": float(np.mean([r["converged_share"] for r in own])),
            "milliseconds": sum(r["ms_per_step"] for r in own),
        })  # fmt: skip
    return rows


def _present(
    config: AblationConfig, records: Sequence[Record], seconds: float, out: Path
) -> None:
    first = records[0]
    facts = [
        f"{config.bits} bits by the paper's method ({config.restarts} k-means++ "
        f"starts), at most {config.steps} steps to a relative residual of "
        f"{config.rtol:g}; means and standard deviations over {config.seeds} seeds.",
        "Level: the larger of sqrt(N) |u|_inf / |x|_2 and the same for v.",
        "A step is one analysis and one synthesis. Basis bytes are held in memory; a "
        "file stores a seed of 8 bytes for any basis.",
        f"{seconds:.0f} s with compilation; {first['device']}, jax "
        f"{first['jax_version']}, kashin_jax {first['kashin_jax_version']}.",
    ]
    families = summary(records)
    print("\n".join(facts) + "\n\n" + aligned_table(families, SUMMARY))
    rows = [{**r, "place": f"{r['model']}: {r['layer']}"} for r in records]
    written = write_results(
        out, "ablate_bases", records, SUMMARY, title="Structured versus random bases",
        facts=facts, rows=families,
        appendix=f"## By layer\n\n{markdown_table(rows, _COLUMNS)}",
        command=command_line("ablate_bases", config, always=()),
    )  # fmt: skip
    picture = out / "ablate_bases.png"
    title = f"{config.bits} bits, {config.seeds} seeds, at most {config.steps} steps"
    save_picture(draw_trade_off(records, title), picture, bbox_inches=None)
    print(f"\nWritten: {written.jsonl}, {written.markdown}, {picture}")


_FIELDS = {
    "relative_squared_error": "relative squared error",
    "residual": "relative residual",
}


def draw_trade_off(records: Sequence[Record], title: str) -> Any:
    """A column for each layer, quantization error above, residual below."""
    layers = list(dict.fromkeys((r["model"], r["layer"]) for r in records))
    figure = new_figure(1.2 + 2.2 * len(layers), 5.6)
    panels = figure.subplots(2, len(layers), squeeze=False, sharey="row", sharex="col")
    for column, (model, layer) in enumerate(layers):
        own = [r for r in records if (r["model"], r["layer"]) == (model, layer)]
        for row, field in enumerate(_FIELDS):
            _draw_points(panels[row, column], own, field)
        _label(panels[:, column], own[0], is_first=column == 0)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    family_legend(figure, panels.ravel(), columns=5)
    return figure


def _draw_points(axes: Any, records: Sequence[Record], field: str) -> None:
    for record in records:
        style = {**FAMILY_STYLES[record["basis"]], "markersize": 7, "linestyle": "none"}
        values = np.array(record[field])
        middle = values.mean()
        axes.errorbar(
            [record["ms_per_step"]], [middle],
            [[middle - values.min()], [values.max() - middle]],
            label=record["basis"], elinewidth=1, capsize=2, **style,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log")


def _label(panels: Sequence[Any], record: Record, *, is_first: bool) -> None:
    m, n = record["shape"]
    short = record["layer"].partition("layers/")[2] or record["layer"]
    title = f"{record['model']}\n{short}\n{m} × {n}"
    for axes, (name, heading) in zip(
        panels, zip(_FIELDS.values(), (title, ""), strict=True), strict=True
    ):
        finish_axes(axes, x="", y=name if is_first else "", title=heading)
        axes.tick_params(which="minor", labelsize=8)
    panels[-1].set_xlabel("ms per greedy step", fontsize=9)


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_program("ablate_bases", __doc__, AblationConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
