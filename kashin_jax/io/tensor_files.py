"""Reading the tensors of a checkpoint directory, one at a time, in any of its formats.

Tensors come as NumPy arrays in the precision they are stored in. Damaged files end in
a `CheckpointError` that names the file.
"""

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np

from kashin_jax.errors import CheckpointError
from kashin_jax.io.flax_files import find_arrays, read_array

__all__ = ["choose_weights", "find_weights", "iter_tensors", "read_json"]

Tensors = Iterator[tuple[str, np.ndarray]]


class WeightFiles(NamedTuple):
    """Which files hold the weights: one, or what an index lists."""

    stem: str
    suffix: str
    sharded: bool

    @property
    def entry(self) -> str:
        """The file to open first."""
        return f"{self.stem}{self.suffix}" + (".index.json" if self.sharded else "")

    @property
    def patterns(self) -> list[str]:
        """Glob patterns of all files involved."""
        shards = [f"{self.stem}-*-of-*{self.suffix}"] if self.sharded else []
        return [self.entry, *shards]


_PREFERENCE = [
    WeightFiles(stem, suffix, sharded)
    for stem, suffix in (
        ("model", ".safetensors"),
        ("flax_model", ".msgpack"),
        ("pytorch_model", ".bin"),
    )
    for sharded in (False, True)
]


def choose_weights(names: Collection[str]) -> WeightFiles | None:
    """The preferred weights among file names: safetensors, msgpack, then torch."""
    return next((files for files in _PREFERENCE if files.entry in names), None)


def find_weights(directory: Path) -> list[Path]:
    """The weight files of a checkpoint directory, all of them present.

    Raises:
      CheckpointError: If there are none, or an index is damaged, names a file that is
        missing, or one outside the directory.
    """
    files = choose_weights({path.name for path in directory.iterdir()})
    if files is None:
        expected = ", ".join(f.entry for f in _PREFERENCE if not f.sharded)
        raise CheckpointError(
            f"{directory}: holds no weights; put one of {expected} (or its shards and "
            "index) there."
        )
    if not files.sharded:
        return [directory / files.entry]
    index = directory / files.entry
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: has no `weight_map`; download the index again."
        )
    return [_shard(index, name) for name in sorted(set(map(str, weight_map.values())))]


def _shard(index: Path, name: str) -> Path:
    # By name, not by resolving: the hub's cache is made of links that lead elsewhere.
    plain = PurePosixPath(name).name == PureWindowsPath(name).name == name
    if not plain or name in ("", ".."):
        raise CheckpointError(
            f"{index}: names {name!r}, which is not a file of its own directory; "
            "download the index again."
        )
    if not (path := index.parent / name).is_file():
        raise CheckpointError(
            f"{index}: names {name!r}, which is missing; download it."
        )
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      CheckpointError: If the file is missing, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: is missing; download it.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: is not valid JSON ({error}); download it again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: is not a JSON object; download it again.")
    return content


def iter_tensors(path: Path) -> Tensors:
    """Names and values of the tensors in one file; the suffix tells the format.

    Args:
      path: A `.safetensors`, `.msgpack` or `.bin` file.

    Yields:
      The name as stored, and the value.

    Raises:
      CheckpointError: If the file is truncated or damaged, or torch is needed and not
        installed.
    """
    read = _READERS[path.suffix]
    try:
        yield from read(path)
    except (CheckpointError, MemoryError):
        raise
    # Decoders meet damaged bytes with exceptions of every kind.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: is truncated or damaged ({reason}); download it again."
        ) from error


def _read_safetensors(path: Path) -> Tensors:
    import safetensors

    with safetensors.safe_open(path, framework="np") as file:
        for name in file.keys():
            yield name, file.get_tensor(name)


def _read_msgpack(path: Path) -> Tensors:
    for name, array in find_arrays(path).items():
        yield name, read_array(path, array)


def _read_torch(path: Path) -> Tensors:
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"{path}: reading it needs PyTorch; `pip install torch`, or convert it to "
            "model.safetensors."
        ) from error
    import ml_dtypes

    tensors = torch.load(path, map_location="cpu", weights_only=True)
    while tensors:
        name, tensor = tensors.popitem()
        if tensor.dtype == torch.bfloat16:
            # NumPy has no bfloat16 of its own, so torch hands over bits.
            yield name, tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            yield name, tensor.numpy()


_READERS: dict[str, Callable[[Path], Tensors]] = {
    ".safetensors": _read_safetensors,
    ".msgpack": _read_msgpack,
    ".bin": _read_torch,
}
