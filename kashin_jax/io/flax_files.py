"""Where the arrays of Flax's msgpack files lie, found without reading them.

A file is a map of maps. Its leaves are extensions of type 1 that hold a shape, the name
of a type and the data; arrays of more than 2^30 bytes are maps of several such chunks.
The `msgpack` package would read every array to find the next one; here only the bytes
between them are looked at.

Source: github.com/msgpack/msgpack/blob/master/spec.md; `flax.serialization`.
"""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from kashin_jax.errors import CheckpointError

__all__ = ["FlaxArray", "find_arrays", "read_array"]

_DTYPES = {
    dtype.name: dtype
    for dtype in map(
        np.dtype,
        (
            np.bool_, np.uint8, np.int8, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fn,
            np.int16, np.uint16, np.float16, ml_dtypes.bfloat16, np.int32, np.uint32,
            np.float32, np.float64, np.int64, np.uint64,
        ),
    )
}  # fmt: skip
# Far beyond any model; what a hostile file makes us keep stays below 100 MB.
_MAX_ITEMS, _MAX_NAME, _MAX_DEPTH, _MAX_SIDES = 10**5, 1000, 32, 32
_MAX_BYTES = 2**62  # what NumPy can address

_ARRAY, _SCALAR = 1, 3  # Flax's types of extensions that hold an array
_CHUNKED = "__msgpack_chunked_array__"
# Kind, and the bytes of the size or value that follows, by first byte.
_SIZED = {
    **{0xC4 + i: ("bin", 2**i) for i in range(3)},
    **{0xC7 + i: ("ext", 2**i) for i in range(3)},
    **{0xCC + i: ("int", 2**i) for i in range(4)},
    **{0xD9 + i: ("str", 2**i) for i in range(3)},
    **{0xDC + i: ("array", 2 << i) for i in range(2)},
    **{0xDE + i: ("map", 2 << i) for i in range(2)},
}


class FlaxArray(NamedTuple):
    """An array in a file.

    Attributes:
      dtype: NumPy's name of its type, `bfloat16` and the like among them.
      shape: Of the array, row-major.
      pieces: First byte and the byte after the last one, counted from the start of the
        file, of the parts that make up the data.
    """

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[tuple[int, int], ...]


def find_arrays(path: Path) -> dict[str, FlaxArray]:
    """All arrays of a file by their keys, joined with `/`.

    Raises:
      CheckpointError: If the file is missing, truncated, or holds anything but arrays
        whose data have the size that their shape asks for; names the file.
    """
    try:
        with path.open("rb") as stream:
            scanner = _Scanner(stream)
            tree = scanner.value()
            if not isinstance(tree, dict) or scanner.size != stream.tell():
                raise ValueError("it is not one map from beginning to end")
            return dict(_unique(_flat(tree, "")))
    except ValueError as error:
        raise CheckpointError(
            f"{path}: is truncated or damaged ({error}); download it again."
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error})."
        ) from error


def read_array(path: Path, array: FlaxArray) -> np.ndarray:
    """The values of one array.

    Raises:
      CheckpointError: If the file was cut since the array was found.
    """
    value = np.zeros(array.shape, _DTYPES[array.dtype])
    data, done = memoryview(value.reshape(-1).view(np.uint8)), 0
    with path.open("rb", buffering=0) as stream:
        for start, stop in array.pieces:
            stream.seek(start)
            end = done + stop - start
            while done < end:
                # One call returns 2 GiB at most.
                count = stream.readinto(data[done:end])
                if not count:
                    raise CheckpointError(
                        f"{path}: was cut while in use; download it again."
                    )
                done += count
    return value


class _Scanner:
    """Reads what lies between arrays; ValueError if it cannot be."""

    def __init__(self, stream: BinaryIO) -> None:
        self.size = os.fstat(stream.fileno()).st_size
        self._stream = stream
        self._items = 0

    def value(self, depth: int = 0) -> Any:
        """A map as a dict, an array as where it is, a number as it is."""
        kind, size = self._head()
        if kind == "map":
            if depth == _MAX_DEPTH:
                raise ValueError(f"maps are nested more than {_MAX_DEPTH} deep")
            return self._map(size, depth)
        if kind == "ext":
            return self._extension(size)
        if kind == "int":
            return size
        if kind == "bool":
            return size == 1
        raise ValueError(f"it holds a value of the kind {kind}, not an array")

    def _map(self, size: int, depth: int) -> dict[str, Any]:
        self._items += size
        if self._items > _MAX_ITEMS:
            raise ValueError(f"it holds more than {_MAX_ITEMS} items")
        found: dict[str, Any] = {}
        for _ in range(size):
            key = self._text()
            if key in found:
                raise ValueError(f"the key {key!r} is there twice")
            found[key] = self.value(depth + 1)
        return found

    def _extension(self, size: int) -> FlaxArray:
        code = self._take(1)[0]
        end = self._stream.tell() + size
        if code not in (_ARRAY, _SCALAR):
            raise ValueError(f"it holds an extension of type {code}, not an array")
        if end > self.size:
            raise ValueError("it ends inside an array")
        if self._head() != ("array", 3):
            raise ValueError("an array is not a triple of shape, type and data")
        rank = self._expect("array")
        if rank > _MAX_SIDES:
            raise ValueError(f"an array has {rank} axes")
        shape = tuple(self._expect("int") for _ in range(rank))
        if (name := self._text()) not in _DTYPES:
            raise ValueError(f"an array has the unknown type {name!r}")
        count = self._expect("bin")
        start = self._stream.tell()
        _check_size(shape, name, count)
        if start + count != end:
            raise ValueError("an array does not fill the extension it is in")
        self._stream.seek(end)
        return FlaxArray(name, shape, ((start, end),))

    def _text(self) -> str:
        size = self._expect("str")
        if size > _MAX_NAME:
            raise ValueError(f"a name has more than {_MAX_NAME} bytes")
        # What is not UTF-8 raises a ValueError, too.
        return self._take(size).decode()

    def _expect(self, kind: str) -> int:
        found, size = self._head()
        if found != kind:
            raise ValueError(f"it holds a value of the kind {found} where {kind} goes")
        return size

    def _head(self) -> tuple[str, int]:
        """Kind of the next value, and its size; of an integer or boolean the value."""
        first = self._take(1)[0]
        if first < 0x80:
            return "int", first
        if first < 0xC0:
            kind = {0x80: "map", 0x90: "array"}.get(first & 0xF0, "str")
            return kind, first & (0x1F if kind == "str" else 0x0F)
        if first in (0xC2, 0xC3):
            return "bool", first & 1
        if 0xD4 <= first <= 0xD8:
            return "ext", 1 << (first - 0xD4)
        if first not in _SIZED:
            return f"0x{first:02x}", 0
        kind, width = _SIZED[first]
        return kind, int.from_bytes(self._take(width), "big")

    def _take(self, count: int) -> bytes:
        data = self._stream.read(count)
        if len(data) < count:
            raise ValueError("it ends too early")
        return data


def _check_size(shape: tuple[int, ...], dtype: str, count: int) -> None:
    itemsize = _DTYPES[dtype].itemsize
    if math.prod(side or 1 for side in shape) * itemsize > _MAX_BYTES:
        raise ValueError(f"an array has the shape {shape}, too large for any machine")
    if math.prod(shape) * itemsize != count:
        raise ValueError(
            f"an array of shape {shape} and type {dtype} has {count} bytes of data"
        )


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, FlaxArray]]:
    for key, value in tree.items():
        name = prefix + key
        if len(name) > _MAX_NAME:
            raise ValueError(f"a name has more than {_MAX_NAME} characters")
        if isinstance(value, FlaxArray):
            yield name, value
        elif not isinstance(value, dict):
            raise ValueError(f"{name!r} is a number, not an array")
        elif _CHUNKED in value:
            yield name, _joined(value, name)
        else:
            yield from _flat(value, f"{name}/")


def _joined(tree: Mapping[str, Any], name: str) -> FlaxArray:
    """The array that was cut into chunks along its flattened axis."""
    fault = ValueError(f"the chunks of {name!r} do not make up an array")
    sides, parts = _listed(tree.get("shape")), _listed(tree.get("chunks"))
    if sides is None or not all(type(side) is int for side in sides):
        raise fault
    if not parts or not all(isinstance(part, FlaxArray) for part in parts):
        raise fault
    dtype, shape = parts[0].dtype, tuple(sides)
    if len(shape) > _MAX_SIDES or {part.dtype for part in parts} != {dtype}:
        raise fault
    pieces = tuple(piece for part in parts for piece in part.pieces)
    _check_size(shape, dtype, sum(stop - start for start, stop in pieces))
    return FlaxArray(dtype, shape, pieces)


def _listed(tree: Any) -> list[Any] | None:
    """What Flax made a map from positions of; None if it is no such map."""
    if not isinstance(tree, dict) or tree.keys() != set(map(str, range(len(tree)))):
        return None
    return [tree[str(i)] for i in range(len(tree))]


def _unique(
    pairs: Iterator[tuple[str, FlaxArray]],
) -> Iterator[tuple[str, FlaxArray]]:
    seen: set[str] = set()
    for name, array in pairs:
        if name in seen:
            raise ValueError(f"the name {name!r} is there twice")
        seen.add(name)
        yield name, array
