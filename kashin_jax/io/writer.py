"""Writing safetensors files whose header is known before any of the data."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Shaped

from kashin_jax.errors import UsageError
from kashin_jax.io.dtypes import DTYPES, TensorSpec
from kashin_jax.io.files import atomic_path, shown
from kashin_jax.io.header import Entry, format_header

__all__ = ["FileRecord", "TensorSink", "TensorWriter", "open_writer", "write_tensors"]

_CHUNK = 2**22


class FileRecord(NamedTuple):
    """What an index says about a file.

    Attributes:
      name: Without its directory.
      tensors: Names of its arrays, in the order of their data.
      size: Bytes of the arrays, the header not counted.
      sha256: Of the whole file, in hexadecimal.
    """

    name: str
    tensors: tuple[str, ...]
    size: int
    sha256: str


class TensorSink(NamedTuple):
    """Takes the bytes of one array in order: the sink of `copy_bytes`."""

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

    def __init__(self, file: BinaryIO, entries: Mapping[str, Entry]) -> None:
        self._file = file
        self._entries = entries
        self._written = dict.fromkeys(entries, 0)

    def write(self, name: str, array: Shaped[np.ndarray, "..."]) -> None:
        """Writes a whole array, in slices along its first axis.

        Raises:
          UsageError: If its name, type or shape is not in the header, or it was
            written already.
        """
        entry = self._entry(name)
        if (array.dtype.name, array.shape) != entry.spec or self._written[name]:
            raise UsageError(
                f"Tensor {shown(name)} was to be {entry.dtype} {entry.shape}, once. "
                f"Got {array.dtype.name} {array.shape}, {self._written[name]} bytes "
                "being there already."
            )
        rows, native = np.atleast_1d(array), DTYPES[entry.dtype]
        step = max(1, _CHUNK * len(rows) // max(1, array.nbytes))
        for start in range(0, len(rows), step):
            piece = np.ascontiguousarray(rows[start : start + step], native)
            self.append(name, memoryview(piece.reshape(-1).view(np.uint8)))

    def sink(self, name: str) -> TensorSink:
        """Something with `write`, for the bytes of one array."""
        self._entry(name)
        return TensorSink(self, name)

    def append(self, name: str, data: bytes | memoryview) -> int:
        """Writes the next bytes of an array; returns how many.

        Raises:
          UsageError: If the header has no such array, or it ends before the data do.
        """
        entry, done = self._entry(name), self._written[name]
        count = memoryview(data).nbytes
        if done + count > entry.stop - entry.start:
            raise UsageError(
                f"Tensor {shown(name)} takes {entry.stop - entry.start} bytes. Got "
                f"{done + count}."
            )
        self._file.seek(entry.start + done)
        self._file.write(data)
        self._written[name] = done + count
        return count

    def check_complete(self) -> None:
        """Raises UsageError, naming it, if an array lacks bytes."""
        for name, entry in self._entries.items():
            if self._written[name] != entry.stop - entry.start:
                raise UsageError(
                    f"Tensor {shown(name)} takes {entry.stop - entry.start} bytes. Got "
                    f"{self._written[name]} before the file was closed."
                )

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise UsageError(f"Tensor {shown(name)} is not in the file's header.")
        return self._entries[name]


@contextlib.contextmanager
def open_writer(
    path: str | Path,
    specs: Mapping[str, TensorSpec],
    metadata: Mapping[str, str] | None = None,
) -> Iterator[TensorWriter]:
    """Lends a writer; the file appears, whole and durable, when the block ends.

    If the block raises, nothing is left behind and an older file stays as it was.
    Memory is bounded by what the caller hands over. `record_file` describes the result.

    Args:
      path: Of the file; its directory exists.
      specs: Type and shape of every array to come.
      metadata: Becomes `__metadata__`.

    Raises:
      UsageError: If a type cannot be stored, or an array lacks bytes at the end.
      CheckpointError: If the file cannot be written.
    """
    start, entries = format_header(specs, metadata or {})
    end = max((entry.stop for entry in entries.values()), default=len(start))
    with atomic_path(Path(path)) as temporary:
        with temporary.open("wb") as file:
            file.write(start)
            file.truncate(end)
            writer = TensorWriter(file, entries)
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
