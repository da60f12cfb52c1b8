"""Time, memory and quality of the decomposition and the codebooks.

    python -m benchmarks.core
    python -m benchmarks.core --only=decomposition,memory --repeats=5

Prints a table per part and adds it to bench_core.jsonl in `--out`. Times are the median
of `--repeats` runs after one that compiles, on the machine as it is: quote the ratios.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from experiments.common.flags import check_flags, flag, run_program
from experiments.common.results import environment_fields, merge_records, prepare_output
from experiments.common.tables import Column, aligned_table, fixed
from experiments.common.text import ASSETS
from experiments.common.timing import median_seconds
from kashin_jax import (
    BasisSpec,
    GreedyKashin,
    kashin_decompose,
    make_pair,
    quantize,
)
from kashin_jax.codebooks.plane import (
    PairCodebook,
    _best_start,
    assign_pairs,
    lloyd_pairs,
)
from kashin_jax.methods.kashin import decompose_blocks
from kashin_jax.models.loading import load_opt
from kashin_jax.packing import pack_codes
from kashin_jax.pipeline import path_key, selected_kernels

__all__ = ["main"]

BASES = ("hadamard", "haar", "sign-dct", "dct")
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Which parts to run, and how often."""

    only: tuple[str, ...] = flag(
        ("decomposition", "model", "starts", "memory"),
        "Parts: decomposition, model, starts, memory.",
        (lambda names: set(names) <= set(PARTS) and names, "a list of parts"),
    )
    repeats: int = flag(3, "Timed runs.", (lambda x: x >= 1, "at least 1"))
    out: str = flag("runs", "Directory of the results.", (bool, "given"))

    def __post_init__(self) -> None:
        check_flags(self)


def _decomposition(config: BenchConfig) -> list[Row]:
    """A 768 x 768 Gaussian matrix to 1e-6."""
    x = jax.random.normal(jax.random.key(0), (768, 768))
    rows = []
    for name in BASES:
        basis = make_pair(BasisSpec.parse(name), jax.random.key(1), (768, 768))
        run = jax.jit(partial(kashin_decompose, rtol=1e-6, max_steps=200))
        result = run(x, basis)
        rows.append({
            "basis": name,
            "steps": int(result.num_steps),
            "residual": float(result.residual),
            "max_u": float(jnp.max(jnp.abs(result.u))),
            "seconds": median_seconds(partial(run, x, basis), config.repeats),
        })  # fmt: skip
    return rows


def _model(config: BenchConfig) -> list[Row]:
    """All 48 matrices of opt-wiki-18m to 1e-3, one after the other."""
    kernels = _kernels()
    rows = []
    for name in BASES:
        options = GreedyKashin(basis=BasisSpec.parse(name), rtol=1e-3)
        bases = {
            path: make_pair(
                options.basis,
                path_key(jax.random.key(0), path),
                (k.shape[0], k.shape[1]),
            )
            for path, k in kernels.items()
        }

        def run(options: GreedyKashin = options, bases: Any = bases) -> list[Any]:
            return [
                decompose_blocks(k, bases[path], options, (len(k), k.shape[1]))[2:]
                for path, k in kernels.items()
            ]

        results = run()
        rows.append({
            "basis": name,
            "converged": sum(bool(r[-1].all()) for r in results),
            "matrices": len(results),
            "most_steps": max(int(r[-2].max()) for r in results),
            "seconds": median_seconds(run, config.repeats),
        })  # fmt: skip
    return rows


def _starts(config: BenchConfig) -> list[Row]:
    """The 2-D codebook against restarts and sample, every fourth matrix, 4 bits."""
    kernels = dict(list(_kernels().items())[::4])
    rows = []
    for restarts, sample in ((4, 16384), (50, 8192), (50, 4096), (100, 2048)):
        options = GreedyKashin(num_restarts=restarts, sample=sample)
        errors = []
        start = time.perf_counter()
        for path, kernel in kernels.items():
            key = path_key(jax.random.key(0), path)
            _, report = quantize(kernel, options, key, path=path)
            errors.append(float(report.relative_squared_error))
        rows.append({
            "restarts": restarts,
            "sample": sample,
            "relative_squared_error": statistics.mean(errors),
            "seconds": time.perf_counter() - start,
        })  # fmt: skip
    return rows


def _memory(config: BenchConfig) -> list[Row]:
    """Bytes of every compiled stage in units of the float32 matrix."""
    rows = []
    for shape in ((768, 768), (384, 384), (384, 1536)):
        x = jax.random.normal(jax.random.key(0), shape)
        options, key = GreedyKashin(), jax.random.key(0)
        basis = make_pair(options.basis, key, shape)
        stages: dict[str, tuple[Any, tuple[Any, ...]]] = {
            "decompose": (
                partial(decompose_blocks, config=options, block_shape=shape),
                (x, basis),
            ),
            "restarts": (
                partial(_best_start, k=16, rtol=1e-3, max_steps=100),
                (jax.random.split(key, options.num_restarts), jnp.zeros((4096, 2))),
            ),
            "polish": (_polish, (x.reshape(-1), x.reshape(-1), jnp.zeros((16, 2)))),
            "assign": (
                assign_pairs, (x.reshape(-1), x.reshape(-1), jnp.zeros((16, 2)))
            ),
            "pack": (
                partial(pack_codes, bits=4), (jnp.zeros(x.size, jnp.uint8),)
            ),
        }  # fmt: skip
        for stage, (function, arguments) in stages.items():
            compiled = jax.jit(function).lower(*arguments).compile()
            used: Any = compiled.memory_analysis()
            total = (
                used.argument_size_in_bytes
                + used.output_size_in_bytes
                + used.temp_size_in_bytes
            )
            row = {
                "shape": str(shape),
                "stage": stage,
                "times_float32": total / x.nbytes,
            }
            rows.append(row)
    return rows


def _polish(u: Array, v: Array, start: Array) -> PairCodebook:
    return lloyd_pairs(u, v, start, rtol=1e-3, max_steps=20)


def _kernels() -> dict[str, Array]:
    return selected_kernels(load_opt(str(ASSETS / "opt-wiki-18m")).model)


PARTS: dict[str, Callable[[BenchConfig], list[Row]]] = {
    "decomposition": _decomposition,
    "model": _model,
    "starts": _starts,
    "memory": _memory,
}


def run(config: BenchConfig) -> int:
    """Runs the chosen parts; returns the exit code."""
    out = prepare_output(config.out)
    for name in config.only:
        part = PARTS[name]
        rows = part(config)
        columns = [Column(key, key, _shown(value)) for key, value in rows[0].items()]
        print(f"\n{part.__doc__}\n\n{aligned_table(rows, columns)}")
        fields = {"part": name, **environment_fields()}
        merge_records(out, "bench_core", [fields | row for row in rows])
    return 0


def _shown(value: Any) -> Callable[[Any], str]:
    if not isinstance(value, float):
        return str
    return (lambda x: f"{x:.1e}") if 0 < value < 1e-4 else fixed(4)


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_program("benchmarks.core", __doc__, BenchConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
