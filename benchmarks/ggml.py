"""ggml's products with packed weights, called in the library that a wheel brings.

xllamacpp's extension has all of ggml in it, and its functions can be called. Weights
are multiplied as files store them; llama.cpp repacks some when it loads a model.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from kashin_jax.errors import UsageError

__all__ = ["TYPES", "Ggml"]

TYPES = {"Q4_0": 2, "Q4_K": 12, "Q2_K": 10}
"""Numbers of ggml's packed types, by name."""

_PACKAGE = "xllamacpp"
_FLOAT32 = 0
_MIB = 2**20

_pointer, _size, _int = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_int64 = ctypes.c_int64
_floats = ctypes.POINTER(ctypes.c_float)


class _Parameters(ctypes.Structure):
    _fields_ = (
        ("mem_size", _size), ("mem_buffer", _pointer), ("no_alloc", ctypes.c_bool),
    )  # fmt: skip


# Result and arguments of the functions that are called.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "ggml_init": (_pointer, _Parameters),
    "ggml_new_tensor_2d": (_pointer, _pointer, _int, _int64, _int64),
    "ggml_mul_mat": (_pointer, _pointer, _pointer, _pointer),
    "ggml_new_graph": (_pointer, _pointer),
    "ggml_build_forward_expand": (None, _pointer, _pointer),
    "ggml_get_data": (_pointer, _pointer),
    "ggml_nbytes": (_size, _pointer),
    "ggml_quantize_chunk": (
        _size, _int, _floats, _pointer, _int64, _int64, _int64, _floats,
    ),
    "ggml_backend_cpu_init": (_pointer,),
    "ggml_backend_cpu_set_n_threads": (None, _pointer, _int),
    "ggml_backend_graph_compute": (_int, _pointer, _pointer),
    "ggml_cpu_has_avx512": (_int,),
}  # fmt: skip


class Ggml:
    """The library, and a backend of it on as many threads as there are cores.

    Attributes:
      version: Of the wheel.
      instruction_set: The best that it was compiled for, of two.
    """

    def __init__(self) -> None:
        found = importlib.util.find_spec(_PACKAGE)
        folder = Path(found.origin or "").parent if found is not None else Path()
        path = next(iter(folder.glob(f"{_PACKAGE}*.so")), None)
        if found is None or path is None:
            raise UsageError(
                f"There is no {_PACKAGE}; run `make peers`, and give its directory by "
                "--libraries=.peers."
            )
        self._library = ctypes.CDLL(str(path))
        for name, (result, *arguments) in _FUNCTIONS.items():
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, arguments
        self.version = importlib.metadata.version(_PACKAGE)
        has_512 = self._library.ggml_cpu_has_avx512()
        self.instruction_set = "avx512" if has_512 else "avx2"
        self._backend = self._library.ggml_backend_cpu_init()
        threads = len(os.sched_getaffinity(0))
        self._library.ggml_backend_cpu_set_n_threads(self._backend, threads)

    def chain(
        self,
        x: Float[np.ndarray, "r m"],
        w: Float[np.ndarray, "m m"],
        name: str,
        count: int,
    ) -> tuple[Callable[[], Float[np.ndarray, "r m"]], float]:
        """`x @ W.T`, so many times in a row, for a packed W; and its bits per weight.

        Args:
          x: Rows, which the library rounds to 8 bits for these types.
          w: Packed once; every product has a copy of its own.
          name: One of `TYPES`.
          count: Of products.
        """
        call, (rows, side) = self._library, x.shape
        room = count * (w.nbytes + x.nbytes) // 2 + 64 * _MIB
        context = call.ggml_init(_Parameters(room, None, False))
        first = y = call.ggml_new_tensor_2d(context, _FLOAT32, side, rows)
        ctypes.memmove(
            call.ggml_get_data(first), np.ascontiguousarray(x).ctypes.data, x.nbytes
        )
        size = 0
        for i in range(count):
            tensor = call.ggml_new_tensor_2d(context, TYPES[name], side, side)
            to = call.ggml_get_data(tensor)
            if i == 0:
                source, size = to, call.ggml_nbytes(tensor)
                values = np.ascontiguousarray(w).ctypes.data_as(_floats)
                call.ggml_quantize_chunk(TYPES[name], values, to, 0, side, side, None)
            else:
                ctypes.memmove(to, source, size)
            y = call.ggml_mul_mat(context, tensor, y)
        graph = call.ggml_new_graph(context)
        call.ggml_build_forward_expand(graph, y)
        data = ctypes.cast(call.ggml_get_data(y), _floats)

        def run() -> Float[np.ndarray, "r m"]:
            if status := call.ggml_backend_graph_compute(self._backend, graph):
                raise RuntimeError(f"ggml ended with status {status}.")
            return np.ctypeslib.as_array(data, (rows, side))

        return run, 8 * size / w.size
