"""The compiled CPU kernel: whether there is one, and what it was not used for.

The library is loaded when a product is first traced. Nothing happens on import.
"""

import ctypes
import logging
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import jax

__all__ = [
    "PATH_VARIABLE",
    "VARIABLE",
    "KernelReport",
    "decline",
    "instruction_set",
    "library_path",
    "report",
]

VARIABLE = "KASHIN_JAX_KERNELS"
"""Environment variable: `off`, or the instruction set to use; otherwise the best."""

PATH_VARIABLE = "KASHIN_JAX_KERNEL_LIBRARY"
"""Environment variable: another library than the installed one, for tests."""

TARGET = "kashin_jax_product"
# As the handler numbers them. `plain` is for tests alone: XLA is faster.
_SETS = {"plain": 0, "avx2": 1, "avx512": 2, "neon": 3}
# What a processor has, by its best: those of x86 contain each other, and NEON is ARM's.
_AVAILABLE = {0: {0}, 1: {0, 1}, 2: {0, 1, 2}, 3: {0, 3}}

_log = logging.getLogger("kashin_jax")
# Products that XLA multiplied, by the reason why; for `report` alone.
_declined: dict[str, int] = {}


class KernelReport(NamedTuple):
    """What multiplies by packed matrices on this machine's CPU.

    Attributes:
      instruction_set: `avx512`, `avx2` or `neon`; None where XLA multiplies everything.
      declined: How many traced products were left to XLA, by the reason why.
    """

    instruction_set: str | None
    declined: dict[str, int]


def report() -> KernelReport:
    """Which CPU kernel there is, and which products it did not take so far.

    Products are counted when they are traced: one that is compiled once and called a
    thousand times counts once.
    """
    found = instruction_set()
    name = {number: name for name, number in _SETS.items()}.get(found or 0)
    return KernelReport(name if found is not None else None, dict(_declined))


def decline(reason: str) -> None:
    """Notes that XLA multiplies, and says so the first time."""
    if reason not in _declined:
        _log.info("A product is left to XLA: %s.", reason)
    _declined[reason] = _declined.get(reason, 0) + 1


@lru_cache(maxsize=1)
def instruction_set() -> int | None:
    """The number of the instruction set to multiply with; None for XLA.

    Loads and registers the library the first time, and says at `logging.INFO` why where
    it cannot be used.

    Raises:
      ValueError: If `KASHIN_JAX_KERNELS` is not the name of one.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", "off", *_SETS):
        raise ValueError(
            f"{VARIABLE}={asked!r} is not known; use off, {', '.join(_SETS)}, or leave "
            "it unset for the best that this processor has."
        )
    found = _registered(asked)
    if isinstance(found, int):
        return found
    _log.info("XLA multiplies by packed matrices, not the CPU kernel: %s.", found)
    return None


def _registered(asked: str) -> int | str:
    """The instruction set that a library, now registered, is to use; or why not."""
    if asked == "off":
        return f"{VARIABLE}=off"
    path = library_path()
    if path is None:
        return "it was not built; reinstall with a C++ compiler at hand"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path.name} cannot be loaded ({error})"
    best: int = library.kashin_instruction_set()
    wanted = _SETS.get(asked, best)
    if not best and not asked:
        return "this processor has neither AVX2, AVX-512 with VBMI nor 64-bit NEON"
    if wanted not in _AVAILABLE[best]:
        return f"this processor does not have {asked}"
    if not _is_understood(built := library.kashin_ffi_version()):
        return f"it was built for version {built} of XLA's FFI, which JAX lacks"
    handler = jax.ffi.pycapsule(library.kashin_product)
    jax.ffi.register_ffi_target(TARGET, handler, platform="cpu")
    return wanted


def library_path() -> Path | None:
    """The library that was built when the package was installed, if one was."""
    if given := os.environ.get(PATH_VARIABLE):
        return Path(given)
    package = Path(__file__).resolve().parents[2]
    return next(iter(sorted(package.glob("_cpu_kernel*.so"))), None)


def _is_understood(built: int) -> bool:
    """Whether this JAX takes handlers of such a version: 1000 * major + minor.

    One that does not fails when the CPU is initialised, and all of JAX with it.
    """
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    if not header.exists():
        return False
    found = re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header.read_text())
    version = {name: int(number) for name, number in found}
    if version.keys() != {"MAJOR", "MINOR"}:
        return False
    return built // 1000 == version["MAJOR"] and built % 1000 <= version["MINOR"]
