"""Calibrated layers of a checkpoint, kept in hidden files until shards are written."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from flax import nnx
from jaxtyping import Array, Int32, Key

from kashin_jax.errors import UsageError
from kashin_jax.io import Checkpoint, PlannedTensor, from_leaves
from kashin_jax.models.bert import ClassifierConfig
from kashin_jax.models.loading import load_classifier, load_model
from kashin_jax.models.registry import find_architecture
from kashin_jax.pipeline.calibrated_model import quantize_calibrated
from kashin_jax.pipeline.calibration import Calibration
from kashin_jax.pipeline.checkpoint_plan import stored_kernel
from kashin_jax.pipeline.mixed_widths import why_it_does_not_run
from kashin_jax.pipeline.plan import Choice, Plan
from kashin_jax.pipeline.report import LayerReport
from kashin_jax.pipeline.resume import keep_tensor, kept_tensor
from kashin_jax.tensors import QuantizedTensor

__all__ = [
    "calibrate_checkpoint",
    "check_calibration",
    "check_runs",
    "check_tokens",
    "is_encoder",
]


def is_encoder(source: Checkpoint) -> bool:
    """Whether a checkpoint that runs here holds a classifier, or its encoder."""
    where = f"{source.directory}/config.json"
    return find_architecture(source.config, where).head is not None


def check_runs(source: Checkpoint, *, takes_encoders: bool = False) -> None:
    """Raises UsageError if a checkpoint is no language model that runs here.

    Args:
      source: The checkpoint.
      takes_encoders: Whether a classifier, or its encoder, will do, too, as it does for
        calibration, and not for refinement.
    """
    why = why_it_does_not_run(source, takes_encoders=takes_encoders)
    if why is not None:
        cannot, remedy = (
            ("calibrated", "Quantize it without calibration")
            if takes_encoders
            else ("refined", "Use it as it was quantized")
        )
        raise UsageError(f"{source.directory}: cannot be {cannot}, as {why}. {remedy}.")


def check_calibration(source: Checkpoint, calibration: Calibration) -> None:
    """Raises UsageError if a checkpoint cannot be calibrated with a text."""
    check_runs(source, takes_encoders=True)
    _check_ids(source, calibration.windows)
    if not is_encoder(source):
        if calibration.is_encoder:
            raise UsageError(
                f"{source.directory}: is a language model, which takes neither `mask` "
                "nor `token_types`. Leave them out."
            )
        _check_length(source, calibration.windows)
        return
    if calibration.weighting is not None:
        raise UsageError(
            f"{source.directory}: is a classifier, and `weighting` is for language "
            "models. Leave it out."
        )
    config = ClassifierConfig.from_dict(source.config, "config.json")
    if (length := calibration.windows.shape[1]) > config.max_length:
        raise UsageError(
            f"{source.directory}: has {config.max_length} positions, and windows have "
            f"{length} tokens. Cut them."
        )
    # The lookup of a type that the model lacks would give another one's vector.
    types = calibration.token_types
    if types is not None and config.type_vocab_size:
        if types.min() < 0 or types.max() >= config.type_vocab_size:
            raise UsageError(
                f"{source.directory}: has {config.type_vocab_size} token types, and "
                f"`token_types` goes from {types.min()} to {types.max()}. Use the "
                "tokenizer of the model."
            )


def check_tokens(source: Checkpoint, windows: Int32[np.ndarray, "w t"]) -> None:
    """Raises UsageError if a checkpoint is no language model that reads a text."""
    check_runs(source)
    _check_ids(source, windows)
    _check_length(source, windows)


def _check_length(source: Checkpoint, windows: Int32[np.ndarray, "w t"]) -> None:
    architecture = find_architecture(source.config, f"{source.directory}/config.json")
    config = architecture.config.from_dict(source.config, "config.json")
    if windows.shape[1] > config.context_length:
        raise UsageError(
            f"{source.directory}: has positions for {config.context_length} tokens, "
            f"and windows of the text have {windows.shape[1]}. Cut shorter ones."
        )


def _check_ids(source: Checkpoint, windows: Int32[np.ndarray, "w t"]) -> None:
    largest, size = windows.max(), source.config.get("vocab_size")
    if isinstance(size, int) and largest >= size:
        raise UsageError(
            f"{source.directory}: has no token {largest}, which the calibration text "
            "has. Use the tokenizer of the model."
        )


def calibrate_checkpoint(
    source: Checkpoint,
    target: Path,
    plan: Plan,
    calibration: Calibration,
    root: Key[Array, ""],
    shards: Iterable[str],
) -> None:
    """Codes all layers that the text reaches, and keeps them in hidden files.

    What an interrupted run has kept is not coded again, and the text goes no further
    than to the last block with layers that are not. Where one of the files named
    `shards` is there already, all of it was done.

    Raises:
      UsageError: If the model has no list of blocks.
      NonFiniteError: If a matrix, or what a layer reads, holds NaN or infinity.
    """
    if any((target / name).exists() for name in shards):
        return
    choices = [layer.choice for layer in plan.quantized]
    layers = _Files(source, target, {tensor.name: tensor for tensor in plan.tensors})
    quantize_calibrated(_loaded(source), choices, calibration, root, layers)


@dataclasses.dataclass(frozen=True)
class _Files:
    """Layers of a checkpoint, and hidden files of those that are done."""

    source: Checkpoint
    target: Path
    planned: Mapping[str, PlannedTensor]

    def kernel(self, choice: Choice) -> Array:
        return stored_kernel(self.source, choice)

    def is_kept(self, choice: Choice) -> bool:
        return kept_tensor(self.target, self.planned[choice.name]) is not None

    def kept(self, choice: Choice) -> QuantizedTensor | None:
        planned = self.planned[choice.name]
        if (found := kept_tensor(self.target, planned)) is None:
            return None
        file, _ = found
        start = f"{planned.name}."
        leaves = {leaf.removeprefix(start): file.read(leaf) for leaf in planned.specs}
        return from_leaves(planned.description, leaves, name=planned.name)

    def keep(
        self, choice: Choice, tensor: QuantizedTensor, report: LayerReport
    ) -> None:
        planned = self.planned[choice.name]
        keep_tensor(self.target, planned, tensor, report.summary())


def _loaded(source: Checkpoint) -> nnx.Module:
    """The model; of an encoder with any head, which calibration does not ask for."""
    if is_encoder(source):
        return load_classifier(source.directory, labels=("any", "other")).model
    model: nnx.Module = load_model(source).model
    return model
