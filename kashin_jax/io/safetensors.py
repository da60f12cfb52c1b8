"""Safetensors files: read by the library and plain reads, written as a stream.

The library checks a file's header and says what is in it. The data are read by plain
reads at the places that follow, since the library's own reading for NumPy knows no
type of 8-bit floats, and refuses slices of what is empty or has no axes. Nothing is
mapped: a mapped file that is cut while in use ends the process, and not in an error.

A file is the length of the header (8 bytes, little-endian), the header (JSON, filled
with spaces to a multiple of 8), and the data, without holes.
"""

import abc
import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
import safetensors
from jaxtyping import Shaped

from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.io.files import (
    atomic_path,
    check_regular,
    damaged,
    parse_json,
    shown,
    unreadable,
)

__all__ = [
    "DTYPES",
    "RANKS",
    "SafetensorsFile",
    "Sink",
    "TensorFile",
    "TensorSpec",
    "TensorWriter",
    "check_booleans",
    "open_safetensors",
    "open_writer",
    "write_tensors",
]

_MAX_HEADER_BYTES = 100_000_000  # the library refuses longer ones
_CHUNK = 2**22
_METADATA = "__metadata__"
# In the order of the safetensors library, which sorts a file's data by it, the last
# one first: every array is then aligned to its own type.
_IN_ORDER: tuple[tuple[str, np.dtype], ...] = (
    ("BOOL", np.dtype(np.bool_)),
    ("U8", np.dtype(np.uint8)),
    ("I8", np.dtype(np.int8)),
    ("F8_E5M2", np.dtype(ml_dtypes.float8_e5m2)),
    ("F8_E4M3", np.dtype(ml_dtypes.float8_e4m3fn)),
    ("I16", np.dtype(np.int16)),
    ("U16", np.dtype(np.uint16)),
    ("F16", np.dtype(np.float16)),
    ("BF16", np.dtype(ml_dtypes.bfloat16)),
    ("I32", np.dtype(np.int32)),
    ("U32", np.dtype(np.uint32)),
    ("F32", np.dtype(np.float32)),
    ("F64", np.dtype(np.float64)),
    ("I64", np.dtype(np.int64)),
    ("U64", np.dtype(np.uint64)),
)
_CODES = {dtype.name: code for code, dtype in _IN_ORDER}
_NAMES = {code: dtype.name for code, dtype in _IN_ORDER}

DTYPES: Mapping[str, np.dtype] = MappingProxyType({d.name: d for _, d in _IN_ORDER})
"""Types that can be stored, by NumPy's name."""

RANKS: Mapping[str, int] = MappingProxyType(
    {d.name: rank for rank, (_, d) in enumerate(_IN_ORDER)}
)
"""Data of the highest rank comes first in a file."""


class TensorSpec(NamedTuple):
    """Type and shape of an array in a file.

    Attributes:
      dtype: NumPy's name of the type, `bfloat16` and `float8_e4m3fn` among them.
      shape: As stored, row-major.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@runtime_checkable
class Sink(Protocol):
    """Takes bytes in order, as a binary file does."""

    def write(self, data: memoryview, /) -> object: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorFile(abc.ABC):
    """A file of named arrays whose names, types and shapes were found sound.

    Attributes:
      path: Where it lies.
      specs: Type and shape by name, in the order of a safetensors file's data.
      metadata: Text that the file holds beside arrays.
    """

    path: Path
    specs: Mapping[str, TensorSpec]
    metadata: Mapping[str, str]

    def spec(self, name: str) -> TensorSpec:
        """Type and shape of an array; UsageError if there is none of that name."""
        if name not in self.specs:
            raise UsageError(f"{self.path}: has no tensor {shown(name)}.")
        return self.specs[name]

    @abc.abstractmethod
    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        """One whole array in the type that it is stored in.

        Raises:
          UsageError: If the file has none of that name.
          CheckpointError: If the file has changed since it was opened, or a boolean is
            neither 0 nor 1.
        """

    @abc.abstractmethod
    def read_rows(self, name: str, start: int, stop: int) -> Shaped[np.ndarray, "..."]:
        """Rows `start` to `stop` of an array along its first axis.

        Raises:
          UsageError: If the file has none of that name, or it has no such rows.
          CheckpointError: As `read`.
        """

    @abc.abstractmethod
    def copy(self, name: str, sink: Sink, chunk: int = _CHUNK) -> None:
        """Hands the bytes of an array to `sink.write`, about `chunk` at a time.

        Raises:
          UsageError: If the file has none of that name.
          CheckpointError: If the file has changed since it was opened.
        """

    def check_rows(self, name: str, start: int, stop: int) -> None:
        """Raises UsageError unless an array has rows `start` to `stop`."""
        shape = self.spec(name).shape
        if not shape or not 0 <= start <= stop <= shape[0]:
            raise UsageError(
                f"{self.path}: tensor {shown(name)} of shape {shape} has no rows "
                f"{start}:{stop}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SafetensorsFile(TensorFile):
    """A safetensors file, of which only the parts that are asked for are read.

    Attributes:
      starts: First byte of every array, counted from the start of the file.
    """

    starts: Mapping[str, int]

    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        """One whole array; see `TensorFile.read`."""
        spec = self.spec(name)
        # Sizes were checked against the file's own, so that no header allocates more.
        array = np.zeros(spec.shape, DTYPES[spec.dtype])
        self._fill(_bytes(array), name)
        check_booleans(array, self.path, name)
        return array

    def read_rows(self, name: str, start: int, stop: int) -> Shaped[np.ndarray, "..."]:
        """Rows along the first axis; reads nothing else."""
        self.check_rows(name, start, stop)
        spec = self.spec(name)
        array = np.zeros((stop - start, *spec.shape[1:]), DTYPES[spec.dtype])
        row = math.prod(spec.shape[1:]) * array.itemsize
        self._fill(_bytes(array), name, start * row)
        check_booleans(array, self.path, name)
        return array

    def copy(self, name: str, sink: Sink, chunk: int = _CHUNK) -> None:
        """Hands over the bytes of an array; holds `chunk` of them."""
        size = self.spec(name).size
        buffer = memoryview(bytearray(max(1, min(chunk, size))))
        for position in range(0, size, len(buffer)):
            part = buffer[: min(len(buffer), size - position)]
            self._fill(part, name, position)
            sink.write(part)

    def _fill(self, data: memoryview, name: str, first: int = 0) -> None:
        """Reads bytes of an array, from its byte `first` on."""
        done = 0
        try:
            # Without Python's buffer: reads are large, and go where they belong.
            with self.path.open("rb", buffering=0) as stream:
                stream.seek(self.starts[name] + first)
                while done < len(data):
                    # One call returns 2 GiB at most.
                    count = stream.readinto(data[done:])
                    if not count:
                        raise CheckpointError(
                            f"{self.path}: ends inside tensor {shown(name)}, so it was "
                            "cut while in use; copy or download it again."
                        )
                    done += count
        except OSError as error:
            raise unreadable(self.path, error) from error


def open_safetensors(path: str | Path) -> SafetensorsFile:
    """Reads and checks the header of a safetensors file, whoever wrote it.

    Takes memory in proportion to the header, which is at most 100 MB.

    Raises:
      CheckpointError: If the file is missing or anything about the header is wrong, or
        the data do not fill the file exactly; names the file.
    """
    path = Path(path)
    check_regular(path)
    try:
        with safetensors.safe_open(path, framework="np", backend="pread") as file:
            names = file.offset_keys()
            slices = {name: file.get_slice(name) for name in names}
            metadata = file.metadata() or {}
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            _check_strictly(stream.read(length), str(path))
    except safetensors.SafetensorError as error:
        raise damaged(path, error) from error
    except OSError as error:
        raise unreadable(path, error) from error
    specs = {
        name: _spec(name, found.get_dtype(), tuple(found.get_shape()), path)
        for name, found in slices.items()
    }
    return SafetensorsFile(
        path=path, specs=specs, metadata=metadata, starts=_starts(specs, 8 + length)
    )


def _check_strictly(header: bytes, where: str) -> None:
    """Refuses what is sound to the library and may be another file to other readers."""
    # The library skips spaces in front, though the format has `{` there.
    if not header.startswith(b"{"):
        raise CheckpointError(
            f"{where}: has spaces before its header; copy or download it again."
        )
    # Of two tensors of one name it keeps one; `parse_json` refuses equal keys.
    for name, entry in parse_json(header, where).items():
        # It leaves fields that it does not know alone, and reads lists as entries.
        fields = entry.keys() if isinstance(entry, dict) else set()
        if name != _METADATA and fields != {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(
                f"{where}: tensor {shown(name)} needs exactly `dtype`, `shape` and "
                "`data_offsets`; copy or download it again."
            )


def _spec(name: str, code: str, shape: tuple[int, ...], path: Path) -> TensorSpec:
    """Checks what the library leaves to its reader for NumPy."""
    fault = None
    # The library knows types that NumPy does not, some of less than a byte.
    if code not in _NAMES:
        fault = f"the unknown dtype {shown(code)}"
    else:
        try:
            # Any number of sides is sound to it, and sides beside one of 0 may be huge.
            np.broadcast_to(np.zeros((), DTYPES[_NAMES[code]]), shape)
        except ValueError:
            fault = f"the impossible shape {shown(shape)}"
    if fault:
        raise CheckpointError(
            f"{path}: tensor {shown(name)} has {fault}; copy or download it again."
        )
    return TensorSpec(_NAMES[code], shape)


def _starts(specs: Mapping[str, TensorSpec], first: int) -> dict[str, int]:
    """Where the data of every array begin, there being no holes."""
    starts = {}
    for name, spec in specs.items():
        starts[name] = first
        first += spec.size
    return starts


def _bytes(array: Shaped[np.ndarray, "..."]) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))


def check_booleans(array: Shaped[np.ndarray, "..."], path: Path, name: str) -> None:
    """Raises CheckpointError if a boolean is neither 0 nor 1, which readers assume."""
    if array.dtype == np.bool_ and array.size and array.view(np.uint8).max() > 1:
        raise CheckpointError(
            f"{path}: tensor {shown(name)} has booleans other than 0 and 1; copy or "
            "download it again."
        )


class TensorSink(NamedTuple):
    """Takes the bytes of one array in order, for `TensorFile.copy`."""

    writer: "TensorWriter"
    name: str

    def write(self, data: bytes | memoryview, /) -> int:
        """Appends to the array; UsageError beyond its end."""
        return self.writer.append(self.name, data)


class TensorWriter:
    """Puts arrays at the places that the header gave them; see `open_writer`.

    Arrays come in any order, each in one or more pieces. The bytes of the file depend
    on the content alone.
    """

    def __init__(
        self, file: BinaryIO, specs: Mapping[str, TensorSpec], starts: Mapping[str, int]
    ) -> None:
        self._file = file
        self._specs = specs
        self._starts = starts
        self._written = dict.fromkeys(specs, 0)

    def write(self, name: str, array: Shaped[np.ndarray, "..."]) -> None:
        """Writes a whole array, in slices along its first axis.

        Raises:
          UsageError: If its name, type or shape is not in the header, or it was
            written already.
        """
        spec = self._spec(name)
        if TensorSpec(array.dtype.name, array.shape) != spec or self._written[name]:
            raise UsageError(
                f"Tensor {shown(name)} was to be {spec.dtype} {spec.shape}, once. "
                f"Got {array.dtype.name} {array.shape}, {self._written[name]} bytes "
                "being there already."
            )
        rows, native = np.atleast_1d(array), DTYPES[spec.dtype]
        step = max(1, _CHUNK * len(rows) // max(1, array.nbytes))
        for start in range(0, len(rows), step):
            piece = np.ascontiguousarray(rows[start : start + step], native)
            self.append(name, _bytes(piece))

    def sink(self, name: str) -> TensorSink:
        """Something with `write`, for the bytes of one array."""
        self._spec(name)
        return TensorSink(self, name)

    def append(self, name: str, data: bytes | memoryview) -> int:
        """Writes the next bytes of an array; returns how many.

        Raises:
          UsageError: If the header has no such array, or it ends before the data do.
        """
        size, done = self._spec(name).size, self._written[name]
        count = memoryview(data).nbytes
        if done + count > size:
            raise UsageError(
                f"Tensor {shown(name)} takes {size} bytes. Got {done + count}."
            )
        self._file.seek(self._starts[name] + done)
        self._file.write(data)
        self._written[name] = done + count
        return count

    def check_complete(self) -> None:
        """Raises UsageError, naming it, if an array lacks bytes."""
        for name, spec in self._specs.items():
            if self._written[name] != spec.size:
                raise UsageError(
                    f"Tensor {shown(name)} takes {spec.size} bytes. Got "
                    f"{self._written[name]} before the file was closed."
                )

    def _spec(self, name: str) -> TensorSpec:
        if name not in self._specs:
            raise UsageError(f"Tensor {shown(name)} is not in the file's header.")
        return self._specs[name]


@contextlib.contextmanager
def open_writer(
    path: str | Path,
    specs: Mapping[str, TensorSpec],
    metadata: Mapping[str, str] | None = None,
) -> Iterator[TensorWriter]:
    """Lends a writer; the file appears, whole and durable, when the block ends.

    If the block raises, nothing is left behind and an older file stays as it was.
    Memory is bounded by what the caller hands over.

    Args:
      path: Where the file will be; its directory exists.
      specs: Type and shape of every array to come.
      metadata: Becomes `__metadata__`.

    Raises:
      UsageError: If a type cannot be stored, or an array lacks bytes at the end.
      CheckpointError: If the file cannot be written.
    """
    in_order = _sorted(specs)
    header = _header(in_order, metadata or {})
    starts = _starts(in_order, len(header))
    end = len(header) + sum(spec.size for spec in in_order.values())
    with atomic_path(Path(path)) as temporary:
        with temporary.open("wb") as file:
            file.write(header)
            file.truncate(end)
            writer = TensorWriter(file, in_order, starts)
            yield writer
            writer.check_complete()


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Shaped[np.ndarray, "..."]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file of arrays that are all at hand; see `open_writer`."""
    specs = {k: TensorSpec(v.dtype.name, v.shape) for k, v in tensors.items()}
    with open_writer(path, specs, metadata) as writer:
        for name, array in tensors.items():
            writer.write(name, array)


def _sorted(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Arrays in the order in which the safetensors library writes their data.

    Raises:
      UsageError: If a type or name cannot be stored.
    """
    for name, spec in specs.items():
        if spec.dtype not in DTYPES or name == _METADATA:
            raise UsageError(
                f"Tensor {shown(name)} of type {spec.dtype} cannot be stored; choose "
                f"one of {', '.join(DTYPES)}, and a name other than {_METADATA}."
            )
    order = sorted(specs, key=lambda name: (-RANKS[specs[name].dtype], name))
    return {name: specs[name] for name in order}


def _header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the data; metadata are sorted, so that equal content is equal.

    Raises:
      UsageError: If a name or metadata is not text, or there are too many.
    """
    content: dict[str, Any] = {}
    if metadata:
        content[_METADATA] = dict(sorted(metadata.items()))
    for name, start in _starts(specs, 0).items():
        spec = specs[name]
        content[name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, start + spec.size],
        }
    try:
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise UsageError("Names and metadata must be Unicode text.") from error
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER_BYTES:
        raise UsageError(
            f"The header takes {len(text)} bytes, more than {_MAX_HEADER_BYTES}; write "
            "more and smaller shards."
        )
    return len(text).to_bytes(8, "little") + text
