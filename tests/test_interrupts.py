"""Interrupts that find a program in a callback of the garbage collector."""

import gc
import signal
import sys
import time

import pytest

from kashin_jax.interrupts import no_interrupt_is_lost


def test_an_interrupt_in_a_callback_of_the_garbage_collector_arrives():
    """Guards Ctrl-C: Python prints what such callbacks raise, and goes on."""
    left = [signal.SIGINT]

    def callback(phase, info):
        if left:
            signal.raise_signal(left.pop())

    usual = sys.unraisablehook
    gc.callbacks.append(callback)
    try:
        with pytest.raises(KeyboardInterrupt), no_interrupt_is_lost():
            gc.collect()
            time.sleep(60)
    finally:
        gc.callbacks.remove(callback)
    assert not left
    assert sys.unraisablehook is usual


def test_other_exceptions_that_cannot_be_raised_are_printed_as_ever(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: seen.append(found))

    with no_interrupt_is_lost():
        made_and_dropped()
    assert [str(each.exc_value) for each in seen] == ["of a finalizer"]


def made_and_dropped():
    class Broken:
        def __del__(self):
            raise ValueError("of a finalizer")

    Broken()
