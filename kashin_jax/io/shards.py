"""Writing a checkpoint: the plan of its shards, the shards, index and `config.json`."""

import contextlib
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from kashin_jax.errors import UsageError
from kashin_jax.io.checkpoint import INDEX_NAME
from kashin_jax.io.files import hash_file, make_directory, shown, write_json
from kashin_jax.io.format import (
    METADATA_KEY,
    describe,
    leaf_specs,
    schema_of,
    to_leaves,
)
from kashin_jax.io.safetensors import (
    TensorSpec,
    TensorWriter,
    open_safetensors,
    open_writer,
)
from kashin_jax.tensors import QuantizedTensor
from kashin_jax.version import library_version

__all__ = [
    "MAX_SHARD_BYTES",
    "FileRecord",
    "PlannedTensor",
    "open_shard",
    "plan_packed",
    "plan_plain",
    "plan_shards",
    "quantization_config",
    "record_file",
    "save_checkpoint",
    "shard_names",
    "write_config",
    "write_index",
    "write_stored",
]

MAX_SHARD_BYTES = 5 * 10**9
"""The usual limit of a shard on model hubs."""


class PlannedTensor(NamedTuple):
    """A tensor to be written.

    Attributes:
      name: As in the original checkpoint.
      specs: What is stored, by its name in the file: the tensor itself, or the leaves
        of a packed one as `NAME.LEAF`.
      description: How a packed tensor is read; None for one stored as it is.
    """

    name: str
    specs: Mapping[str, TensorSpec]
    description: Mapping[str, Any] | None = None

    @property
    def size(self) -> int:
        """Bytes of the data."""
        return sum(spec.size for spec in self.specs.values())


def plan_plain(name: str, dtype: str, shape: Sequence[int]) -> PlannedTensor:
    """A tensor that is stored as it is."""
    return PlannedTensor(name, {name: TensorSpec(dtype, tuple(shape))})


def plan_packed(name: str, tensor: Any, *, is_transposed: bool) -> PlannedTensor:
    """A tensor stored packed.

    Args:
      name: As in the original checkpoint.
      tensor: Packed, or what `jax.eval_shape` gives for it.
      is_transposed: Whether it was `[out, in]` there.

    Raises:
      UsageError: If no reader would accept it.
    """
    try:
        description = describe(tensor, is_transposed=is_transposed)
    except UsageError as error:
        raise UsageError(f"`{name}`: {error}") from error
    specs = {f"{name}.{leaf}": spec for leaf, spec in leaf_specs(tensor).items()}
    return PlannedTensor(name, specs, description)


def plan_shards(
    tensors: Sequence[PlannedTensor], max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[list[PlannedTensor]]:
    """Deals tensors to shards in order; one larger than a shard has its own.

    Raises:
      UsageError: If two tensors would be stored under one name.
    """
    if max_shard_bytes < 1:
        raise UsageError(f"`max_shard_bytes` must be positive. Got {max_shard_bytes}.")
    taken: set[str] = set()
    shards: list[list[PlannedTensor]] = [[]]
    room = max_shard_bytes
    for tensor in tensors:
        if taken & (names := {tensor.name, *tensor.specs}):
            raise UsageError(
                f"Two tensors are stored as {shown(min(taken & names))}; rename one."
            )
        taken |= names
        if tensor.size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.size
    return shards


def shard_names(count: int) -> list[str]:
    """`model.safetensors`, or `model-00001-of-00002.safetensors` and so on."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


@contextlib.contextmanager
def open_shard(
    path: str | Path, tensors: Sequence[PlannedTensor]
) -> Iterator[TensorWriter]:
    """Lends the writer of a shard that says itself how its packed tensors are read.

    Raises:
      UsageError: If an array lacks bytes when the block ends.
      CheckpointError: If the file cannot be written.
    """
    described = {t.name: t.description for t in tensors if t.description is not None}
    content = {"schema_version": schema_of(described.values()), "tensors": described}
    # Readers of transformers refuse files that do not say whose layout they have.
    metadata = {"format": "pt"}
    if described:
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        metadata[METADATA_KEY] = text
    specs = {name: spec for t in tensors for name, spec in t.specs.items()}
    with open_writer(path, specs, metadata) as writer:
        yield writer


def write_stored(
    writer: TensorWriter, name: str, value: Shaped[np.ndarray, "..."] | QuantizedTensor
) -> None:
    """Writes a tensor that was planned, packed or as it is.

    Raises:
      UsageError: If it was planned otherwise.
    """
    if isinstance(value, np.ndarray):
        writer.write(name, value)
        return
    for leaf, array in to_leaves(value).items():
        writer.write(f"{name}.{leaf}", array)


class FileRecord(NamedTuple):
    """The entry of one file in an index.

    Attributes:
      name: Without its directory.
      tensors: Names of its arrays, in the order of their data.
      size: Bytes of the arrays, the header not counted.
      sha256: Hash of the whole file, in hexadecimal.
    """

    name: str
    tensors: tuple[str, ...]
    size: int
    sha256: str


def record_file(path: str | Path) -> FileRecord:
    """The entry of a shard in the index, read from the shard itself.

    Raises:
      CheckpointError: If the file is missing or damaged.
    """
    file = open_safetensors(path)
    size = sum(spec.size for spec in file.specs.values())
    return FileRecord(file.path.name, tuple(file.specs), size, hash_file(file.path))


def write_index(directory: str | Path, shards: Sequence[FileRecord]) -> None:
    """Writes `model.safetensors.index.json` for shards that lie there already.

    Raises:
      CheckpointError: If it cannot be written.
    """
    weight_map = {name: shard.name for shard in shards for name in shard.tensors}
    metadata = {
        "total_size": sum(shard.size for shard in shards),
        "sha256": {shard.name: shard.sha256 for shard in shards},
    }
    content = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    write_json(Path(directory) / INDEX_NAME, content)


def quantization_config(
    rules: Mapping[str, Any], seed: int, tensors: Sequence[PlannedTensor]
) -> dict[str, Any]:
    """The field of `config.json` that describes quantization; `rules` are JSON."""
    packed = [t for t in tensors if t.description is not None]
    weights = sum(_weights(t.description) for t in packed if t.description)
    return {
        "quant_method": "kashin",
        "schema_version": schema_of(t.description for t in packed if t.description),
        "library_version": library_version(),
        "rules": dict(rules),
        "seed": seed,
        "tensors": {
            "packed": len(packed),
            "packed_weights": weights,
            "packed_bits": 8 * sum(t.size for t in packed),
            "plain": len(tensors) - len(packed),
        },
    }


def _weights(description: Mapping[str, Any]) -> int:
    return math.prod([*description.get("stack", ()), *description["layout"]["shape"]])


def write_config(
    directory: str | Path,
    config: Mapping[str, Any],
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Writes `config.json`; an older `quantization_config` in it is dropped.

    Raises:
      CheckpointError: If it cannot be written.
    """
    content = {k: v for k, v in config.items() if k != "quantization_config"}
    if quantization is not None:
        content["quantization_config"] = dict(quantization)
    write_json(Path(directory) / "config.json", content)


def save_checkpoint(
    directory: str | Path,
    tensors: Mapping[str, Shaped[np.ndarray, "..."] | QuantizedTensor],
    config: Mapping[str, Any],
    *,
    transposed: Collection[str] = (),
    rules: Mapping[str, Any] | None = None,
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a whole checkpoint whose tensors are at hand, `config.json` last.

    Args:
      directory: Created where it does not exist.
      tensors: By name; arrays are stored as they are.
      config: The model's own `config.json`.
      transposed: Names of packed tensors that were `[out, in]` originally.
      rules: The rules that were asked for, as JSON; None leaves `quantization_config`
        out.
      seed: The seed that was asked for.
      max_shard_bytes: Limit of the data of a shard.

    Raises:
      UsageError: If a tensor cannot be stored.
      CheckpointError: If a file cannot be written.
    """
    directory = Path(directory)
    make_directory(directory)
    planned = [
        plan_plain(name, value.dtype.name, value.shape)
        if isinstance(value, np.ndarray)
        else plan_packed(name, value, is_transposed=name in transposed)
        for name, value in tensors.items()
    ]
    shards = plan_shards(planned, max_shard_bytes)
    records = []
    for name, shard in zip(shard_names(len(shards)), shards, strict=True):
        with open_shard(directory / name, shard) as writer:
            for tensor in shard:
                write_stored(writer, tensor.name, tensors[tensor.name])
        records.append(record_file(directory / name))
    write_index(directory, records)
    quantization = None if rules is None else quantization_config(rules, seed, planned)
    write_config(directory, config, quantization)
