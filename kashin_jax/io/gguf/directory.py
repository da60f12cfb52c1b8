"""The directory that a GGUF file becomes: all but its matrices, which stay there."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kashin_jax.errors import CheckpointError
from kashin_jax.io.files import (
    atomic_path,
    hash_file,
    make_directory,
    read_json,
    unreadable,
    write_json,
)
from kashin_jax.io.gguf.file import (
    GGUFFile,
    GGUFPlace,
    check_kinds,
    decoded_dtype,
)
from kashin_jax.io.gguf.header import GGUFHeader, GGUFTensor, read_header
from kashin_jax.io.gguf.layout import (
    ROPE_FACTORS,
    hugging_face_config,
    hugging_face_places,
)
from kashin_jax.io.gguf.tokenizer import (
    special_tokens,
    tokenizer_config,
    tokenizer_json,
)
from kashin_jax.io.safetensors import RANKS, TensorSpec
from kashin_jax.version import library_version

__all__ = ["gguf_directory", "open_gguf"]

# Hidden: it goes along with nothing.
_TABLE = ".gguf.json"
# To be raised when the content of such a directory changes.
_LAYOUT = "1"


def gguf_directory(path: Path) -> Path:
    """The directory of a GGUF file in the cache, made if it is not there yet.

    It has `config.json`, `tokenizer.json` and `tokenizer_config.json` as Hugging Face
    has them, and the places of the tensors: some megabytes, whatever the size of the
    file. `open_checkpoint` reads it. It lies in `kashin_jax/gguf` of `XDG_CACHE_HOME`,
    or of `~/.cache`; whoever deletes it only costs the seconds that making it takes.

    Raises:
      CheckpointError: If the file is damaged, one of several parts, or of an
        architecture that is not read, or the directory cannot be written.
      UsageError: If the package `gguf` or `tokenizers` is not installed.
    """
    path = path.resolve()
    status = _status(path)
    parts = [str(path), *map(str, _identity(status)), library_version(), _LAYOUT]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    directory = _cache() / f"{path.stem}-{digest}"
    if not (directory / "config.json").exists():
        _write(read_header(path), directory, _identity(status))
    return directory


def open_gguf(directory: Path) -> tuple[GGUFFile, str] | None:
    """The file that a directory of the cache is of, and its hash; None for others.

    Raises:
      CheckpointError: If the file is gone or has changed, or the directory is damaged.
    """
    # Elsewhere such a table could name any file of the machine.
    if directory.resolve().parent != _cache() or not (directory / _TABLE).is_file():
        return None
    table = read_json(directory / _TABLE)
    try:
        path, identity, sha256 = (table[key] for key in ("path", "identity", "sha256"))
        places = {
            name: GGUFPlace(GGUFTensor(kind, tuple(shape), start, size), heads)
            for name, (kind, shape, start, size, heads) in table["tensors"].items()
        }
        file = _file(Path(path), places)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{directory}: is damaged; delete it, and it is made anew."
        ) from error
    if _identity(_status(file.path)) != identity:
        raise CheckpointError(
            f"{file.path}: has changed while in use; name the file again."
        )
    return file, sha256


def _file(path: Path, places: Mapping[str, GGUFPlace]) -> GGUFFile:
    specs = {
        name: TensorSpec(decoded_dtype(place.tensor.kind), place.tensor.shape)
        for name, place in places.items()
    }
    # As in a safetensors file of the same arrays, so that shards are alike.
    order = sorted(specs, key=lambda name: (-RANKS[specs[name].dtype], name))
    in_order = {name: specs[name] for name in order}
    return GGUFFile(path=path, specs=in_order, metadata={}, places=places)


def _write(header: GGUFHeader, directory: Path, identity: list[int]) -> None:
    """Writes all files of a directory, `config.json` last."""
    places = hugging_face_places(header)
    check_kinds(header.path, header.tensors)
    config = hugging_face_config(header, _rope_factors(header))
    config |= special_tokens(header)
    config.pop("unk_token_id", None)
    config["gguf"]["sha256"] = sha256 = hash_file(header.path)
    tokenizer, settings = tokenizer_json(header), tokenizer_config(header)
    table = {
        "path": str(header.path),
        "identity": identity,
        "sha256": sha256,
        "tensors": {
            name: [*place.tensor, place.heads] for name, place in places.items()
        },
    }
    make_directory(directory)
    with atomic_path(directory / "tokenizer.json") as temporary:
        temporary.write_text(tokenizer, "utf-8")
    write_json(directory / "tokenizer_config.json", settings)
    write_json(directory / _TABLE, table)
    write_json(directory / "config.json", config)


def _rope_factors(header: GGUFHeader) -> np.ndarray | None:
    tensor = header.tensors.get(ROPE_FACTORS)
    if tensor is None:
        return None
    return _file(header.path, {ROPE_FACTORS: GGUFPlace(tensor, 0)}).read(ROPE_FACTORS)


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home).resolve() / "kashin_jax" / "gguf"


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise unreadable(path, error) from error


def _identity(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns]
