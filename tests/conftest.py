"""Strict numerics for every test: no silent promotion of dtypes or ranks."""

import gc
import signal

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(autouse=True)
def strict_numerics():
    """Promotion that a reader cannot see is an error while a test runs."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True, scope="module")
def programs_are_dropped():
    """A compiled program keeps memory maps, of which Linux allows a process 65,530.

    The whole suite compiles more in one worker, and a worker out of maps is killed.
    """
    yield
    jax.clear_caches()
    gc.collect()


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


@pytest.fixture(scope="module")
def compiled_steps_are_kept(tmp_path_factory):
    """A resumed run compiles the same step again, which takes most of its time here."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
