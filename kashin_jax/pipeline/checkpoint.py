"""Quantizing a checkpoint that may be larger than memory, and undoing it."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from kashin_jax.errors import UsageError
from kashin_jax.io import (
    MAX_SHARD_BYTES,
    Checkpoint,
    PlannedTensor,
    TensorWriter,
    atomic_path,
    open_checkpoint,
    open_shard,
    plan_plain,
    plan_shards,
    quantization_config,
    record_file,
    shard_names,
    write_config,
    write_index,
    write_stored,
)
from kashin_jax.methods import QuantizationReport, config_to_json, quantize
from kashin_jax.pipeline.checkpoint_plan import (
    LayerPlan,
    Plan,
    plan_checkpoint,
    refuse_foreign,
)
from kashin_jax.pipeline.resume import (
    claim_directory,
    fingerprint,
    release_directory,
)
from kashin_jax.pipeline.records import (
    REPORT_NAME,
    join_parts,
    remove_parts,
    write_part,
)
from kashin_jax.pipeline.rules import Rules, rules_to_json
from kashin_jax.pipeline.sharing import InputScales, layer_key
from kashin_jax.tensors import bits_per_weight, dequantize

__all__ = ["StreamResult", "dequantize_checkpoint", "quantize_checkpoint"]

# Weights in any form; the other files of a checkpoint go along.
_WEIGHTS = (".safetensors", ".bin", ".msgpack", ".h5", ".pt", ".pth", ".onnx", ".gguf")
_OWN = frozenset({"config.json", "model.safetensors.index.json", REPORT_NAME})

WriteTensor = Callable[[TensorWriter, str], dict[str, Any] | None]


class StreamResult(NamedTuple):
    """What was written.

    Attributes:
      directory: Of the new checkpoint.
      reports: A record per quantized matrix, as in `quantization_report.jsonl`.
      resumed: Shards that an earlier run had finished.
    """

    directory: Path
    reports: tuple[dict[str, Any], ...]
    resumed: int


def quantize_checkpoint(
    source: str | Path,
    target: str | Path,
    rules: Rules | None = None,
    *,
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> StreamResult:
    """Quantizes a checkpoint into a directory of safetensors files, tensor by tensor.

    Memory is bounded by the largest matrix to quantize; other tensors are copied in
    slices. Every shard appears whole; an interrupted run goes on after the last one
    and gives the same bytes as one that was not interrupted. The codes are those that
    `quantize_model` finds for the loaded model with `jax.random.key(seed)`.

    Args:
      source: A checkpoint in Hugging Face's layout, or its hub id: safetensors, or else
        Flax's msgpack files, which give the same result. Those are read whole, one at
        a time, so that the largest of them bounds the memory, too.
      target: Must not exist, be empty, or hold an unfinished run of the same call.
      rules: Which matrices, and how; None takes `Rules()`.
      seed: Of everything random.
      max_shard_bytes: Of the data of a shard.

    Raises:
      UsageError: If the rules do not suit the checkpoint, or `target` is taken.
      CheckpointError: If a file is missing, damaged, or cannot be written.
      NonFiniteError: If a matrix holds NaN or infinity; names it.
    """
    rules = Rules() if rules is None else rules
    checkpoint = open_checkpoint(source)
    plan = plan_checkpoint(checkpoint, rules)
    target = _separate(checkpoint.directory, Path(target))
    digest = fingerprint(checkpoint, rules, seed, max_shard_bytes)
    claim_directory(target, digest)
    root = jax.random.key(seed)
    names = {layer.path: name for name, layer in plan.layers.items()}
    scales = InputScales(
        plan.groups, lambda path: _kernel(checkpoint, names[path], plan)
    )

    def write(writer: TensorWriter, name: str) -> dict[str, Any] | None:
        if name not in plan.layers:
            checkpoint.copy(name, writer.sink(name))
            return None
        layer = plan.layers[name]
        key = layer_key(root, layer.path, plan.groups)
        # First, and alone in memory: others of its group are read for it.
        scale = scales(layer.path)
        kernel = _kernel(checkpoint, name, plan)
        tensor, report = quantize(kernel, layer.config, key, path=name, in_scale=scale)
        del kernel
        write_stored(writer, name, tensor)
        return _record(name, layer, tensor, report)

    shards, resumed = _write_shards(target, plan.tensors, max_shard_bytes, write)
    reports = join_parts(target, shards)
    _copy_others(checkpoint.directory, target)
    described = quantization_config(rules_to_json(rules), seed, plan.tensors)
    write_config(target, checkpoint.config, described)
    release_directory(target)
    return StreamResult(target, tuple(reports), resumed)


def _separate(source: Path, target: Path) -> Path:
    if target.resolve() == source.resolve():
        raise UsageError(f"{target}: is the source; name another directory.")
    return target


def _kernel(source: Checkpoint, name: str, plan: Plan) -> Array:
    stored = source.load(name)
    assert isinstance(stored, np.ndarray)
    return jnp.asarray(stored.T if plan.layers[name].is_transposed else stored)


def _record(
    name: str, layer: LayerPlan, tensor: Any, report: QuantizationReport
) -> dict[str, Any]:
    record = {
        "tensor": name,
        "path": layer.path,
        "shape": list(tensor.shape),
        **config_to_json(layer.config),
        "stored_bits_per_weight": bits_per_weight(tensor),
        "relative_squared_error": float(report.relative_squared_error),
    }
    if report.decomposition is not None:
        record |= {
            key: float(jnp.max(report.decomposition[key]))
            for key in ("residual", "max_u", "max_v", "num_steps")
        }
        record["converged"] = bool(jnp.all(report.decomposition["converged"]))
    return record


def _write_shards(
    target: Path,
    tensors: Sequence[PlannedTensor],
    max_shard_bytes: int,
    write: WriteTensor,
) -> tuple[list[str], int]:
    """Writes what is missing, then the index; names, and how many were there."""
    shards = plan_shards(tensors, max_shard_bytes)
    names = shard_names(len(shards))
    finished = {name for name in names if (target / name).exists()}
    sizes = [sum(tensor.size for tensor in shard) for shard in shards]
    # Not part of the rate, which would otherwise promise the rest in no time.
    done = sum(n for name, n in zip(names, sizes, strict=True) if name in finished)
    records = []
    with tqdm(
        total=sum(sizes), initial=done, unit="B", unit_scale=True, disable=None
    ) as progress:
        for name, shard in zip(names, shards, strict=True):
            path = target / name
            if name not in finished:
                with open_shard(path, shard) as writer:
                    found = []
                    for tensor in shard:
                        progress.set_description(tensor.name)
                        found.append(write(writer, tensor.name))
                        progress.update(tensor.size)
                    # Before the shard appears: a shard without its report is none.
                    write_part(target, name, [each for each in found if each])
            records.append(record_file(path))
    write_index(target, records)
    return names, len(finished)


def _copy_others(source: Path, target: Path) -> None:
    """Tokenizer, licence and so on: files that are no weights of the model."""
    for path in sorted(source.iterdir()):
        is_extra = path.name == "heads.safetensors"
        if (
            path.name in _OWN
            or path.name.startswith(".")
            or not path.is_file()
            or (path.suffix in _WEIGHTS and not is_extra)
            or path.name.endswith(".index.json")
        ):
            continue
        with atomic_path(target / path.name) as temporary:
            shutil.copyfile(path, temporary)


def dequantize_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Decodes every packed matrix: the original layout and types, as others load it.

    Args:
      source: From `quantize_checkpoint`.
      target: Must not exist, or be empty.
      max_shard_bytes: Of the data of a shard.

    Raises:
      UsageError: If `source` holds nothing packed, or `target` is taken.
      CheckpointError: If a file is missing, damaged, or cannot be written.
    """
    checkpoint = open_checkpoint(source)
    refuse_foreign(checkpoint)
    if not checkpoint.descriptions:
        raise UsageError(f"{source}: holds no packed tensors; it can be used as it is.")
    target = _separate(checkpoint.directory, Path(target))
    digest = fingerprint(checkpoint, Rules(), 0, max_shard_bytes)
    claim_directory(target, digest)
    planned = list(_plain(checkpoint))

    def write(writer: TensorWriter, name: str) -> None:
        if not checkpoint.is_packed(name):
            checkpoint.copy(name, writer.sink(name))
            return
        tensor: Any = checkpoint.load(name)
        matrix = np.asarray(dequantize(tensor))
        is_transposed = checkpoint.described(name).is_transposed
        writer.write(name, matrix.T if is_transposed else matrix)

    shards, _ = _write_shards(target, planned, max_shard_bytes, write)
    remove_parts(target, shards)
    _copy_others(checkpoint.directory, target)
    write_config(target, checkpoint.config)
    release_directory(target)
    return target


def _plain(checkpoint: Checkpoint) -> Iterator[PlannedTensor]:
    for name in checkpoint.names():
        spec = checkpoint.spec(name)
        yield plan_plain(name, spec.dtype, spec.shape)
