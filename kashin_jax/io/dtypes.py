"""Types of stored arrays: their names in NumPy and in safetensors headers."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import ml_dtypes
import numpy as np

__all__ = ["CODES", "DTYPES", "RANKS", "TensorSpec", "itemsize"]

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

DTYPES: Mapping[str, np.dtype] = MappingProxyType({d.name: d for _, d in _IN_ORDER})
"""Types that can be stored, by NumPy's name."""

CODES: Mapping[str, str] = MappingProxyType({d.name: code for code, d in _IN_ORDER})
"""What a header calls them."""

RANKS: Mapping[str, int] = MappingProxyType(
    {d.name: rank for rank, (_, d) in enumerate(_IN_ORDER)}
)
"""Data of the highest rank comes first in a file."""


class TensorSpec(NamedTuple):
    """What a header says about an array before there is one.

    Attributes:
      dtype: NumPy's name of the type.
      shape: As stored.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * itemsize(self.dtype)


def itemsize(dtype: str) -> int:
    """Bytes of one entry of a type in `DTYPES`."""
    return DTYPES[dtype].itemsize
