"""Where the CPU kernel cannot be used, XLA multiplies and says so once."""

import ctypes
import logging
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from packed_matrices import random_words

from kashin_jax import JointKashin
from kashin_jax.tensors import kernels
from kashin_jax.tensors.kernels import cpu, library


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """Every test loads the library for itself."""
    monkeypatch.setattr(library, "_declined", {})
    library.instruction_set.cache_clear()
    yield
    monkeypatch.undo()
    library.instruction_set.cache_clear()


def product():
    tensor = random_words(JointKashin(), (64, 64))
    x = jnp.ones((2, 64))
    y = cpu.cpu_kashin_product(x, tensor, tensor.derive_bases(), cpu.ProductOptions())
    np.testing.assert_allclose(y, x @ tensor.decode(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"KASHIN_JAX_KERNELS": "off"}, "KASHIN_JAX_KERNELS=off"),
        ({"KASHIN_JAX_KERNEL_LIBRARY": "no/library.so"}, "cannot be loaded"),
    ],
)
def test_xla_multiplies_and_says_why(variables, reason, monkeypatch, caplog):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.INFO, logger="kashin_jax"):
        product()
        product()
    (why, left) = [record.getMessage() for record in caplog.records]
    assert reason in why and "left to XLA" in left
    assert kernels.report() == (None, {"there is no CPU kernel": 2})


def test_without_a_library_xla_multiplies(monkeypatch, caplog):
    monkeypatch.setattr(library, "library_path", lambda: None)
    with caplog.at_level(logging.INFO, logger="kashin_jax"):
        product()
    assert "was not built" in caplog.text


def test_a_library_for_another_ffi_is_not_registered(monkeypatch):
    """One built with newer headers keeps the CPU, and all of JAX, from starting."""
    assert library._is_understood(3)
    assert not library._is_understood(99)
    assert not library._is_understood(1003)
    monkeypatch.setattr(library.jax.ffi, "include_dir", lambda: "nowhere")
    assert not library._is_understood(3)


@pytest.mark.parametrize(
    ("asked", "best", "found"),
    [
        ("", 3, "neon"),
        ("plain", 3, "plain"),
        ("avx2", 3, None),
        ("avx512", 3, None),
        ("neon", 2, None),
        ("avx2", 2, "avx2"),
        ("avx512", 1, None),
        ("", 0, None),
    ],
)
def test_an_instruction_set_of_another_processor_is_not_used(
    asked, best, found, monkeypatch, caplog
):
    """Guards against calls for AVX2 on an ARM, each of which would fail."""
    built = SimpleNamespace(
        kashin_instruction_set=lambda: best,
        kashin_ffi_version=lambda: 3,
        # Nothing calls it.
        kashin_product=ctypes.CDLL(None).abort,
    )
    monkeypatch.setattr(library, "library_path", lambda: Path("library.so"))
    monkeypatch.setattr(library.ctypes, "CDLL", lambda path: built)
    monkeypatch.setattr(library.jax.ffi, "register_ffi_target", lambda *a, **k: None)
    monkeypatch.setenv("KASHIN_JAX_KERNELS", asked)
    with caplog.at_level(logging.INFO, logger="kashin_jax"):
        assert kernels.report().instruction_set == found
    assert ("this processor" in caplog.text) == (found is None)


def test_names_of_instruction_sets_are_checked(monkeypatch):
    monkeypatch.setenv("KASHIN_JAX_KERNELS", "sse9")
    with pytest.raises(ValueError, match=r"KASHIN_JAX_KERNELS='sse9'.*plain, avx2"):
        library.instruction_set()
