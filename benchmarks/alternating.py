"""Times of programs that take turns, so that others on the machine slow all alike."""

import os
import random
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

__all__ = ["Times", "time_in_turn"]


_LONG = 0.5  # seconds


class Times(NamedTuple):
    """Seconds of one program.

    Attributes:
      best: The least: what others on the machine add is never negative.
      median: Of all runs.
    """

    best: float
    median: float


def time_in_turn(
    programs: Mapping[str, Callable[[], Any]], rounds: int, seconds: float
) -> tuple[dict[str, Times], float]:
    """Runs all programs in every round, in an order of its own.

    What takes less than half a second is timed twice, after a run that fills the
    caches, which held another program's data.

    Args:
      programs: By name; run once before the first round, which compiles them.
      rounds: At least this many.
      seconds: Rounds go on until so much time has passed.

    Returns:
      Times by name, and the load of the machine meanwhile: processes that want a core,
      this one included, averaged over a minute.
    """
    for program in programs.values():
        jax.block_until_ready(program())
    times: dict[str, list[float]] = {name: [] for name in programs}
    start, done = time.perf_counter(), 0
    while done < rounds or time.perf_counter() - start < seconds:
        order = list(programs)
        random.Random(done).shuffle(order)
        for name in order:
            first = _seconds(programs[name])
            is_long = first > _LONG
            times[name] += [first] if is_long else map(_seconds, [programs[name]] * 2)
        done += 1
    found = {name: Times(min(t), sorted(t)[len(t) // 2]) for name, t in times.items()}
    return found, os.getloadavg()[0]


def _seconds(program: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    jax.block_until_ready(program())
    return time.perf_counter() - begun
