"""Quantized layers of a row: a checkpoint on disk, its size, what it lost."""

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx
from jaxtyping import Array, Float

from experiments.common.results import environment_fields
from kashin_jax import Rules, stored_bits
from kashin_jax.io import open_checkpoint
from kashin_jax.models import LoadedClassifier, head_names
from kashin_jax.models.loading import LoadedModel
from kashin_jax.pipeline import (
    Calibration,
    LayerReport,
    Refinement,
    calibration_seconds,
    load_quantized,
    packed_tensors,
    quantize_checkpoint,
    refine_checkpoint,
    rules_to_json,
    selected_kernels,
)
from kashin_jax.tensors import QuantizedTensor

__all__ = [
    "QuantizedCopy",
    "QuantizedLayer",
    "decode",
    "decoded_kernels",
    "loss_fields",
    "quantized_copy",
    "remove_copies",
    "size_fields",
    "stored_width",
    "unconverged",
]


class QuantizedLayer(NamedTuple):
    """One matrix of a quantized checkpoint.

    Attributes:
      tensor: It, packed.
      report: What was lost, and the seconds of the run that coded it.
    """

    tensor: QuantizedTensor
    report: LayerReport


Layers = Mapping[str, QuantizedLayer]


class QuantizedCopy(NamedTuple):
    """A quantized copy of a checkpoint, loaded.

    Attributes:
      model: Its layers are packed, parameters and activations float32.
      layers: What is packed, by path, in the order of the model.
    """

    model: nnx.Module
    layers: Layers


decode = jax.jit(lambda tensor: tensor.decode())
"""The matrix of a packed tensor; compiled, it rounds otherwise than step by step."""


def quantized_copy(
    loaded: LoadedModel | LoadedClassifier,
    rules: Rules,
    seed: int,
    work: Path,
    weights_sha256: str,
    calibration: Calibration | None = None,
    refinement: Refinement | None = None,
) -> QuantizedCopy:
    """A quantized copy of a checkpoint, which is all that a row needs.

    The copy is a directory in `work`, named after everything that it depends on but the
    method's code. It is made unless it is there; a file of it holds one matrix, and an
    interrupted run goes on behind the last one. Whoever deletes it only costs time.

    Args:
      loaded: The model in full precision.
      rules: What is quantized, and how.
      seed: Of everything random.
      work: Directory for unfinished work; it must exist.
      weights_sha256: Of the checkpoint.
      calibration: A text to quantize it with.
      refinement: How what decodes the codes then learns from that text; None for not.

    Raises:
      UsageError: If the rules do not suit the checkpoint.
      CheckpointError: If a file cannot be written.
      NonFiniteError: If scales of the method overflow; names the matrix.
    """
    fields = [weights_sha256, rules_to_json(rules), seed, environment_fields()]
    # Weights that were copied or checked out again are another run's to the pipeline.
    files = open_checkpoint(loaded.directory).files.values()
    fields += [[file.path.stat().st_mtime_ns for file in files]]
    fields += [] if calibration is None else [calibration.digest]
    name = hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:32]
    _remove_damaged(work, name)
    result = quantize_checkpoint(
        loaded.directory, work / name, rules, seed=seed, max_shard_bytes=1,
        exist_ok=True, calibration=calibration,
    )  # fmt: skip
    directory, found_reports = result.directory, result.reports
    if refinement is not None and calibration is not None:
        windows = calibration.windows
        learned = refinement.digest(windows)[:32]
        refined = refine_checkpoint(
            directory, work / f"{name}-{learned}", loaded.directory, windows,
            refinement, exist_ok=True,
        )  # fmt: skip
        directory = refined.directory
        found_reports = {
            name: report.with_seconds(found_reports[name].seconds_to_json())
            for name, report in refined.reports.items()
        }
    heads = head_names(directory)
    model = load_quantized(directory, head=heads[0] if heads else None).model
    tensors = packed_tensors(model)
    reports = {report.path: report for report in found_reports.values()}
    layers = {
        path: QuantizedLayer(tensors[path], reports[path])
        for path in selected_kernels(loaded.model)
    }
    return QuantizedCopy(model, layers)


def _remove_damaged(work: Path, name: str) -> None:
    """Removes files that a full disk, say, left: they are made again.

    Args:
      work: Directory for unfinished work.
      name: Of a copy in it; the refined ones made of it begin so, and go with it.
    """
    for directory in sorted(work.glob(f"{name}*")):
        for file in directory.glob("*.safetensors"):
            try:
                with safetensors.safe_open(file, framework="numpy"):
                    continue
            except safetensors.SafetensorError:
                file.unlink()
            if (directory / "config.json").exists():
                for each in work.glob(f"{directory.name}*"):
                    shutil.rmtree(each)
                break


def remove_copies(work: Path) -> None:
    """Removes what `quantized_copy` made: rows of a large model would fill a disk."""
    for directory in work.iterdir():
        if (directory / "config.json").exists():
            shutil.rmtree(directory)


def decoded_kernels(layers: Layers) -> dict[str, Float[Array, "m n"]]:
    """The matrices that the packed layers stand for."""
    return {path: decode(layer.tensor) for path, layer in layers.items()}


def unconverged(layers: Layers) -> frozenset[str]:
    """Paths of the layers whose decomposition missed its tolerance."""
    return frozenset(
        path for path, layer in layers.items() if layer.report.converged is False
    )


def loss_fields(
    layers: Layers, kept: frozenset[str] = frozenset()
) -> dict[str, float | None]:
    """Fields of a record: mean relative squared error, share converged, seconds.

    Of a method that cannot miss a tolerance there is no share. With calibration, also
    the mean squared error of outputs on held-out text, relative to them, how many
    layers were better off without, and the seconds of statistics, of coding and of
    compilation apart; those of compiling the coder are in `quantize_seconds`, too.

    Args:
      layers: All layers.
      kept: Paths of those that stay in full precision, and so lose nothing.
    """
    errors = [
        0.0 if path in kept else float(layer.report.relative_squared_error)
        for path, layer in layers.items()
    ]
    converges = any(layer.report.decomposition for layer in layers.values())
    failed = len(unconverged(layers))
    reports = [layer.report.calibration for layer in layers.values()]
    outputs = [each for each in reports if each is not None]
    calibrated = (
        {
            "output_error": float(np.mean([each.output_error for each in outputs])),
            "data_free_output_error": float(
                np.mean([e.data_free_error for e in outputs])
            ),
            "layers_without": sum(each.damping is None for each in outputs),
        }
        if outputs
        else {}
    )
    by_path = {path: layer.report for path, layer in layers.items()}
    if (spent := calibration_seconds(by_path)) is not None:
        calibrated |= {
            "statistics_seconds": spent.statistics,
            "coding_seconds": spent.coding,
            "compile_seconds": spent.compilation,
        }
    return calibrated | {
        "relative_error": float(np.mean(errors)),
        "converged_share": 1 - failed / len(layers) if converges else None,
        "quantize_seconds": sum(
            layer.report.seconds or 0.0 for layer in layers.values()
        ),
    }


def size_fields(
    model: nnx.Module,
    width: int,
    layers: Layers,
    kept: frozenset[str] = frozenset(),
) -> dict[str, float]:
    """Fields of a record: stored bits per quantized weight, and of the whole model.

    Args:
      model: In full precision.
      width: Bits of a parameter that is not quantized, see `stored_width`.
      layers: All layers.
      kept: Paths of those that stay in full precision.
    """
    weights = sum(math.prod(layer.tensor.shape) for layer in layers.values())
    bits = sum(
        width * math.prod(layer.tensor.shape)
        if path in kept
        else stored_bits(layer.tensor)
        for path, layer in layers.items()
    )
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    rest = width * (parameters - weights)
    return {
        "stored_bits_per_weight": bits / weights,
        "model_bits_per_weight": (bits + rest) / parameters,
    }


def stored_width(stored_dtype: str) -> int:
    """Bits of a stored parameter."""
    return 8 * jnp.dtype(stored_dtype).itemsize
