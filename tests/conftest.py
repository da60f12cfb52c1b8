"""Strict numerics for every test: no silent promotion of dtypes or ranks."""

import signal

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_numerics():
    """Promotion that a reader cannot see is an error while a test runs."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True, scope="session")
def interruptible():
    """Ctrl-C works in tests and their children, however the suite was started.

    A shell without job control starts background commands with the signal ignored.
    """
    usual = signal.getsignal(signal.SIGINT)
    if usual == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)
