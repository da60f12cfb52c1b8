"""What the programs of the figures share: flags, files, and the layers of a model."""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Key
from tqdm import tqdm

from experiments.common.flags import (
    GIVEN,
    check_flags,
    command_line,
    flag,
    run_program,
    short_model_name,
)
from experiments.common.plots import save_picture
from experiments.common.results import (
    environment_fields,
    merge_records,
    prepare_output,
    write_results,
)
from experiments.common.tables import Column, Record
from experiments.common.text import ASSETS
from kashin_jax import BasisSpec, KroneckerBasis, kashin_decompose, make_pair
from kashin_jax.models.loading import load_language_model
from kashin_jax.pipeline import path_key, selected_kernels

__all__ = [
    "PAPER_LAYERS",
    "Artifact",
    "FigureConfig",
    "ModelFigureConfig",
    "Setting",
    "layer_basis",
    "run_figure",
    "survey",
    "write_artifact",
]


class Artifact(NamedTuple):
    """Numbers, with a picture or a table of them or both.

    Attributes:
      title: What is shown.
      records: The numbers, one JSON line each.
      figure: A matplotlib figure; None for a table alone.
      columns: Of the Markdown table; none for a figure alone.
      facts: Sentences to print, and to set above the table.
    """

    title: str
    records: Sequence[Record]
    figure: Any = None
    columns: Sequence[Column] = ()
    facts: Sequence[str] = ()


def write_artifact(
    artifact: Artifact, out: Path, name: str, command: str, **setting: Any
) -> list[Path]:
    """Writes NAME.png, NAME.svg and NAME.md, as far as there are such, and the numbers.

    Each file is replaced in one step; last the records are merged into NAME.jsonl.

    Args:
      artifact: What was made.
      out: An existing directory.
      name: Of `RESULT_FILES`.
      command: What makes it again, shown in the Markdown file.
      **setting: Fields of every record: what the numbers depend on.
    """
    written = []
    if artifact.figure is not None:
        pictures = [out / f"{name}.png", out / f"{name}.svg"]
        for path in pictures:
            _save(artifact.figure, path)
        written += pictures
    records = [
        {**record, **setting, **environment_fields()} for record in artifact.records
    ]
    if artifact.columns:
        written += write_results(
            out, name, records, artifact.columns, title=artifact.title,
            facts=artifact.facts, command=command,
        )  # fmt: skip
    else:
        written.append(merge_records(out, name, records))
    return written


def _save(figure: Any, path: Path) -> None:
    from matplotlib import rc_context

    # Equal pictures are equal files: no date, and no random names inside an SVG.
    is_svg = path.suffix == ".svg"
    with rc_context({"svg.hashsalt": path.stem}):
        save_picture(figure, path, metadata={"Date": None} if is_svg else None)


PAPER_LAYERS = (
    "decoder/layers/0/fc1",
    "decoder/layers/0/self_attn/q_proj",
    "decoder/layers/3/fc2",
)
"""fc1 and q_proj are those of Figure 3; the follow-up names fc2 as a failure."""

SURVEY_FAMILY = "hadamard"
SURVEY_STEPS = 100
SURVEY_RTOL = 1e-6
EARLY_STEPS = 4

Kernels = Mapping[str, Float[Array, "_ _"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Loaded and measured when first asked for, then kept.

    Attributes:
      model: Directory or hub id of a language model's checkpoint.
      seed: Of everything random.
    """

    model: str
    seed: int

    @property
    def key(self) -> Key[Array, ""]:
        """The root of all keys."""
        return jax.random.key(self.seed)

    @property
    def model_name(self) -> str:
        """Name as it stands in titles."""
        return short_model_name(self.model)

    @cached_property
    def kernels(self) -> Kernels:
        """Every linear layer of the model, `[in, out]`.

        Raises:
          CheckpointError: If the checkpoint is missing or damaged.
          UsageError: If it is a classifier.
        """
        return selected_kernels(load_language_model(self.model).model)

    @cached_property
    def survey(self) -> list[dict[str, Any]]:
        """How every layer converges, hardest first."""
        return survey(self.kernels, self.key)

    @property
    def hard_layer(self) -> str:
        """The layer with the largest residual left."""
        return self.survey[0]["layer"]

    @property
    def lossy_layer(self) -> str:
        """The layer with the largest residual after the steps that 4 bits pay for.

        A code of b bits loses about as much as b steps leave.
        """
        return max(self.survey, key=lambda r: r["early_residual"])["layer"]

    @property
    def good_layer(self) -> str:
        """The paper's q_proj, or in another model the easiest layer."""
        usual = PAPER_LAYERS[1]
        return usual if usual in self.kernels else self.survey[-1]["layer"]


def layer_basis(
    key: Key[Array, ""], layer: str, family: str, kernel: Float[Array, "m n"]
) -> KroneckerBasis:
    """The pair of bases of a layer: the same in every figure."""
    m, n = kernel.shape
    return make_pair(BasisSpec(family, family), path_key(key, layer), (m, n))


def survey(
    kernels: Kernels,
    key: Key[Array, ""],
    *,
    family: str = SURVEY_FAMILY,
    max_steps: int = SURVEY_STEPS,
) -> list[dict[str, Any]]:
    """Decomposes every layer in one basis; one record each, largest residual first.

    Args:
      kernels: The layers.
      key: Root of the keys.
      family: Of both bases.
      max_steps: Greedy steps at the most.
    """

    @jax.jit
    def residuals(kernel: Float[Array, "m n"], basis: KroneckerBasis) -> Any:
        run = partial(kashin_decompose, kernel, basis, rtol=SURVEY_RTOL)
        full, early = run(max_steps=max_steps), run(max_steps=EARLY_STEPS)
        return full.residual, full.num_steps, full.converged, early.residual

    records = []
    for layer, kernel in tqdm(kernels.items(), "layers", disable=None, leave=False):
        basis = layer_basis(key, layer, family, kernel)
        residual, steps, converged, early = jax.device_get(residuals(kernel, basis))
        records.append({
            "part": "survey", "layer": layer, "shape": list(kernel.shape),
            "family": family, "max_steps": max_steps, "rtol": SURVEY_RTOL,
            "residual": float(residual), "steps": int(steps),
            "converged": bool(converged), "early_steps": EARLY_STEPS,
            "early_residual": float(early),
        })  # fmt: skip
    # Within the tolerance the steps tell which layer was harder.
    return sorted(
        records, key=lambda r: (max(r["residual"], SURVEY_RTOL), r["steps"]),
        reverse=True,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class FigureConfig:
    """A figure; meanings are in the flags.

    Raises:
      UsageError: If a value cannot work; the message names the flag.
    """

    seed: int = flag(
        0, "Seed of vectors, bases and codebooks.",
        (lambda x: 0 <= x < 2**31, "in [0, 2147483647]"),
    )  # fmt: skip
    out: str = flag("runs", "Directory of the results.", GIVEN)

    def __post_init__(self) -> None:
        check_flags(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFigureConfig(FigureConfig):
    """A figure of layers of a model; meanings are in the flags."""

    model: str = flag(
        str(ASSETS / "opt-wiki-18m"), "Directory or hub id of a language model.", GIVEN
    )


def run_figure(
    name: str,
    manual: str | None,
    make: Callable[[Setting], Artifact],
    config_type: type[FigureConfig],
    arguments: list[str],
) -> int:
    """Runs the program of a figure; returns the exit code.

    Args:
      name: Of the program and of `RESULT_FILES`.
      manual: Shown by `--help`.
      make: Measures and draws it.
      config_type: Its flags; those of `ModelFigureConfig` where it shows a model.
      arguments: The command line, without the program's name.
    """

    def run(config: FigureConfig) -> int:
        return _run(name, make, config)

    return run_program(name, manual, config_type, run, arguments)


def _run(name: str, make: Callable[[Setting], Artifact], config: FigureConfig) -> int:
    out = prepare_output(config.out)
    setting = Setting(model="", seed=config.seed)
    fields: dict[str, Any] = {"seed": config.seed}
    if isinstance(config, ModelFigureConfig):
        setting = dataclasses.replace(setting, model=config.model)
        fields["model"] = setting.model_name
    start = time.perf_counter()
    try:
        # TF32 would add an error of its own on a GPU.
        with jax.default_matmul_precision("highest"):
            artifact = make(setting)
    except KeyboardInterrupt:
        print(f"{name}: interrupted; nothing was written.", file=sys.stderr)
        return 130
    command = command_line(name, config, always=())
    paths = write_artifact(artifact, out, name, command, **fields)
    print(f"{name}: {artifact.title}; {time.perf_counter() - start:.1f} s")
    print("".join(f"  {fact}\n" for fact in artifact.facts), end="")
    print(f"  Written: {', '.join(map(str, paths))}", flush=True)
    return 0
