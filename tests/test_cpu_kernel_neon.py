"""The CPU kernel for 64-bit ARM, compiled and emulated: `make neon`."""

import shutil
import subprocess
from pathlib import Path

import pytest

TOOLS = ("make", "aarch64-linux-gnu-g++", "qemu-aarch64")
ABSENT = [tool for tool in TOOLS if shutil.which(tool) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(ABSENT), reason=f"needs {', '.join(ABSENT)}")
def test_neon_multiplies_as_plain_code_and_float64_do():
    done = subprocess.run(
        ["make", "neon"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" 0 wrong") == 2


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_without_a_compiler_or_emulator_it_says_what_is_missing():
    """Guards against an exit status of 0 for what was never run."""
    done = subprocess.run(
        ["make", "neon", "ARM_CXX=sh", "ARM_RUN=no-emulator"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert done.stderr.startswith("make neon needs no-emulator (Debian: ")
