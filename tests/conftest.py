"""Strict numerics for every test, and compiled programs that tests share."""

import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import pytest
from cpu_kernel_build import build

MONTH = 30 * 24 * 3600  # seconds


def pytest_configure(config):
    """Compiled programs are kept: most of a test's time is spent on compiling.

    Modules, workers and runs load what another one compiled, from pytest's own cache
    (`--cache-clear` empties it). Programs are named after all that they are made from.
    """
    # Slow tests run as users run them.
    if "not slow" in config.option.markexpr and not hasattr(config, "workerinput"):
        compile_in_less_time()
    # Tracing makes many objects that stay: looking through them as often as Python does
    # took 2.4 of 30 seconds of CPU time with test_decoder.py.
    gc.set_threshold(100_000, 10, 10)
    programs = str(kept_programs(config))
    jax.config.update("jax_compilation_cache_dir", programs)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # Of the programs and notebooks that tests start, too.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    # All tests multiply by the kernel of this tree, whatever is installed: ten seconds
    # of compiling, once for every change of it.
    if "KASHIN_JAX_KERNEL_LIBRARY" not in os.environ:
        # Not in pytest's cache, which every worker empties if it is to be emptied.
        kernels = Path(__file__).parents[1] / "build" / "tests"
        kernels.mkdir(parents=True, exist_ok=True)
        if library := build(kernels):
            os.environ["KASHIN_JAX_KERNEL_LIBRARY"] = str(library)


def compile_in_less_time():
    """XLA emits fusions as it did before it had emitters of their own, if it still can.

    That takes 24 seconds of CPU time for 38 with test_more_controls.py, all in all.
    An unknown flag ends a process, so another one tries it. Workers inherit it.
    """
    flag = "--xla_cpu_use_fusion_emitters=false"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    start = [sys.executable, "-c", "import jax; jax.devices()"]
    tried = subprocess.run(
        start, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True
    )
    if tried.returncode == 0:
        os.environ["XLA_FLAGS"] = flags


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at marks
def pytest_collection_modifyitems(items):
    """Modules of one way to compile follow each other, those of whole programs first.

    They are the longest: begun last, one worker would wait for them half a minute.
    """
    items.sort(key=is_of_optimized_module, reverse=True)


def is_of_optimized_module(item):
    module = item.getparent(pytest.Module)
    return module is not None and module.get_closest_marker("optimized") is not None


@pytest.hookimpl(tryfirst=True)  # before any fixture computes something
def pytest_runtest_setup(item):
    """XLA optimizes little, which takes a third off the time to compile.

    Modules and tests that compare bits, or numbers that other programs made, are marked
    `optimized`: they run as users run them. Programs do not know which it was, so they
    are dropped where it changes.
    """
    is_lazy = item.get_closest_marker("optimized") is None
    if is_lazy != jax.config.values["jax_disable_most_optimizations"]:
        jax.config.update("jax_disable_most_optimizations", is_lazy)
        jax.clear_caches()


def kept_programs(config):
    """The directory of compiled programs, less those of a month ago."""
    if not hasattr(config, "cache"):  # -p no:cacheprovider
        programs = Path(tempfile.mkdtemp())
        config.add_cleanup(partial(shutil.rmtree, programs, ignore_errors=True))
        return programs
    programs = config.cache.mkdir("programs")
    is_worker = hasattr(config, "workerinput")
    for program in () if is_worker else programs.iterdir():
        if program.stat().st_mtime < time.time() - MONTH:
            program.unlink(missing_ok=True)
    return programs


@pytest.fixture(autouse=True)
def strict_numerics():
    """Promotion that a reader cannot see is an error while a test runs."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True, scope="module")
def programs_of_a_module():
    yield
    drop_many_programs()


@pytest.fixture(autouse=True)
def programs_of_a_slow_test(request):
    """A module of them has been seen to reach 63,000 maps."""
    yield
    if request.node.get_closest_marker("slow") is not None:
        drop_many_programs()


def drop_many_programs():
    """Programs are kept for the next tests until there are many.

    A program keeps memory maps, of which Linux allows a process 65,530: a worker out of
    maps is killed. A module of quick tests adds 1,000 to 5,000; counting takes up to
    ten milliseconds.
    """
    if number_of_maps() > 30_000:
        jax.clear_caches()
        gc.collect()


def number_of_maps():
    """Memory maps of this process; as good as too many where nobody says."""
    maps = Path("/proc/self/maps")
    return len(maps.read_bytes().splitlines()) if maps.exists() else 10**6


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
