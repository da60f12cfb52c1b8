"""Reading a checkpoint directory of safetensors files, quantized or not."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.io.dtypes import TensorSpec
from kashin_jax.io.files import parse_json, read_json, shown
from kashin_jax.io.format import Described, parse_description
from kashin_jax.io.index import INDEX_NAME, check_weight_map, read_index
from kashin_jax.io.packed import from_leaves
from kashin_jax.io.safetensors import (
    TensorFile,
    hash_file,
    read_header,
    read_tensor,
)
from kashin_jax.io.schema import METADATA_KEY, check_schema
from kashin_jax.tensors import QuantizedTensor

__all__ = ["Checkpoint", "join_files", "open_checkpoint", "read_config"]

_SINGLE = "model.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A directory whose headers, index and descriptions were found sound.

    No data were read. Names are those of the original checkpoint: the leaves of a
    packed tensor are one name.

    Attributes:
      directory: Where it lies.
      config: `config.json`; empty where there is none.
      files: The shards, by file name.
      places: File name of every tensor.
      descriptions: What the shards say about packed tensors.
      sha256: Of every shard, as the index has it; empty if it has none.
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
        """Whether a tensor is stored packed; UsageError if there is none such."""
        self._place(name)
        return name in self.descriptions

    def described(self, name: str) -> Described:
        """Type, layout, orientation and leaves of a packed tensor.

        Raises:
          UsageError: If it is not packed, or there is none such.
        """
        if not self.is_packed(name):
            raise UsageError(f"{self.directory}: {shown(name)} is not packed.")
        return parse_description(self.descriptions[name], shown(name))

    def spec(self, name: str) -> TensorSpec:
        """Type and shape before quantizing, in the orientation of the original."""
        if self.is_packed(name):
            described = self.described(name)
            return TensorSpec(described.layout.dtype, described.shape)
        return self.file_of(name).entry(name).spec

    def file_of(self, name: str) -> TensorFile:
        """The shard of a tensor, for `read_rows` and `copy_bytes`."""
        return self.files[self._place(name)]

    def load(self, name: str) -> Shaped[np.ndarray, "..."] | QuantizedTensor:
        """One tensor; a packed one as it is, `[in, out]` whatever the original was.

        Raises:
          UsageError: If there is none such.
          CheckpointError: If its data are damaged; names the leaf.
        """
        file = self.file_of(name)
        if name not in self.descriptions:
            return read_tensor(file, name)
        leaves = self.described(name).specs
        arrays = {leaf: read_tensor(file, f"{name}.{leaf}") for leaf in leaves}
        try:
            return from_leaves(self.descriptions[name], arrays, name=name)
        except CheckpointError as error:
            raise CheckpointError(f"{file.path}: {error}") from error

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


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Opens a directory with `model.safetensors`, or shards and their index.

    Reads JSON and headers only, and trusts none of it.

    Raises:
      CheckpointError: If a file is missing, damaged or of a newer schema, the index
        names a file outside the directory, or index, headers and descriptions do not
        agree; names the file and the tensor.
    """
    directory = Path(directory)
    index_path = directory / INDEX_NAME
    config = read_config(directory)
    weight_map: dict[str, str] | None = None
    sha256: dict[str, str] = {}
    if index_path.exists():
        weight_map, sha256 = read_index(index_path)
    shards = [_SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    if _SINGLE not in shards and (directory / _SINGLE).exists():
        raise CheckpointError(
            f"{directory}: holds {_SINGLE} and an index that does not name it; remove "
            "one of them."
        )
    files = {name: _open_shard(directory / name) for name in shards}
    if weight_map is not None:
        check_weight_map(weight_map, files, index_path)
    if sha256 and sha256.keys() != files.keys():
        raise CheckpointError(
            f"{index_path}: `sha256` must name the same files as `weight_map`; copy or "
            "download it again."
        )
    return join_files(directory, config, files, sha256)


def join_files(
    directory: Path,
    config: Mapping[str, Any],
    files: Mapping[str, TensorFile],
    sha256: Mapping[str, str],
) -> Checkpoint:
    """The checkpoint that files make up.

    Raises:
      CheckpointError: If a tensor is there twice, or descriptions agree neither with
        the headers nor with the configuration.
    """
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


def read_config(directory: Path) -> Mapping[str, Any]:
    """`config.json`; empty where there is none.

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


def _open_shard(path: Path) -> TensorFile:
    # A pipe or device would block, or never end.
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: is not a regular file; copy it again.")
    return read_header(path)


def _tensors(
    files: Mapping[str, TensorFile],
) -> tuple[dict[str, str], dict[str, Mapping[str, Any]]]:
    places: dict[str, str] = {}
    descriptions: dict[str, Mapping[str, Any]] = {}
    for shard, file in files.items():
        described = _descriptions(file)
        owners = _owners(file, described)
        for stored in file.entries:
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
            entry = file.entries.get(stored)
            if entry is None or entry.spec != spec:
                got = "nothing" if entry is None else f"{entry.dtype} {entry.shape}"
                raise CheckpointError(
                    f"{file.path}: {shown(stored)} must be {spec.dtype} {spec.shape} "
                    f"by its description. Got {got}; quantize it again, or copy or "
                    "download the file again."
                )
            owners[stored] = name
    return owners
