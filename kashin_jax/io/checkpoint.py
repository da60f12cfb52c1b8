"""Opening a checkpoint directory, whatever its files are, quantized or not.

Nothing in it is trusted: index, headers, descriptions and `config.json` have to agree
before a tensor is read.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.io.files import hash_file, parse_json, read_json, shown
from kashin_jax.io.format import (
    METADATA_KEY,
    Described,
    check_schema,
    from_leaves,
    parse_description,
)
from kashin_jax.io.gguf import open_gguf
from kashin_jax.io.hub import WeightFiles, checkpoint_directory, find_weights
from kashin_jax.io.safetensors import Sink, TensorFile, TensorSpec, open_safetensors
from kashin_jax.io.whole_files import WHOLE_SUFFIXES, open_whole_files, pytorch_name
from kashin_jax.tensors import QuantizedTensor

__all__ = ["INDEX_NAME", "Checkpoint", "open_checkpoint"]

INDEX_NAME = "model.safetensors.index.json"
"""The file of every array and the hash of every file."""

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A directory whose headers, index and descriptions were found sound.

    Of safetensors no data were read. Names are those of the original checkpoint, in
    the spelling of PyTorch: the leaves of a packed tensor are one name.

    Attributes:
      directory: Where it lies.
      config: `config.json`; empty where there is none.
      files: The shards, by file name.
      places: File name of every tensor.
      descriptions: What the shards say about packed tensors.
      sha256: Hash of every shard, as the index has it; empty if it has none.
    """

    directory: Path
    config: Mapping[str, Any]
    files: Mapping[str, TensorFile]
    places: Mapping[str, str]
    descriptions: Mapping[str, Mapping[str, Any]]
    sha256: Mapping[str, str]

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """`quantization_config` of `config.json`, whatever method it names."""
        found: Mapping[str, Any] | None = self.config.get("quantization_config")
        return found

    def names(self) -> list[str]:
        """All tensors, shard by shard in the order of their data."""
        return list(self.places)

    def is_packed(self, name: str) -> bool:
        """Whether a tensor is stored packed; UsageError if there is no such tensor."""
        self._place(name)
        return name in self.descriptions

    def described(self, name: str) -> Described:
        """Type, layout, orientation and leaves of a packed tensor.

        Raises:
          UsageError: If it is not packed, or there is no such tensor.
        """
        if not self.is_packed(name):
            raise UsageError(f"{self.directory}: {shown(name)} is not packed.")
        return parse_description(self.descriptions[name], shown(name))

    def spec(self, name: str) -> TensorSpec:
        """Type and shape before quantizing, in the orientation of the original."""
        if self.is_packed(name):
            described = self.described(name)
            return TensorSpec(described.layout.dtype, described.shape)
        return self.file_of(name).spec(name)

    def file_of(self, name: str) -> TensorFile:
        """The shard of a tensor."""
        return self.files[self._place(name)]

    def load(self, name: str) -> Shaped[np.ndarray, "..."] | QuantizedTensor:
        """One tensor; a packed one as it is, `[in, out]` whatever the original was.

        Raises:
          UsageError: If there is no such tensor.
          CheckpointError: If its data are damaged; names the leaf.
        """
        file = self.file_of(name)
        if name not in self.descriptions:
            return file.read(name)
        leaves = self.described(name).specs
        arrays = {leaf: file.read(f"{name}.{leaf}") for leaf in leaves}
        try:
            return from_leaves(self.descriptions[name], arrays, name=name)
        except CheckpointError as error:
            raise CheckpointError(f"{file.path}: {error}") from error

    def copy(self, name: str, sink: Sink) -> None:
        """Hands the bytes of a tensor to `sink.write`, some megabytes at a time.

        Raises:
          UsageError: If there is no such tensor, or it is packed.
          CheckpointError: If its file has changed since it was opened.
        """
        self.file_of(name).copy(name, sink)

    def verify(self) -> list[str]:
        """Names of the shards whose bytes are not those that the index was made for.

        Raises:
          CheckpointError: If the index has no hashes, or a shard cannot be read.
        """
        if not self.sha256:
            raise CheckpointError(
                f"{self.directory}: its index records no `sha256`, so there is nothing "
                "to verify; only checkpoints of `kashin quantize` have it."
            )
        return [
            name
            for name, file in self.files.items()
            if hash_file(file.path) != self.sha256[name]
        ]

    def _place(self, name: str) -> str:
        if name not in self.places:
            raise UsageError(f"{self.directory}: has no tensor {shown(name)}.")
        return self.places[name]


def open_checkpoint(path_or_id: str | Path) -> Checkpoint:
    """Opens a directory of safetensors, of Flax's or PyTorch's files, or a GGUF file.

    One file or shards and their index; trusts none of it. Of safetensors only headers
    are read, and memory is that of one tensor whenever one is loaded. Files of Flax
    and PyTorch are read whole, one at a time, so that the largest of them bounds it.
    Tensors of a GGUF file are decoded one by one, under Hugging Face's names.

    Args:
      path_or_id: A directory, a GGUF file, or a hub id, which is downloaded.

    Raises:
      CheckpointError: If a file is missing, damaged or of a newer schema, the index
        names a file outside the directory, or index, headers and descriptions do not
        agree; names the file and the tensor.
    """
    directory = checkpoint_directory(path_or_id)
    if (found := open_gguf(directory)) is not None:
        return _of_gguf(directory, *found)
    weights = find_weights(directory)
    config = _read_config(directory)
    index = directory / weights.index_file
    weight_map, sha256 = _read_index(index, weights) if index.exists() else ({}, {})
    names = sorted(set(weight_map.values())) or [weights.single]
    if weights.single not in names and (directory / weights.single).exists():
        raise CheckpointError(
            f"{directory}: holds {weights.single} and an index that does not name it; "
            "remove one of them."
        )
    files = _open_files([directory / name for name in names])
    if weight_map:
        _check_weight_map(weight_map, files, index)
    if sha256 and sha256.keys() != files.keys():
        raise CheckpointError(
            f"{index}: `sha256` must name the same files as `weight_map`; copy or "
            "download it again."
        )
    places, descriptions = _tensors(files)
    _check_count(config, len(descriptions), directory / "config.json")
    return Checkpoint(
        directory=directory,
        config=config,
        files=files,
        places=places,
        descriptions=descriptions,
        sha256=sha256,
    )


def _of_gguf(directory: Path, file: TensorFile, sha256: str) -> Checkpoint:
    name = file.path.name
    return Checkpoint(
        directory=directory,
        config=_read_config(directory),
        files={name: file},
        places=dict.fromkeys(file.specs, name),
        descriptions={},
        sha256={name: sha256},
    )


def _open_files(paths: Sequence[Path]) -> Mapping[str, TensorFile]:
    if paths[0].suffix in WHOLE_SUFFIXES:
        return open_whole_files(paths)
    return {path.name: open_safetensors(path) for path in paths}


def _read_index(
    path: Path, weights: WeightFiles
) -> tuple[dict[str, str], dict[str, str]]:
    """File of every array, and hash of every file; none where none are recorded.

    Raises:
      CheckpointError: If the index is damaged, or names a file that is missing, or one
        outside its directory.
    """
    content = read_json(path)
    weight_map, metadata = content.get("weight_map"), content.get("metadata")
    metadata = {} if metadata is None else metadata
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path}: has no `weight_map`; copy or download the index again."
        )
    for name in weight_map.values():
        if not _is_plain(name, weights.suffix):
            raise CheckpointError(
                f"{path}: names {shown(name)}, which is not a {weights.suffix} file of "
                "its own directory; copy or download the index again."
            )
        if not (path.parent / name).exists():
            raise CheckpointError(
                f"{path}: names {shown(name)}, which is missing; copy or download it."
            )
    sha256 = metadata.get("sha256") if isinstance(metadata, dict) else metadata
    sha256 = {} if sha256 is None else sha256
    if not isinstance(sha256, dict) or not all(
        isinstance(value, str) and _HASH.fullmatch(value) for value in sha256.values()
    ):
        raise CheckpointError(
            f"{path}: `metadata` or its `sha256` is malformed; copy or download the "
            "index again."
        )
    if weights.suffix == ".msgpack":
        weight_map = {pytorch_name(name): file for name, file in weight_map.items()}
    return weight_map, sha256


def _is_plain(name: Any, suffix: str) -> bool:
    # By name, not by resolving: the hub's cache is made of links that lead elsewhere.
    return (
        isinstance(name, str)
        and name.endswith(suffix)
        and _FILE_NAME.fullmatch(name.removesuffix(suffix)) is not None
    )


def _check_weight_map(
    weight_map: Mapping[str, str], files: Mapping[str, TensorFile], path: Path
) -> None:
    """Raises CheckpointError if a tensor is not where the index at `path` has it.

    What the index leaves out and a file holds is part of the checkpoint all the same.
    """
    found: dict[str, str] = {}
    for shard, file in files.items():
        for name in file.specs:
            if name in found:
                raise CheckpointError(
                    f"{path}: tensor {shown(name)} is in {found[name]} and in {shard}; "
                    "copy or download the checkpoint again."
                )
            found[name] = shard
    for name in sorted(weight_map):
        if weight_map[name] != found.get(name):
            raise CheckpointError(
                f"{path}: places tensor {shown(name)} in {weight_map[name]}, but "
                f"it is in {found.get(name)}; copy or download the checkpoint again."
            )


def _read_config(directory: Path) -> Mapping[str, Any]:
    """The content of `config.json`; empty where there is none.

    Raises:
      CheckpointError: If it is damaged or of a newer schema.
    """
    path = directory / "config.json"
    config = read_json(path) if path.exists() else {}
    _check_quantization(config, path)
    return config


def _check_quantization(config: Mapping[str, Any], path: Path) -> None:
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    if not isinstance(quantization, dict):
        raise CheckpointError(
            f"{path}: `quantization_config` must be an object; copy or download it "
            "again."
        )
    if quantization.get("quant_method") == "kashin":
        check_schema(quantization.get("schema_version"), str(path))


def _check_count(config: Mapping[str, Any], found: int, path: Path) -> None:
    # Programs that copy tensors may drop a file's metadata, and with them the
    # descriptions: packed leaves would pass for tensors of their own.
    quantization = config.get("quantization_config") or {}
    summary = quantization.get("tensors")
    if quantization.get("quant_method") != "kashin" or not isinstance(summary, dict):
        return
    if summary.get("packed", found) != found:
        raise CheckpointError(
            f"{path}: counts {shown(summary['packed'])} packed tensors, but the shards "
            f"describe {found}; copy or download the checkpoint again."
        )


def _tensors(
    files: Mapping[str, TensorFile],
) -> tuple[dict[str, str], dict[str, Mapping[str, Any]]]:
    places: dict[str, str] = {}
    descriptions: dict[str, Mapping[str, Any]] = {}
    for shard, file in files.items():
        described = _descriptions(file)
        owners = _owners(file, described)
        for stored in file.specs:
            name = owners.get(stored, stored)
            is_taken = name in described and stored not in owners
            if is_taken or places.get(name, shard) != shard:
                raise CheckpointError(
                    f"{file.path}: tensor {shown(name)} is there twice; copy or "
                    "download the checkpoint again."
                )
            places[name] = shard
        descriptions |= described
    return places, descriptions


def _descriptions(file: TensorFile) -> dict[str, Any]:
    # What stands under a name has not been looked at: `_owners` checks it.
    if METADATA_KEY not in file.metadata:
        return {}
    where = f"{file.path}: `{METADATA_KEY}`"
    content = parse_json(file.metadata[METADATA_KEY], where)
    check_schema(content.get("schema_version"), where)
    tensors = content.get("tensors")
    if not isinstance(tensors, dict):
        raise CheckpointError(
            f"{where}: has no `tensors`; copy or download the file again."
        )
    return tensors


def _owners(file: TensorFile, descriptions: Mapping[str, Any]) -> dict[str, str]:
    """The packed tensor that each leaf belongs to, all of them being there."""
    owners: dict[str, str] = {}
    for name, description in descriptions.items():
        described = parse_description(description, f"{file.path}: {shown(name)}")
        for leaf, spec in described.specs.items():
            stored = f"{name}.{leaf}"
            found = file.specs.get(stored)
            if found != spec:
                got = "nothing" if found is None else f"{found.dtype} {found.shape}"
                raise CheckpointError(
                    f"{file.path}: {shown(stored)} must be {spec.dtype} {spec.shape} "
                    f"by its description. Got {got}; quantize it again, or copy or "
                    "download the file again."
                )
            owners[stored] = name
    return owners
