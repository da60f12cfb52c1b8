"""Headers of safetensors files: text of untrusted origin to entries, and back.

A file is the length of the header (8 bytes, little-endian), the header (JSON, filled
with spaces to a multiple of 8), and the data, without holes.
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.io.dtypes import CODES, DTYPES, RANKS, TensorSpec, itemsize
from kashin_jax.io.files import parse_json, shown

__all__ = ["MAX_HEADER_BYTES", "Entry", "format_header", "parse_header"]

MAX_HEADER_BYTES = 100_000_000
"""Longer headers are refused, as the safetensors library does."""

_METADATA = "__metadata__"
_NAMES = {code: name for name, code in CODES.items()}
# What NumPy can address; arrays with a side of 0 are held to it too.
_MAX_BYTES, _MAX_SIDES = 2**62, 32


class Entry(NamedTuple):
    """An array in a file.

    Attributes:
      dtype: NumPy's name of its type, `bfloat16` and `float8_e4m3fn` among them.
      shape: Of the array, row-major.
      start: First byte, counted from the start of the file.
      stop: The byte after the last one.
      pieces: `(start, stop)` of every part where other bytes lie between them, as in
        Flax's files; empty where the data are one piece, as in safetensors.
      is_flipped: Whether the file holds the transpose of the matrix, row-major.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    pieces: tuple[tuple[int, int], ...] = ()
    is_flipped: bool = False

    @property
    def spec(self) -> TensorSpec:
        """Type and shape."""
        return TensorSpec(self.dtype, self.shape)

    def ranges(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """Where `count` bytes of the data lie, from the byte `first` of them on."""
        for start, stop in self.pieces or ((self.start, self.stop),):
            begin, end = start + first, min(stop, start + first + count)
            if begin < end:
                yield begin, end
                first, count = 0, count - (end - begin)
            else:
                first -= min(first, stop - start)


def parse_header(
    text: bytes, data_size: int, where: str
) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries, in the order of their data, and metadata.

    Args:
      text: The header.
      data_size: Bytes of the file behind the header.
      where: Begins every message, a path.

    Raises:
      CheckpointError: If the header is not JSON, an entry is malformed, or the data do
        not fill the rest of the file exactly; names the file and the tensor.
    """
    if not text.startswith(b"{"):
        raise CheckpointError(
            f"{where}: has no JSON header, so it is no safetensors file or a damaged "
            "one; copy or download it again."
        )
    content = parse_json(text, where)
    metadata = content.pop(_METADATA, {})
    if not _is_text_map(metadata):
        raise CheckpointError(
            f"{where}: `{_METADATA}` is not a map of strings; write the file again."
        )
    first = 8 + len(text)
    found = [(name, _entry(name, item, first, where)) for name, item in content.items()]
    found.sort(key=lambda pair: (pair[1].start, pair[1].stop))
    _check_filled(found, first, first + data_size, where)
    return dict(found), metadata


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def _entry(name: str, item: Any, first: int, where: str) -> Entry:
    try:
        dtype, shape, start, stop = _checked(item)
    except ValueError as error:
        raise CheckpointError(
            f"{where}: tensor {shown(name)} {error}; copy or download it again."
        ) from error
    return Entry(dtype, shape, first + start, first + stop)


def _checked(item: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Type, shape and offsets; ValueError, which ends a sentence, if they cannot be."""
    if not isinstance(item, dict) or item.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("needs exactly `dtype`, `shape` and `data_offsets`")
    code, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(code, str) or code not in _NAMES:
        raise ValueError(f"has the unknown dtype {shown(code)}")
    dtype = _NAMES[code]
    if not _are_sizes(shape) or len(shape) > _MAX_SIDES:
        raise ValueError(f"has the impossible shape {shown(shape)}")
    if math.prod(side or 1 for side in shape) * itemsize(dtype) > _MAX_BYTES:
        raise ValueError(f"has the shape {shown(shape)}, too large for any machine")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"has the impossible data_offsets {shown(offsets)}")
    size = math.prod(shape) * itemsize(dtype)
    if offsets[1] - offsets[0] != size:
        raise ValueError(
            f"takes {size} bytes by its shape but {offsets[1] - offsets[0]} by its "
            "data_offsets"
        )
    return dtype, tuple(shape), offsets[0], offsets[1]


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**63 for value in values
    )


def _check_filled(
    found: list[tuple[str, Entry]], first: int, end: int, where: str
) -> None:
    position = first
    for name, entry in found:
        if entry.start != position:
            fault = "overlaps another one" if entry.start < position else "leaves a gap"
            raise CheckpointError(
                f"{where}: tensor {shown(name)} {fault} at byte {entry.start}; copy or "
                "download it again."
            )
        position = entry.stop
    if position != end:
        verb = "is truncated" if position > end else "has unused bytes at its end"
        raise CheckpointError(
            f"{where}: {verb}, since its header counts {position} bytes and the file "
            f"has {end}; copy or download it again."
        )


def format_header(
    specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, Entry]]:
    """The bytes before the data, and where each array goes.

    Data are sorted by type and name as the safetensors library does, and metadata by
    key, so that equal content gives equal bytes.

    Raises:
      UsageError: If a type cannot be stored, or a name or metadata is not text.
    """
    for name, spec in specs.items():
        if spec.dtype not in DTYPES or name == _METADATA:
            raise UsageError(
                f"Tensor {shown(name)} of type {spec.dtype} cannot be stored; choose "
                f"one of {', '.join(DTYPES)}, and a name other than {_METADATA}."
            )
    order = sorted(specs, key=lambda name: (-RANKS[specs[name].dtype], name))
    content: dict[str, Any] = {}
    if metadata:
        content[_METADATA] = dict(sorted(metadata.items()))
    position = 0
    for name in order:
        stop = position + specs[name].size
        content[name] = {
            "dtype": CODES[specs[name].dtype],
            "shape": list(specs[name].shape),
            "data_offsets": [position, stop],
        }
        position = stop
    try:
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise UsageError("Names and metadata must be Unicode text.") from error
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise UsageError(
            f"The header takes {len(text)} bytes, more than {MAX_HEADER_BYTES}; write "
            "more and smaller shards."
        )
    entries, _ = parse_header(text, position, "header")
    return len(text).to_bytes(8, "little") + text, entries
