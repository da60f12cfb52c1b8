"""The CPU kernel without memory: an error of the call, and the process goes on.

Guards against exceptions that are thrown into XLA, which end the process, and against
threads that work on for a call that has failed.
"""

import ctypes
from pathlib import Path

import cpu_kernel_build
import jax
import numpy as np
import pytest
from packed_matrices import random_words

from kashin_jax import JointKashin
from kashin_jax.tensors.kernels import cpu, library
from kashin_jax.tensors.products import ProductOptions

pytestmark = pytest.mark.slow
TARGET = "kashin_jax_product_without_memory"


@pytest.fixture(scope="module")
def fail_after(tmp_path_factory):
    """Says after how many allocations the kernel's next ones fail."""
    if library.instruction_set() is None:
        pytest.skip("needs a C++ compiler")
    source = Path(__file__).with_name("failing_allocator.cc")
    flags = ("-O0", "-Wl,-Bsymbolic")
    built = cpu_kernel_build.build(
        tmp_path_factory.mktemp("kernel"), *flags, sources=[source]
    )
    loaded = ctypes.CDLL(str(built))
    handler = jax.ffi.pycapsule(loaded.kashin_product)
    jax.ffi.register_ffi_target(TARGET, handler, platform="cpu")
    loaded.kashin_fail_after.argtypes = [ctypes.c_int64]
    return loaded.kashin_fail_after


# Look-ups, decoded blocks, and the transpose, with half widths and shared tasks.
CASES = {
    "look-ups": (cpu.cpu_kashin_product, 3, (512, 2048), 12),
    "half widths": (cpu.cpu_kashin_product, 3.5, (128, 64), 3),
    "decoded": (cpu.cpu_kashin_product, 4, (256, 512), 70),
    "transposed": (cpu.cpu_kashin_transposed, 4, (2048, 512), 5),
}


@pytest.mark.parametrize("case", CASES)
def test_whatever_allocation_fails_the_call_fails(case, fail_after, monkeypatch):
    product, bits, shape, rows = CASES[case]
    monkeypatch.setattr(cpu, "TARGET", TARGET)
    monkeypatch.setattr(cpu, "instruction_set", lambda: 0)
    tensor = random_words(JointKashin(bits=bits), shape)
    bases = tensor.derive_bases()
    inputs = shape[1] if product is cpu.cpu_kashin_transposed else shape[0]
    x = np.random.default_rng(0).normal(size=(rows, inputs)).astype(np.float32)
    run = jax.jit(lambda x: product(x, tensor, bases, ProductOptions()))
    expected = np.asarray(run(x))
    failed = 0
    for count in range(100):
        fail_after(count)
        try:
            y = jax.block_until_ready(run(x))
        # A call that is short is not dispatched to a thread, and raises another kind.
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            assert "out of memory" in str(error)
            failed += 1
        else:
            # A thread that could not be asked for is done without.
            np.testing.assert_array_equal(y, expected)
            if failed and count > failed + 8:
                break
        finally:
            fail_after(-1)
    assert failed >= 2
    np.testing.assert_array_equal(run(x), expected)
