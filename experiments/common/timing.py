"""How long a call takes, compilation left out."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

__all__ = ["median_seconds"]


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median time of a call; a first one, which compiles, does not count."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)
