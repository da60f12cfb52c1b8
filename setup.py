"""Builds the CPU kernel where there is a compiler; all else is in pyproject.toml.

`KASHIN_JAX_KERNELS=off` leaves it out, which makes a wheel for every platform.
"""

import os
from glob import glob
from pathlib import Path

from setuptools import Extension, setup

SOURCES = "kashin_jax/csrc"


def cpu_kernel() -> Extension:
    """A shared library that is loaded with ctypes: nothing of Python is in it."""
    return Extension(
        "kashin_jax._cpu_kernel",
        sources=sorted(glob(f"{SOURCES}/*.cc")),
        depends=sorted(glob(f"{SOURCES}/**/*.h", recursive=True)),
        # Headers of the oldest jaxlib that is supported: a library built with those of
        # a newer one keeps an older JAX from starting.
        include_dirs=[SOURCES, f"{SOURCES}/third_party"],
        extra_compile_args=Path(SOURCES, "flags.txt").read_text().split(),
        language="c++",
        # Without a compiler, or with a broken one, XLA multiplies as it always did.
        optional=True,
    )


is_off = os.environ.get("KASHIN_JAX_KERNELS") == "off"
setup(ext_modules=[] if is_off else [cpu_kernel()])
