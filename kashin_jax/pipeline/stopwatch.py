"""Seconds of the phases of a run, those in which programs were compiled apart."""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax.monitoring

__all__ = ["Stopwatch"]

# Tracing, lowering and XLA's own work, or reading a kept program.
_COMPILATION = "/jax/core/compile/"


class Stopwatch:
    """Adds up seconds of named phases, and of all compilation within them.

    JAX tells when it compiled to listeners, which all programs of a process share: one
    is registered while a phase lasts, and none is left behind.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._compilation = 0.0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts what is done meanwhile; results must be there when it ends.

        Args:
          name: Of the phase; one may last several times, but not within another.
        """
        start = time.perf_counter()
        compiled = 0.0
        try:
            with _compilation() as spans:
                try:
                    yield
                finally:
                    compiled = sum(end - begun for begun, end in spans)
        finally:
            spent = time.perf_counter() - start - compiled
            # Two clocks: a phase of nothing else may come out below zero.
            self._seconds[name] = self._seconds.get(name, 0.0) + max(spent, 0.0)
            self._compilation += compiled

    def lap(self) -> tuple[dict[str, float], float]:
        """Seconds by phase and of compilation since the last lap, and starts anew."""
        found = self._seconds, self._compilation
        self._seconds, self._compilation = {}, 0.0
        return found


@contextlib.contextmanager
def _compilation() -> Iterator[list[tuple[float, float]]]:
    """Spans of time in which this thread compiles, none of them within another."""
    spans: list[tuple[float, float]] = []
    thread = threading.get_ident()

    def listen(event: str, start_time: float, end_time: float, **_: Any) -> None:
        if event.startswith(_COMPILATION) and threading.get_ident() == thread:
            # A program is traced within another one, which is told of later.
            while spans and spans[-1][0] >= start_time:
                spans.pop()
            spans.append((start_time, end_time))

    jax.monitoring.register_event_time_span_listener(listen)
    try:
        yield spans
    finally:
        jax.monitoring.unregister_event_time_span_listener(listen)
