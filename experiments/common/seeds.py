"""Values of several seeds as fields of a record: all of them, mean and spread."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

__all__ = ["spread_fields"]


def spread_fields(name: str, values: Iterable[float]) -> dict[str, Any]:
    """`NAME`, a list, with `NAME_mean` and `NAME_spread`, a standard deviation.

    Values that are not finite do not count; without any other both are None.
    """
    listed = [float(value) for value in values]
    finite = [value for value in listed if math.isfinite(value)]
    return {
        name: listed,
        f"{name}_mean": float(np.mean(finite)) if finite else None,
        f"{name}_spread": float(np.std(finite)) if finite else None,
    }
