"""Ctrl-C and SIGTERM as a wish to stop between two steps."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["stop_signals"]


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Yields an event that is set by the first SIGINT or SIGTERM.

    A step consumes its state, so an exception in the middle of one could not be
    followed by a checkpoint. A second signal acts as usual.
    """
    wish = threading.Event()
    # Python delivers signals to the main thread only; elsewhere there is none to catch.
    catches = threading.current_thread() is threading.main_thread()
    caught = (signal.SIGINT, signal.SIGTERM) if catches else ()
    usual: dict[int, Any] = {number: signal.getsignal(number) for number in caught}

    def note(number: int, frame: object) -> None:
        wish.set()
        signal.signal(number, usual[number])

    for number in caught:
        signal.signal(number, note)
    try:
        yield wish
    finally:
        for number in caught:
            signal.signal(number, usual[number])
