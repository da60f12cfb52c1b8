"""Files of arrays that can only be read whole: Flax's msgpack, PyTorch's pickles.

Flax's files are seen as the PyTorch checkpoint of the same model: `fc1/kernel` as the
transpose `fc1.weight`. What is quantized from either copy is then the same, and what is
made of it again is read by `transformers`, which no longer reads Flax's names.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
from flax import serialization
from jaxtyping import Shaped

from kashin_jax.errors import CheckpointError
from kashin_jax.io.files import check_regular, damaged, shown, unreadable
from kashin_jax.io.safetensors import (
    DTYPES,
    RANKS,
    Sink,
    TensorFile,
    TensorSpec,
    check_booleans,
)

__all__ = ["WHOLE_SUFFIXES", "WholeFile", "open_whole_files", "pytorch_name"]

Arrays = dict[str, Shaped[np.ndarray, "..."]]

# Far beyond any model; what a hostile file makes us keep stays below 100 MB.
_MAX_ITEMS, _MAX_NAME, _MAX_DEPTH, _MAX_SIDES = 10**5, 1000, 32, 32
_ARRAY, _SCALAR = 1, 3  # Flax's types of extensions that hold an array
_CHUNKED = "__msgpack_chunked_array__"
_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight"}


class _OneFile:
    """The arrays of the file that was asked for last, and no others."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._arrays: Arrays = {}

    def arrays(self, path: Path) -> Arrays:
        if path != self._path:
            # Before the next file is read: only one is to be in memory.
            self._path, self._arrays = None, {}
            self._arrays = _read(path)
            self._path = path
        return self._arrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class WholeFile(TensorFile):
    """A file that is in memory as a whole while its arrays are asked for.

    Attributes:
      memory: Shared by the files of a checkpoint, of which it keeps one.
    """

    memory: _OneFile

    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        """One whole array; see `TensorFile.read`."""
        spec, array = self.spec(name), self.memory.arrays(self.path).get(name)
        if array is None or _spec(array) != spec:
            raise CheckpointError(
                f"{self.path}: tensor {shown(name)} has changed while the file was in "
                "use; copy or download it again."
            )
        check_booleans(array, self.path, name)
        return array

    def read_rows(self, name: str, start: int, stop: int) -> Shaped[np.ndarray, "..."]:
        """Rows along the first axis."""
        self.check_rows(name, start, stop)
        return self.read(name)[start:stop]

    def copy(self, name: str, sink: Sink, chunk: int = 2**22) -> None:
        """Hands over the bytes of an array, of which a chunk is copied at a time."""
        rows = np.atleast_1d(self.read(name))
        step = max(1, chunk * len(rows) // max(1, rows.nbytes))
        for start in range(0, len(rows), step):
            part = np.ascontiguousarray(rows[start : start + step])
            sink.write(memoryview(part.reshape(-1).view(np.uint8)))


def open_whole_files(paths: Sequence[Path]) -> dict[str, TensorFile]:
    """Opens the files of one checkpoint, by file name.

    Every file is read to see what is in it; the last one stays in memory. A file takes
    up to twice its size while it is read.

    Raises:
      CheckpointError: If a file is missing or damaged, PyTorch is needed and not
        installed, or a kernel of Flax is no matrix; names the file.
    """
    memory = _OneFile()
    files: dict[str, TensorFile] = {}
    for path in paths:
        specs = {name: _spec(array) for name, array in memory.arrays(path).items()}
        # As in a safetensors file of the same arrays, so that shards are alike.
        order = sorted(specs, key=lambda name: (-RANKS[specs[name].dtype], name))
        in_order = {name: specs[name] for name in order}
        files[path.name] = WholeFile(
            path=path, specs=in_order, metadata={}, memory=memory
        )
    return files


def pytorch_name(stored: str) -> str:
    """PyTorch's `fc1.weight` for Flax's `fc1/kernel`."""
    *modules, leaf = stored.replace("/", ".").split(".")
    return ".".join([*modules, _LEAVES.get(leaf, leaf)])


def _spec(array: Shaped[np.ndarray, "..."]) -> TensorSpec:
    return TensorSpec(array.dtype.name, array.shape)


def _read(path: Path) -> Arrays:
    check_regular(path)
    try:
        arrays = dict(_READERS[path.suffix](path))
    except (CheckpointError, MemoryError):
        raise
    except OSError as error:
        raise unreadable(path, error) from error
    # Decoders meet damaged bytes with exceptions of every kind.
    except Exception as error:
        raise damaged(path, error) from error
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES:
            raise CheckpointError(
                f"{path}: tensor {shown(name)} has the unknown type {array.dtype}; "
                "save the model again."
            )
    return arrays


def _read_flax(path: Path) -> Iterator[tuple[str, Shaped[np.ndarray, "..."]]]:
    data = path.read_bytes()
    _check_flax(data)
    tree = serialization.msgpack_restore(data)
    if not isinstance(tree, dict):
        raise ValueError("it is not one map from beginning to end")
    owners: dict[str, str] = {}
    for stored, array in _flat(tree, ""):
        name = pytorch_name(stored)
        if name in owners:
            raise CheckpointError(
                f"{path}: `{stored}` and `{owners[name]}` are both `{name}`; save the "
                "model again."
            )
        owners[name] = stored
        is_kernel = stored.rsplit("/", 1)[-1] == "kernel"
        if is_kernel and array.ndim != 2:
            raise CheckpointError(
                f"{path}: `{stored}` has {array.ndim} axes, and only kernels of linear "
                "layers have a place in other formats; save the model as safetensors."
            )
        yield name, array.T if is_kernel else array


def _check_flax(data: bytes) -> None:
    """Refuses what Flax reads, though no model is stored so; ValueError says why."""
    count = 0

    def checked_map(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
        nonlocal count
        count += len(pairs)
        # Flax keeps any number of items, each of which takes a hundred times its
        # bytes in memory, keys of any kind, and the last of two equal ones.
        if count > _MAX_ITEMS:
            raise ValueError(f"it holds more than {_MAX_ITEMS} items")
        if not all(isinstance(key, str) for key, _ in pairs):
            raise ValueError("it has a key that is no text")
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key is there twice")
        # Flax makes one type of the two.
        if _CHUNKED in found and len(set(found["chunks"].values())) > 1:
            raise ValueError("the chunks of an array have different types")
        return found

    msgpack.unpackb(
        data,
        max_map_len=_MAX_ITEMS,
        object_pairs_hook=checked_map,
        ext_hook=_checked_array,
        strict_map_key=False,
    )


def _checked_array(code: int, data: bytes) -> str:
    """Name of the type of an array, whose data are looked at by Flax only."""
    # Flax hands over extensions that it does not know as they are.
    if code not in (_ARRAY, _SCALAR):
        raise ValueError(f"it holds an extension of type {code}, not an array")
    shape, dtype, values = msgpack.unpackb(data)
    # Flax takes a number for a shape and text for data, and knows more types.
    sides = shape if isinstance(shape, list) else [-1]
    if len(sides) > _MAX_SIDES or min(sides, default=0) < 0:
        raise ValueError(f"an array has the shape {shown(shape)}")
    if dtype not in DTYPES:
        raise ValueError(f"an array has the unknown type {shown(dtype)}")
    if not isinstance(values, bytes):
        raise ValueError("the data of an array are no bytes")
    return str(dtype)


def _flat(
    tree: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, Shaped[np.ndarray, "..."]]]:
    for key, value in tree.items():
        name = prefix + key
        # Names in Flax's files may be of any length, and nested a thousand times.
        if len(name) > _MAX_NAME or name.count("/") > _MAX_DEPTH:
            raise ValueError(f"the name {shown(name)} is too long")
        if isinstance(value, dict):
            yield from _flat(value, f"{name}/")
        elif isinstance(value, np.ndarray | np.generic):
            yield name, np.asarray(value)
        else:
            raise ValueError(f"{shown(name)} is no array")


def _read_torch(path: Path) -> Iterator[tuple[str, Shaped[np.ndarray, "..."]]]:
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"{path}: reading it needs PyTorch; `pip install torch`, or convert it to "
            "model.safetensors."
        ) from error
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bfloat16:
            # NumPy has no bfloat16 of its own, so torch hands over bits.
            yield name, tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            yield name, tensor.numpy()


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, np.ndarray]]]] = {
    ".msgpack": _read_flax,
    ".bin": _read_torch,
}
WHOLE_SUFFIXES = frozenset(_READERS)
"""What the names of such files end with."""
