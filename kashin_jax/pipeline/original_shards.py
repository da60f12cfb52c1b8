"""Which file every tensor of the original was in, so that it comes back in that one."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from kashin_jax.errors import CheckpointError
from kashin_jax.io import (
    MAX_SHARD_BYTES,
    Checkpoint,
    PlannedTensor,
    atomic_path,
    read_json,
    write_json,
)

__all__ = ["ORIGINAL_INDEX", "copy_shards", "keep_shards", "original_shards"]

ORIGINAL_INDEX = "original.safetensors.index.json"
"""The file of a quantized checkpoint that holds them; no reader needs it to decode."""

_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,187}\.safetensors")


def keep_shards(source: Checkpoint, target: Path) -> None:
    """Writes which file of a source has which tensors, if `dequantize` cannot know it.

    Raises:
      CheckpointError: If the file cannot be written.
    """
    sizes = [file.path.stat().st_size for file in source.files.values()]
    if len(sizes) > 1 or sum(sizes) > MAX_SHARD_BYTES:
        # Of Flax's msgpack the names differ, and so do the files.
        if all(_SHARD.fullmatch(name) for name in source.files):
            write_json(target / ORIGINAL_INDEX, {"weight_map": dict(source.places)})


def copy_shards(quantized: Checkpoint, target: Path) -> None:
    """Copies what `keep_shards` wrote for a checkpoint, if it did.

    Raises:
      CheckpointError: If the file cannot be written.
    """
    if (index := quantized.directory / ORIGINAL_INDEX).exists():
        with atomic_path(target / ORIGINAL_INDEX) as temporary:
            shutil.copyfile(index, temporary)


def original_shards(
    quantized: Checkpoint, tensors: Sequence[PlannedTensor]
) -> list[tuple[str, list[PlannedTensor]]] | None:
    """Tensors by the file that they came from; None where that was not kept.

    Raises:
      CheckpointError: If the file is damaged, or of another checkpoint.
    """
    path = quantized.directory / ORIGINAL_INDEX
    if not path.exists():
        return None
    places = read_json(path).get("weight_map")
    shards: dict[str, list[PlannedTensor]] = {}
    for tensor in tensors:
        name = places.get(tensor.name) if isinstance(places, dict) else None
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise CheckpointError(
                f"{path}: names no file of `{tensor.name}`; remove it, which leaves "
                "the cut into files to `dequantize`."
            )
        shards.setdefault(name, []).append(tensor)
    return sorted(shards.items())
