"""Products by packed weights of other libraries and by ours, in turn.

    make peers
    python -m benchmarks.peers --libraries=.peers

Four matrices of 4096 x 4096, one after the other. Beside dense float32 and bfloat16 and
our codes: ONNX Runtime's `MatMulNBits` of 4 bits in groups of 32, with activations in
float32 and rounded to int8, and ggml's Q4_0, Q4_K and Q2_K, whose activations are
rounded to int8 (`benchmarks.ggml`), on as many threads. Weights are random, which
changes no time. Ratios are to the faster of `x @ K` and `x @ W.T` in float32, within
one run in which all take turns.

Prints a table and adds a record per row to bench_peers.jsonl in `--out`.
"""

import dataclasses
import functools
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from benchmarks.alternating import time_in_turn
from benchmarks.blocks import random_layers, transposed
from benchmarks.ggml import TYPES, Ggml
from benchmarks.methods import method_config
from experiments.common.flags import (
    check_flags,
    flag,
    parse_numbers,
    parse_widths,
    run_program,
)
from experiments.common.results import (
    environment_fields,
    merge_records,
    prepare_output,
)
from experiments.common.tables import Column, aligned_table, fixed
from kashin_jax import matmul, stored_bits
from kashin_jax.errors import UsageError
from kashin_jax.tensors.kernels import report

__all__ = ["main"]

ARTIFACT = "bench_peers"
_SIDE, _COUNT, _GROUP = 4096, 4, 32
# How exactly ONNX Runtime multiplies: its `accuracy_level`.
_LEVELS = {"float32": 1, "int8": 4}

Program = Callable[[], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeersConfig:
    """What is multiplied, and where the other libraries are."""

    bits: tuple[str, ...] = flag(("2", "3", "4", "5"), "Widths of our codes, a list.")
    rows: tuple[str, ...] = flag(("1", "8", "64"), "Rows of activations, as a list.")
    libraries: str = flag(
        "", "Directory that `make peers` filled; empty: as installed."
    )
    repeats: int = flag(10, "Timed rounds.", (lambda x: x >= 1, "at least 1"))
    seconds: float = flag(
        10.0, "Least seconds for a number of rows.", (lambda x: x > 0, "positive")
    )
    out: str = flag("runs", "Directory of the results.", (bool, "given"))

    def __post_init__(self) -> None:
        check_flags(self)


def run(config: PeersConfig) -> int:
    """Times all programs for every number of rows; returns the exit code."""
    out = prepare_output(config.out)
    onnx, runtime = _libraries(config.libraries)
    ggml = Ggml()
    square = np.random.default_rng(0).normal(size=(_SIDE, _SIDE)).astype(np.float32)
    square /= np.float32(_SIDE**0.5)
    widths = parse_widths("bits", config.bits, 2, 5)
    shown = []
    for rows in parse_numbers("rows", config.rows, 1, 2**12):
        x = jax.random.normal(jax.random.key(rows), (rows, _SIDE))
        programs, stored = _ours(x, widths)
        for kind, level in _LEVELS.items():
            name = f"onnxruntime MatMulNBits, {kind} activations"
            programs[name] = _onnxruntime(onnx, runtime, np.asarray(x), level)
            stored[name] = 4 + 32 / _GROUP
        for kind in TYPES:
            name = f"ggml {kind} ({ggml.instruction_set})"
            programs[name], stored[name] = ggml.chain(
                np.asarray(x), square, kind, _COUNT
            )
        times, load = time_in_turn(programs, config.repeats, config.seconds)
        dense = [times["float32 x @ K"], times["float32 x @ W.T"]]
        best, median = min(t.best for t in dense), min(t.median for t in dense)
        for name, own in times.items():
            shown.append({
                "method": name, "rows": rows, "stored_bits_per_weight": stored[name],
                "milliseconds": 1e3 * own.best,
                "median_milliseconds": 1e3 * own.median,
                "times_dense": own.best / best,
                "median_times_dense": own.median / median,
                "instruction_set": report().instruction_set,
                "onnxruntime": runtime.__version__, "xllamacpp": ggml.version,
                "load": load,
            } | environment_fields())  # fmt: skip
        merge_records(out, ARTIFACT, shown)
    print(aligned_table(shown, COLUMNS))
    return 0


def _libraries(directory: str) -> tuple[Any, Any]:
    if directory:
        sys.path.append(str(Path(directory).resolve()))
    try:
        return importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    except ImportError as error:
        raise UsageError(
            f"{error}; run `make peers`, and give its directory by --libraries=.peers."
        ) from error


def _in_sequence(
    x: Float[Array, "r m"], layers: list[Any], product: Callable[[Array, Any], Array]
) -> Float[Array, "r m"]:
    for layer in layers:
        x = product(x, layer)
    return x


def _ours(
    x: Float[Array, "r m"], widths: list[int | float]
) -> tuple[dict[str, Program], dict[str, float]]:
    """Dense products and those of our codes, and the bits that each reads."""
    shapes = ((_SIDE, _SIDE),) * _COUNT
    keys = jax.random.split(jax.random.key(0), _COUNT)
    dense = [jax.random.normal(key, (_SIDE, _SIDE)) / _SIDE**0.5 for key in keys]
    programs: dict[str, Program] = {}
    stored: dict[str, float] = {}

    def add(name: str, bits: float, x: Array, layers: list[Any], product: Any) -> None:
        jitted = jax.jit(functools.partial(_in_sequence, product=product))
        programs[name] = functools.partial(jitted, x, layers)
        stored[name] = bits

    for kind in (jnp.float32, jnp.bfloat16):
        bits, name = 8 * jnp.dtype(kind).itemsize, jnp.dtype(kind).name
        layers = [w.astype(kind) for w in dense]
        add(f"{name} x @ K", bits, x.astype(kind), layers, jnp.matmul)
        turned = [w.T.copy() for w in layers]
        add(f"{name} x @ W.T", bits, x.astype(kind), turned, transposed)
    for width in widths:
        quantizer = method_config("kashin-joint", width)
        assert quantizer is not None, "joint coding has all of these widths"
        packed = random_layers(shapes, quantizer)
        bits = sum(stored_bits(layer.tensor) for layer in packed) / _COUNT / _SIDE**2
        add(f"kashin-joint {width}", bits, x, packed, matmul)
    return programs, stored


def _onnxruntime(
    onnx: Any, runtime: Any, x: Float[np.ndarray, "r m"], level: int
) -> Program:
    """A session of `MatMulNBits` nodes in a row."""
    helper, tensors, nodes = onnx.helper, [], []
    rng, groups = np.random.default_rng(0), _SIDE // _GROUP
    for i in range(_COUNT):
        codes = rng.integers(0, 256, (_SIDE, groups, _GROUP // 2), np.uint8)
        scales = np.full(_SIDE * groups, 0.2 / _SIDE**0.5, np.float32)
        for name, value in (("codes", codes), ("scales", scales)):
            tensors.append(onnx.numpy_helper.from_array(value, f"{name}{i}"))
        nodes.append(helper.make_node(
            "MatMulNBits", [f"x{i}", f"codes{i}", f"scales{i}"], [f"x{i + 1}"],
            domain="com.microsoft", K=_SIDE, N=_SIDE, bits=4, block_size=_GROUP,
            accuracy_level=level,
        ))  # fmt: skip
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, x.shape)
        for name in ("x0", f"x{_COUNT}")
    ]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    session = runtime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return functools.partial(session.run, None, {"x0": x})


COLUMNS = (
    Column("method", "method"),
    Column("rows", "rows"),
    Column("stored_bits_per_weight", "bits", fixed(2)),
    Column("milliseconds", "ms", fixed(2)),
    Column("times_dense", "times dense", fixed(2)),
    Column("median_times_dense", "of medians", fixed(2)),
)


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_program("benchmarks.peers", __doc__, PeersConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
