"""Reading safetensors files by plain reads, so that memory is bounded.

Flax's files are read alike, once `checkpoints` has found where their arrays lie.
The safetensors library maps files, and pages of a map count as resident memory.
"""

import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped

from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.io.dtypes import DTYPES
from kashin_jax.io.files import shown
from kashin_jax.io.header import MAX_HEADER_BYTES, Entry, parse_header

__all__ = [
    "Sink",
    "TensorFile",
    "copy_bytes",
    "hash_file",
    "read_header",
    "read_rows",
    "read_tensor",
]


@runtime_checkable
class Sink(Protocol):
    """Takes bytes in order, as a binary file does."""

    def write(self, data: memoryview, /) -> object: ...


class TensorFile(NamedTuple):
    """A safetensors file whose header was found sound; no data were read.

    Attributes:
      path: Of the file.
      entries: By name, in the order of their data.
      metadata: The file's own `__metadata__`.
    """

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]

    def entry(self, name: str) -> Entry:
        """Where an array lies; UsageError if there is none of that name."""
        if name not in self.entries:
            raise UsageError(f"{self.path}: has no tensor {shown(name)}.")
        return self.entries[name]


def read_header(path: str | Path) -> TensorFile:
    """Reads and checks the header of a safetensors file, whoever wrote it.

    Takes memory in proportion to the header, which is at most 100 MB.

    Raises:
      CheckpointError: If the file is missing or anything about the header is wrong, or
        the data do not fill the file exactly; names the file and the tensor.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{path}: announces a header of {length} bytes in a file of {size},"
                    " so it is truncated or no safetensors file; copy or download it "
                    "again."
                )
            text = file.read(length)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: is missing; copy or download it.") from error
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error})."
        ) from error
    return TensorFile(path, *parse_header(text, size - 8 - len(text), str(path)))


def read_tensor(file: TensorFile, name: str) -> Shaped[np.ndarray, "..."]:
    """One whole array in the type that it is stored in.

    Raises:
      UsageError: If the file has none of that name.
      CheckpointError: If the file was cut since its header was read, or a boolean is
        neither 0 nor 1.
    """
    entry = file.entry(name)
    shape = entry.shape[::-1] if entry.is_flipped else entry.shape
    # Sizes were checked against the file's own, so that no header allocates more.
    array = np.zeros(shape, DTYPES[entry.dtype])
    with _opened(file.path) as stream:
        _fill(stream, _bytes(array), file, name)
    _check_booleans(array, file, name)
    return array.T if entry.is_flipped else array


def read_rows(
    file: TensorFile, name: str, start: int, stop: int
) -> Shaped[np.ndarray, "..."]:
    """Rows `start` to `stop` of an array along its first axis; reads nothing else.

    Raises:
      UsageError: If the file has none of that name, or it has no such rows.
      CheckpointError: As `read_tensor`.
    """
    entry = file.entry(name)
    if not entry.shape or not 0 <= start <= stop <= entry.shape[0]:
        raise UsageError(
            f"{file.path}: tensor {shown(name)} of shape {entry.shape} has no rows "
            f"{start}:{stop}."
        )
    with _opened(file.path) as stream:
        if entry.is_flipped:
            return _read_columns(stream, file, name, start, stop).T
        array = np.zeros((stop - start, *entry.shape[1:]), DTYPES[entry.dtype])
        row = math.prod(entry.shape[1:]) * array.itemsize
        _fill(stream, _bytes(array), file, name, start * row)
    _check_booleans(array, file, name)
    return array


def copy_bytes(file: TensorFile, name: str, sink: Sink, chunk: int = 2**22) -> None:
    """Hands the bytes of an array to `sink.write`, about `chunk` at a time.

    Of a matrix that is stored transposed, every chunk gathers a part of each row.

    Raises:
      UsageError: If the file has none of that name.
      CheckpointError: If the file was cut since its header was read.
    """
    entry = file.entry(name)
    size = entry.spec.size
    if entry.is_flipped:
        step = max(1, chunk * entry.shape[0] // max(1, size))
        for row in range(0, entry.shape[0], step):
            rows = read_rows(file, name, row, min(row + step, entry.shape[0]))
            sink.write(_bytes(np.ascontiguousarray(rows)))
        return
    buffer = memoryview(bytearray(max(1, min(chunk, size))))
    with _opened(file.path) as stream:
        for position in range(0, size, len(buffer)):
            part = buffer[: min(len(buffer), size - position)]
            _fill(stream, part, file, name, position)
            sink.write(part)


def hash_file(path: Path, chunk: int = 2**22) -> str:
    """The SHA-256 of a file, in hexadecimal.

    Raises:
      CheckpointError: If the file cannot be read.
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(chunk))
    try:
        with _opened(path) as stream:
            while count := stream.readinto(buffer):  # type: ignore[attr-defined]
                digest.update(buffer[:count])
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error})."
        ) from error
    return digest.hexdigest()


def _read_columns(
    stream: BinaryIO, file: TensorFile, name: str, start: int, stop: int
) -> Shaped[np.ndarray, "m n"]:
    """Columns of the matrix that the file holds, row by row."""
    entry = file.entry(name)
    width, height = entry.shape
    array = np.zeros((height, stop - start), DTYPES[entry.dtype])
    for i, row in enumerate(array):
        position = (i * width + start) * array.itemsize
        _fill(stream, _bytes(row), file, name, position)
    _check_booleans(array, file, name)
    return array


def _bytes(array: Shaped[np.ndarray, "..."]) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))


def _check_booleans(
    array: Shaped[np.ndarray, "..."], file: TensorFile, name: str
) -> None:
    if array.dtype == np.bool_ and array.size and array.view(np.uint8).max() > 1:
        raise CheckpointError(
            f"{file.path}: tensor {shown(name)} has booleans other than 0 and 1; copy "
            "or download it again."
        )


def _opened(path: Path) -> BinaryIO:
    # Without Python's buffer: reads are large, and go straight to where they belong.
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error})."
        ) from error


def _fill(
    stream: BinaryIO, data: memoryview, file: TensorFile, name: str, first: int = 0
) -> None:
    """Reads bytes of an array, from its byte `first` on."""
    done = 0
    for start, stop in file.entry(name).ranges(first, len(data)):
        stream.seek(start)
        end = done + stop - start
        while done < end:
            # One call returns 2 GiB at most.
            count = stream.readinto(data[done:end])  # type: ignore[attr-defined]
            if not count:
                raise CheckpointError(
                    f"{file.path}: ends inside tensor {shown(name)}, so it was cut "
                    "while in use; copy or download it again."
                )
            done += count
