"""What the head of a GGUF file says: fields, and where its tensors lie.

It is read by the package `gguf`, which maps the file and believes it: sizes are checked
here, and data are never read through the map, since a mapped file that is cut while in
use ends the process.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.io.files import check_regular, damaged, shown, unreadable

__all__ = ["GGUFHeader", "GGUFTensor", "gguf_package", "read_header"]

# Of a vocabulary of 262,144 tokens, as Gemma's is, 2.1 million are read. The package
# takes 7 us and 0.5 kB for each, however small, so that more would be an attack.
_MAX_ITEMS = 3_000_000
_VERSIONS = (2, 3)


class GGUFTensor(NamedTuple):
    """Where and how a tensor lies in a file.

    Attributes:
      kind: Name of its quantization type, such as Q4_1, or F32, F16, BF16.
      shape: Row-major, `[out, in]` of linears.
      start: Its first byte.
      size: Its bytes.
    """

    kind: str
    shape: tuple[int, ...]
    start: int
    size: int


class GGUFHeader(NamedTuple):
    """The head of a file.

    Attributes:
      path: Where it lies.
      fields: Numbers, texts, truth values and lists of these, by name.
      tensors: By name in the file.
    """

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]


def gguf_package() -> Any:
    """The package `gguf`; UsageError if it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise UsageError(
            "Reading GGUF files needs `gguf`; run: pip install 'kashin_jax[gguf]'"
        ) from error
    return gguf


def read_header(path: Path) -> GGUFHeader:
    """Reads and checks all of a file but the data of tensors.

    Raises:
      CheckpointError: If it is no GGUF file, one of several parts, for machines of the
        other byte order, or damaged; names the file.
      UsageError: If the package `gguf` is not installed.
    """
    gguf = gguf_package()
    check_regular(path)
    _check_beginning(path)
    try:
        # Sums of hostile offsets overflow, and are caught where they are compared.
        with np.errstate(all="ignore"):
            reader = _reader(gguf)(path)
            fields = {name: field.contents() for name, field in reader.fields.items()}
            tensors = {t.name: _tensor(gguf, t) for t in reader.tensors}
    except OSError as error:
        raise unreadable(path, error) from error
    except MemoryError:
        raise
    # What damaged bytes end in depends on where they are.
    except Exception as error:
        raise damaged(path, error) from error
    if (count := fields.get("split.count", 1)) != 1:
        raise CheckpointError(
            f"{path}: is one of {shown(count)} parts; join them first, by "
            "`llama-gguf-split --merge`."
        )
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors; name a file with weights.")
    return GGUFHeader(path, fields, tensors)


def _check_beginning(path: Path) -> None:
    try:
        with path.open("rb") as file:
            beginning = file.read(8)
    except OSError as error:
        raise unreadable(path, error) from error
    if beginning[:4] != b"GGUF" or len(beginning) < 8:
        raise CheckpointError(
            f"{path}: is no GGUF file by its first bytes; copy or download it again."
        )
    version = int.from_bytes(beginning[4:], "little")
    if version & 0xFFFF == 0:
        raise CheckpointError(
            f"{path}: is for big-endian machines; get the usual, little-endian file."
        )
    if version not in _VERSIONS:
        raise CheckpointError(
            f"{path}: has version {version} of GGUF; {_VERSIONS[0]} and "
            f"{_VERSIONS[1]} are read. Convert the model again by a present llama.cpp."
        )


def _reader(gguf: Any) -> Any:
    """The package's reader, which stops at the file's end and at too many items."""

    class Reader(gguf.GGUFReader):
        items = 0

        def _get(
            self, offset: Any, dtype: Any, count: Any = 1, *rest: Any, **more: Any
        ) -> Any:
            self.items += 1
            if self.items > _MAX_ITEMS:
                raise ValueError(f"it lists more than {_MAX_ITEMS} items")
            # Where the package would return what there is.
            if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("it ends before what it announces")
            return super()._get(offset, dtype, count, *rest, **more)

    return Reader


def _tensor(gguf: Any, found: Any) -> GGUFTensor:
    shape = tuple(int(side) for side in reversed(found.shape.tolist()))
    block, size = gguf.GGML_QUANT_SIZES[found.tensor_type]
    if not shape or 0 in shape or len(shape) > 4 or shape[-1] % block:
        raise ValueError(f"{shown(found.name)} has the shape {shown(shape)}")
    return GGUFTensor(
        found.tensor_type.name,
        shape,
        int(found.data_offset),
        math.prod(shape) // block * size,
    )
