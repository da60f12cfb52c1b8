"""Hidden states of a text in front of a block: in memory, beyond a bound on disk."""

import tempfile
from typing import IO, Any, NamedTuple

import numpy as np
from jaxtyping import Int

from kashin_jax.errors import UsageError

__all__ = ["HELD_BYTES", "HiddenStates"]

HELD_BYTES = 2**32
"""Held in memory, unless said otherwise: 131,072 tokens of a model 8,192 wide."""


class _Place(NamedTuple):
    # Of an array in the file.
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    size: int


class HiddenStates:
    """A list of arrays of which no more than some bytes are held in memory.

    All others are in an unnamed file in the directory for temporary files (`TMPDIR`),
    which the system removes with the process, however that ends. They are read back
    bit by bit.
    """

    def __init__(self, held_bytes: int = HELD_BYTES) -> None:
        """Holds nothing yet, and has no file.

        Args:
          held_bytes: Most bytes in memory.
        """
        self._held_bytes = held_bytes
        self._places: list[np.ndarray | _Place] = []
        self._file: IO[bytes] | None = None
        self._in_memory = self._end = 0

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> np.ndarray:
        place = self._places[index]
        if isinstance(place, np.ndarray):
            return place
        assert self._file is not None, "there is one as soon as something is in it"
        found = np.empty(place.shape, place.dtype)
        self._file.seek(place.start)
        self._file.readinto(_bytes_of(found))  # type: ignore[attr-defined]
        return found

    def __setitem__(self, index: int, array: np.ndarray) -> None:
        """Replaces an array; on disk in its place, where it is of the same size."""
        old = self._places[index]
        if isinstance(old, np.ndarray):
            self._in_memory -= old.nbytes
            self._places[index] = self._put(array)
        elif array.nbytes == old.size:
            self._places[index] = self._write(array, old.start)
        else:
            self._places[index] = self._put(array)

    def stacked(self, indices: Int[np.ndarray, " k"]) -> np.ndarray:
        """Some of them along a new first axis."""
        return np.stack([self[index] for index in indices.tolist()])

    def append(self, array: np.ndarray) -> None:
        """Adds one at the end."""
        self._places.append(self._put(array))

    def pop(self) -> np.ndarray:
        """Takes the last one."""
        last = self[-1]
        place = self._places.pop()
        if isinstance(place, np.ndarray):
            self._in_memory -= place.nbytes
        elif place.start + place.size == self._end:
            self._end = place.start
        return last

    def close(self) -> None:
        """Forgets all of them."""
        self._places, self._in_memory, self._end = [], 0, 0
        if self._file is not None:
            self._file.close()
            self._file = None

    def _put(self, array: np.ndarray) -> np.ndarray | _Place:
        if self._in_memory + array.nbytes <= self._held_bytes:
            self._in_memory += array.nbytes
            return array
        place = self._write(array, self._end)
        self._end += array.nbytes
        return place

    def _write(self, array: np.ndarray, start: int) -> _Place:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile()
            self._file.seek(start)
            self._file.write(_bytes_of(np.ascontiguousarray(array)))
            # A full disk is found here and not when the next array is read.
            self._file.flush()
        except OSError as error:
            raise UsageError(
                f"{tempfile.gettempdir()}: cannot take {start + array.nbytes} bytes of "
                f"hidden states ({error.strerror}). Name a directory with more space "
                "by the environment variable TMPDIR, or hold more of them in memory by "
                "`held_bytes`."
            ) from error
        return _Place(start, array.shape, array.dtype, array.nbytes)


def _bytes_of(array: np.ndarray) -> np.ndarray:
    # Types such as bfloat16 have no buffers of their own.
    return array.reshape(-1).view(np.uint8)
