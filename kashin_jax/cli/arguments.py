"""Values of the command line, read strictly; what is wrong with one says argparse."""

import argparse
import math

__all__ = [
    "METHODS",
    "read_bits",
    "read_count",
    "read_seed",
    "read_size",
    "read_temperature",
]

# `method_names()`, written out: importing it would import JAX.
METHODS = (
    "kashin-joint",
    "kashin",
    "uniform",
    "k-means",
    "k-means-channel",
    "rtn",
    "nf4",
    "hqq",
    "rotate-rtn",
    "rotate-k-means",
)
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1, "": 1}


def read_bits(text: str) -> int | float:
    """A positive number; a whole one as an integer."""
    value = _positive(text, "a number of bits such as 4 or 3.5")
    return int(value) if value == int(value) else value


def read_size(text: str) -> int:
    """Bytes of `500MB` and the like, in powers of ten."""
    expected = "a size such as 500MB"
    unit = next(unit for unit in _UNITS if text.upper().endswith(unit))
    size = _number(text[: len(text) - len(unit)]) * _UNITS[unit]
    if not 1 <= size < 2**63:
        raise _refused(text, expected)
    return int(size)


def read_count(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1, 2**31)


def read_seed(text: str) -> int:
    """A whole number of 32 bits."""
    return _whole(text, 0, 2**32)


def read_temperature(text: str) -> float:
    """A number that is not negative."""
    return 0.0 if _number(text) == 0 else _positive(text, "0 or more")


def _whole(text: str, low: int, end: int) -> int:
    expected = f"a whole number from {low} to {end - 1}"
    try:
        value = int(text)
    except ValueError:
        raise _refused(text, expected) from None
    if not low <= value < end:
        raise _refused(text, expected)
    return value


def _positive(text: str, expected: str) -> float:
    value = _number(text)
    if not 0 < value < math.inf:
        raise _refused(text, expected)
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _refused(text: str, expected: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"{text[:40]!r} is not {expected}")
