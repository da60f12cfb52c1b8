"""Reading values of the command line strictly: argparse adds which flag was wrong."""

import argparse
import json
import math
from collections.abc import Iterator
from typing import Any

__all__ = [
    "Methods",
    "read_bits",
    "read_count",
    "read_seed",
    "read_setting",
    "read_size",
    "read_temperature",
]

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1, "": 1}


class Methods:
    """Names of all methods that are registered when somebody asks for them.

    Knowing them takes JAX, which other uses of the command need not wait for.
    """

    def __iter__(self) -> Iterator[str]:
        # Here rather than above: importing it imports JAX.
        from kashin_jax.methods import method_names

        return iter(method_names())

    def __contains__(self, name: object) -> bool:
        return name in tuple(self)


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


def read_setting(text: str) -> tuple[str, Any]:
    """A field and its value, `effort=fast`; values are JSON, or else text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise _refused(text, "a field and a value such as effort=fast")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


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
