"""Tensors of a GGUF file under Hugging Face's names, decoded when they are read."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

from kashin_jax.errors import CheckpointError
from kashin_jax.io.files import shown, unreadable
from kashin_jax.io.gguf.header import GGUFTensor, gguf_package
from kashin_jax.io.safetensors import DTYPES, Sink, TensorFile

__all__ = ["GGUFFile", "GGUFPlace", "check_kinds", "decoded_dtype"]

# All others are quantized. Their own scales are float16: decoded values are rounded to
# it, by 2**-11 of a value, where the coarsest of 8 bits steps by 2**-7 of the largest.
_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class GGUFPlace(NamedTuple):
    """A tensor of a file and what its rows have to go through.

    Attributes:
      tensor: Where it lies.
      heads: Heads whose rows are interleaved for llama.cpp's rope; 0 for none.
    """

    tensor: GGUFTensor
    heads: int


def decoded_dtype(kind: str) -> str:
    """NumPy's name of the type that a kind of tensor is decoded to."""
    return _PLAIN.get(kind, "float16")


def check_kinds(path: Path, tensors: Mapping[str, GGUFTensor]) -> None:
    """Raises CheckpointError, naming a tensor, for types that are not decoded.

    Decodes the first row of one tensor of each type: what the package can do is nowhere
    listed.
    """
    found = {tensor.kind: name for name, tensor in tensors.items()}
    for kind, name in found.items():
        tensor = tensors[name]
        row = tensor.size // math.prod(tensor.shape[:-1])
        data = _bytes(path, name, tensor.start, row)
        _decode(path, name, kind, data.reshape(1, -1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFFile(TensorFile):
    """A GGUF file, of which only the tensors that are asked for are read.

    Attributes:
      places: Where the tensors lie, by Hugging Face's names.
    """

    places: Mapping[str, GGUFPlace]

    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        """One whole array; see `TensorFile.read`."""
        self.spec(name)
        tensor, heads = self.places[name]
        array = self._rows(name, 0, math.prod(tensor.shape[:-1]))
        array = array.reshape(tensor.shape)
        return array if not heads else _in_halves(array, heads)

    def read_rows(self, name: str, start: int, stop: int) -> Shaped[np.ndarray, "..."]:
        """Rows along the first axis; reads no others of most tensors."""
        self.check_rows(name, start, stop)
        tensor, heads = self.places[name]
        if heads or len(tensor.shape) != 2:
            return self.read(name)[start:stop]
        return self._rows(name, start, stop)

    def copy(self, name: str, sink: Sink, chunk: int = 2**22) -> None:
        """Hands over the bytes of an array, about `chunk` of which are decoded."""
        spec = self.spec(name)
        step = max(1, chunk * spec.shape[0] // max(1, spec.size))
        for start in range(0, spec.shape[0], step):
            part = self.read_rows(name, start, min(start + step, spec.shape[0]))
            sink.write(
                memoryview(np.ascontiguousarray(part).reshape(-1).view(np.uint8))
            )

    def _rows(self, name: str, start: int, stop: int) -> Shaped[np.ndarray, "n in"]:
        """Rows of the last axis, as they lie in the file."""
        tensor = self.places[name].tensor
        row = tensor.size // math.prod(tensor.shape[:-1])
        data = _bytes(self.path, name, tensor.start + start * row, (stop - start) * row)
        return _decode(self.path, name, tensor.kind, data.reshape(stop - start, row))


def _bytes(path: Path, name: str, start: int, size: int) -> Shaped[np.ndarray, " n"]:
    try:
        with path.open("rb") as stream:
            stream.seek(start)
            data = stream.read(size)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(data) < size:
        raise CheckpointError(
            f"{path}: ends inside tensor {shown(name)}; copy or download it again."
        )
    return np.frombuffer(data, np.uint8)


def _decode(
    path: Path, name: str, kind: str, data: Shaped[np.ndarray, "n bytes"]
) -> Shaped[np.ndarray, "n in"]:
    """Values of rows, of the type that their kind is decoded to."""
    dtype = DTYPES[decoded_dtype(kind)]
    if kind in _PLAIN:
        return data.view(dtype)
    gguf = gguf_package()
    try:
        decoded = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    except NotImplementedError as error:
        raise CheckpointError(
            f"{path}: tensor {shown(name)} is stored as {kind}, which the package "
            "`gguf` does not decode; get a file of another type, or the original model."
        ) from error
    with np.errstate(over="ignore"):
        cast = np.asarray(decoded).astype(dtype)
    if np.isfinite(decoded).all() and not np.isfinite(cast).all():
        raise CheckpointError(
            f"{path}: tensor {shown(name)} has values beyond those of {dtype.name}; "
            "get another file, or the original model."
        )
    return cast


def _in_halves(
    array: Shaped[np.ndarray, "..."], heads: int
) -> Shaped[np.ndarray, "..."]:
    """Rows of queries or keys for a rope that pairs the halves of a head.

    llama.cpp's turns neighbours.
    """
    pairs = array.shape[0] // heads // 2
    apart = array.reshape(heads, pairs, 2, *array.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(apart.reshape(array.shape))
