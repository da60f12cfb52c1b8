"""`model.safetensors.index.json`: the file of every array, the hash of every file."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from kashin_jax.errors import CheckpointError
from kashin_jax.io.files import read_json, shown, write_json
from kashin_jax.io.safetensors import TensorFile
from kashin_jax.io.writer import FileRecord

__all__ = ["INDEX_NAME", "check_weight_map", "read_index", "write_index"]

INDEX_NAME = "model.safetensors.index.json"

_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}\.safetensors")
_HASH = re.compile(r"[0-9a-f]{64}")


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


def read_index(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """File of every array, and hash of every file; none where none are recorded.

    Raises:
      CheckpointError: If the index is damaged, or names a file outside its directory.
    """
    content = read_json(path)
    weight_map, metadata = content.get("weight_map"), content.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path}: has no `weight_map`; copy or download the index again."
        )
    for name in weight_map.values():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise CheckpointError(
                f"{path}: names {shown(name)}, which is no safetensors file of its own "
                "directory; copy or download the index again."
            )
    sha256 = metadata.get("sha256", {}) if isinstance(metadata, dict) else None
    if not isinstance(sha256, dict) or not all(
        isinstance(value, str) and _HASH.fullmatch(value) for value in sha256.values()
    ):
        raise CheckpointError(
            f"{path}: `metadata` or its `sha256` is malformed; copy or download the "
            "index again."
        )
    return weight_map, sha256


def check_weight_map(
    weight_map: Mapping[str, str], files: Mapping[str, TensorFile], path: Path
) -> None:
    """Raises CheckpointError unless the index at `path` and all headers agree."""
    found: dict[str, str] = {}
    for shard, file in files.items():
        for name in file.entries:
            if name in found:
                raise CheckpointError(
                    f"{path}: tensor {shown(name)} is in {found[name]} and in {shard}; "
                    "copy or download the checkpoint again."
                )
            found[name] = shard
    for name in sorted(weight_map.keys() | found.keys()):
        if weight_map.get(name) != found.get(name):
            raise CheckpointError(
                f"{path}: places tensor {shown(name)} in {weight_map.get(name)}, but "
                f"it is in {found.get(name)}; copy or download the checkpoint again."
            )
