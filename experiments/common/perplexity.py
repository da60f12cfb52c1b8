"""Rows of the perplexity table: quantize, score, count bits, for one method each."""

import dataclasses
import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from experiments.common.calibration import NamedCalibration
from experiments.common.methods import (
    FULL_PRECISION,
    REFINED_CONTROL,
    RowKind,
    Width,
    joint_config,
)
from experiments.common.quantized_layers import (
    QuantizedCopy,
    QuantizedLayer,
    decode,
    decoded_kernels,
    loss_fields,
    quantized_copy,
    size_fields,
    stored_width,
    unconverged,
)
from experiments.common.resumable import FinishedRecords, PartialScores, score_resumably
from experiments.common.tables import Record
from experiments.common.text import EvaluationText
from kashin_jax import BasisSpec, JointKashin, Rule, Rules
from kashin_jax.errors import NonFiniteError
from kashin_jax.evaluation import (
    ScoredBatch,
    bits_per_byte,
    count_scored,
    perplexity,
    window_nll,
)
from kashin_jax.methods import Method, QuantizationReport
from kashin_jax.models.loading import LoadedModel
from kashin_jax.pipeline import (
    Refinement,
    quantize_model,
    refine_model,
    replace_kernels,
    selected_kernels,
)
from kashin_jax.pipeline.mixed_widths import (
    LENGTH,
    WINDOWS,
    layer_sensitivities,
    mixed_widths,
    probe,
)
from kashin_jax.pipeline.paths import join
from kashin_jax.tensors import KashinTensor, QuantizedTensor

__all__ = [
    "Bench",
    "full_precision_row",
    "mixed_name",
    "quantized_row",
    "refined_control_row",
]

MIXED_NOTE = (
    "Joint coding with a width per layer (2 to 5 bits in halves), chosen under a total "
    "budget of stored bits by what a 2-bit error in that layer alone does to the "
    "next-token distributions, on text sampled from the model itself; `seconds` leaves "
    "that measurement out."
)


# Every record has every field, so that a reader of the file needs no special cases.
_ABSENT = dict.fromkeys((
    "stored_bits_per_weight", "model_bits_per_weight", "perplexity", "bits_per_byte",
    "increase", "relative_error", "converged_share", "quantize_seconds", "seed",
    "basis", "widths", "rtol", "max_steps",
))  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """What all rows of one table share.

    Attributes:
      loaded: The model in full precision.
      text: What is scored.
      work: Directory for unfinished work; it must exist.
      identity: Fields that every row records: model, data, versions, device.
      weights_sha256: Of the checkpoint.
      batch_size: Windows per call.
      finished: Rows that are not made again; None makes all.
      calibration: The text of calibrated rows; None where there are none.
    """

    loaded: LoadedModel
    text: EvaluationText
    work: Path
    identity: Record
    weights_sha256: str
    batch_size: int
    finished: FinishedRecords | None = None
    calibration: NamedCalibration | None = None

    def quantize(
        self, rules: Rules, seed: int, method: RowKind | None = None
    ) -> QuantizedCopy:
        """A quantized copy of the checkpoint, calibrated and refined as a row asks."""
        calibration = refinement = None
        if self.calibration is not None and method is not None and method.is_calibrated:
            calibration = self.calibration.draw(method, seed)
            if method.refinement is not None:
                refinement = dataclasses.replace(method.refinement, seed=seed)
        return quantized_copy(
            self.loaded, rules, seed, self.work, self.weights_sha256, calibration,
            refinement,
        )  # fmt: skip

    def calibration_fields(self, method: RowKind) -> dict[str, Any]:
        """What a row says of its calibration; nothing where there is none."""
        if self.calibration is None or not method.is_calibrated:
            return {}
        fields = self.calibration.record_fields(method)
        return fields | refinement_fields(method.refinement)

    def known(self, choices: Record) -> dict[str, Any] | None:
        """The finished row of these choices, if there is one."""
        of_bench = {**self.identity, "weights_sha256": self.weights_sha256}
        found = self.finished.find({**of_bench, **choices}) if self.finished else []
        return {**self.text_fields(), **self._with_bits(found[0])} if found else None

    def text_fields(self) -> dict[str, Any]:
        """What is known of the text beside its identity, which older rows have not."""
        num_bytes = self.text.windows().num_bytes
        total = None if num_bytes is None else int(num_bytes.sum())
        return {"bos_token": self.text.bos_token, "bytes": total}

    def _with_bits(self, row: Record) -> dict[str, Any]:
        """An older row with its bits per byte, where they follow from what it has.

        Where windows have weights of their own, perplexity does not tell the total.
        """
        value, total = row.get("perplexity"), self.text_fields()["bytes"]
        if value is None or not total or self.text.weigh is not count_scored:
            return {"bits_per_byte": None, **row}
        bits = row["tokens"] * math.log2(value) / total
        return {"bits_per_byte": bits, **row}

    def keep(self, row: dict[str, Any]) -> dict[str, Any]:
        """Remembers a finished row and gives it back."""
        if self.finished:
            self.finished.add(row)
        return row

    def score(self, model: nnx.Module, computation: Record) -> dict[str, Any]:
        """Perplexity and bits per byte of what `computation` describes; resumes."""
        graphdef, state = nnx.split(model)
        fingerprint = {
            **self.identity, **computation, "weights_sha256": self.weights_sha256
        }  # fmt: skip
        windows = self.text.windows()
        nlls = score_resumably(
            partial(_nll, graphdef, state),
            windows,
            PartialScores.in_directory(self.work, fingerprint),
            batch_size=min(self.batch_size, windows.tokens.shape[0]),
        )
        return {
            "perplexity": perplexity(nlls, windows, weigh=self.text.weigh),
            "bits_per_byte": bits_per_byte(nlls, windows),
        }


# One compilation for all models of equal structure: parameters are arguments.
@partial(jax.jit, static_argnums=0)
def _nll(
    graphdef: Any, state: Any, tokens: Int[Array, "b t"], scored: Bool[Array, "b t"]
) -> Float[Array, " b"]:
    return window_nll(nnx.merge(graphdef, state)(tokens), tokens, scored)


def full_precision_row(bench: Bench) -> dict[str, Any]:
    """The row that all others are compared with."""
    choices = {"method": FULL_PRECISION, "bits": _full_width(bench)}
    if known := bench.known(choices):
        return known
    before = bench.identity.get("quantized_before")
    source = "" if before is None else f" decoded from {before} of a GGUF file"
    note = f"{bench.loaded.stored_dtype} checkpoint{source}, computed in float32."
    return _full_row(bench, bench.loaded.model, choices, {}, note)


def _full_width(bench: Bench) -> int:
    """Bits of a weight that is not quantized."""
    return int(stored_width(bench.loaded.stored_dtype))


def _full_row(
    bench: Bench, model: nnx.Module, choices: Record, computation: Record, note: str
) -> dict[str, Any]:
    """A row of a model none of whose layers is quantized.

    Args:
      bench: What all rows share.
      model: What is scored.
      choices: Fields that tell the row from others, `bits` among them.
      computation: Those that the score depends on.
      note: What it is.
    """
    bits = float(choices["bits"])
    return bench.keep(
        {
            **dict.fromkeys(("method", "bits")),
            **_ABSENT,
            **choices,
            "stored_bits_per_weight": bits,
            "model_bits_per_weight": bits,
            **bench.score(model, {"config": None, **computation}),
            "note": note,
            **bench.text_fields(),
            **bench.identity,
            "weights_sha256": bench.weights_sha256,
        }
    )


def refinement_fields(refinement: Refinement | None) -> dict[str, Any]:
    """What a row says of its refinement; nothing where there is none."""
    if refinement is None:
        return {}
    fields = dataclasses.asdict(refinement)
    # A field of every row.
    del fields["seed"]
    return {"refinement": fields}


def refined_control_row(
    bench: Bench, refinement: Refinement, seed: int
) -> dict[str, Any]:
    """The full precision that has learned like refined rows: biases and norms alone."""
    assert bench.calibration is not None, "refined rows have a text"
    learning = bench.calibration.record_fields() | refinement_fields(refinement)
    choices = {"method": REFINED_CONTROL, "bits": _full_width(bench), "seed": seed}
    choices |= learning
    if known := bench.known(choices):
        return known
    alone = dataclasses.replace(refinement, block_epochs=0, seed=seed)
    dense = bench.loaded.model
    windows = bench.calibration.text.calibration(seed).windows
    state = nnx.to_flat_state(nnx.state(dense, nnx.Param))
    stored = {join(path): bench.loaded.stored_dtype for path, _ in state}
    model, _ = refine_model(dense, dense, windows, alone, stored=stored)
    note = (
        "Full precision, its biases and norms trained end to end as those of refined "
        "rows: what the text brings without any quantization."
    )
    return _full_row(bench, model, choices, {"seed": seed, **learning}, note)


def quantized_row(
    bench: Bench,
    name: str,
    method: RowKind,
    *,
    bits: Width,
    basis: BasisSpec,
    seed: int,
    rtol: float,
    max_steps: int,
) -> dict[str, Any]:
    """One row; a method that does not exist at this width gives dashes and the reason.

    A method that mixes widths takes one that it has not as a total budget.

    Raises:
      ValueError: If a layer cannot be quantized; the message names its path.
    """
    choices = {
        "method": mixed_name(name) if method.is_budget(bits) else name,
        "bits": bits,
        **method.choices(basis, seed, rtol, max_steps),
        **bench.calibration_fields(method),
    }
    if known := bench.known(choices):
        return known
    measured = _measured(
        bench, method, bits=bits, basis=basis, seed=seed, rtol=rtol,
        max_steps=max_steps,
    )  # fmt: skip
    return bench.keep(
        {
            **dict.fromkeys(("method", "bits")),
            **_ABSENT,
            **choices,
            **bench.text_fields(),
            **bench.identity,
            "weights_sha256": bench.weights_sha256,
            **measured,
        }
    )


def _measured(
    bench: Bench,
    method: RowKind,
    *,
    bits: Width,
    basis: BasisSpec,
    seed: int,
    rtol: float,
    max_steps: int,
) -> dict[str, Any]:
    """The fields of a row that say what came out, or why nothing did."""
    try:
        felt = None
        if method.is_budget(bits):
            felt = _sensitivities(bench, probe(joint_config(2, basis)), seed)
        try:
            # Nothing else: what fails of the run is no lack of the method.
            plan = _plan(bench, method, bits, basis, rtol, max_steps, felt)
        except ValueError as reason:
            return {"note": str(reason)}
        copy = bench.quantize(plan.rules, seed, method)
    except NonFiniteError as reason:
        # The checkpoint is finite, so it is this method whose scales overflow.
        return {"note": str(reason)}
    layers = copy.layers
    kept = unconverged(layers) if method.keeps_failures else frozenset()
    config = plan.rules.config
    if method.refinement is not None:
        # Biases and norms have learned, too.
        model = copy.model
    else:
        model = _quantized_model(bench, config, copy, kept)
    computation = {"config": plan.identity, "seed": seed, "kept": sorted(kept)}
    computation |= bench.calibration_fields(method)
    width = stored_width(bench.loaded.stored_dtype)
    return {
        **size_fields(bench.loaded.model, width, layers, kept),
        **bench.score(model, computation),
        **loss_fields(layers, kept),
        "widths": plan.widths,
        "note": plan.note,
    }


def mixed_name(name: str) -> str:
    """What the rows of a method are called whose layers differ in width."""
    return f"{name}-mixed"


class _Plan(NamedTuple):
    # How each layer is coded; what tells it from other plans; widths if they differ.
    rules: Rules
    identity: str
    widths: dict[str, Width] | None
    note: str


def _plan(
    bench: Bench,
    method: RowKind,
    bits: Width,
    basis: BasisSpec,
    rtol: float,
    max_steps: int,
    felt: Mapping[str, float] | None,
) -> _Plan:
    """Raises ValueError, with the reason, where the method does not exist.

    Args:
      bench: What is quantized.
      method: The row's.
      bits: Its width, or a budget.
      basis: Of methods that have one.
      rtol: Of the decomposition.
      max_steps: Of it, too.
      felt: What layers are sensitive to, for a budget.
    """
    if felt is None:
        config = method.make(bits, basis, rtol, max_steps)
        return _Plan(Rules(config=config), repr(config), None, method.note)
    config = joint_config(2, basis)
    kernels = selected_kernels(bench.loaded.model)
    shapes = {path: (each.shape, each.dtype.name) for path, each in kernels.items()}
    widths = mixed_widths(shapes, felt, config, bits)
    configs = {path: joint_config(width, basis) for path, width in widths.items()}
    each = [Rule(f"^{re.escape(path)}$", config) for path, config in configs.items()]
    rules = Rules(config=next(iter(configs.values())), rules=each)
    return _Plan(rules, repr(configs), widths, MIXED_NOTE)


def _sensitivities(bench: Bench, config: JointKashin, seed: int) -> dict[str, float]:
    key = jax.random.key(seed)
    layers = bench.quantize(Rules(config=config), seed).layers
    fingerprint = {
        **bench.identity, "weights_sha256": bench.weights_sha256, "seed": seed,
        "sensitivity": [repr(config), WINDOWS, LENGTH],
    }  # fmt: skip
    store = PartialScores.in_directory(bench.work, fingerprint)
    done = store.load().tolist()

    def keep(value: float) -> None:
        store.append(ScoredBatch(len(store.load()), np.asarray([value])))

    coded = {path: partial(_decoded, layer) for path, layer in layers.items()}
    return layer_sensitivities(bench.loaded.model, coded, key, done, keep)


def _decoded(layer: QuantizedLayer) -> tuple[Float[Array, "m n"], float]:
    return decode(layer.tensor), float(layer.report.relative_squared_error)


def _quantized_model(
    bench: Bench,
    config: Method,
    copy: QuantizedCopy,
    kept: frozenset[str],
) -> nnx.Module:
    """Packed layers for Kashin; decoded kernels in the dense model for the controls."""
    dense, layers = bench.loaded.model, copy.layers
    if not all(isinstance(one.tensor, KashinTensor) for one in layers.values()):
        return replace_kernels(dense, decoded_kernels(layers))
    if not kept:
        return copy.model
    if len(kept) == len(layers):
        return dense

    def packed(path: str, _: Array) -> tuple[QuantizedTensor, QuantizationReport]:
        error = jnp.float32(layers[path].report.relative_squared_error)
        return layers[path].tensor, QuantizationReport(error, None)

    return quantize_model(
        dense,
        config,
        select=lambda path: path in layers and path not in kept,
        quantize_layer=packed,
    ).model
