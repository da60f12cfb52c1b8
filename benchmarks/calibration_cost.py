"""What calibrating a layer takes, and what a model on GPUs would: times and memory.

    python -m benchmarks.calibration_cost
    python -m benchmarks.calibration_cost --inputs=1024,2048,4096,8192 --outputs=256

Measures square matrices unless `--outputs` is given: second moments of 1,024 tokens,
their sum on the host, factors, coding at 2 bits and effort `fast` with feedback and
without, in seconds of CPU time (those of other programs do not count), compilation
excluded; and the most memory that a layer's coding took above what the process had, its
two halves of second moments included.

Then estimates, which no GPU has run: the arithmetic of Llama 2 7B and 70B, divided by
what a GPU is assumed to sustain (`ASSUMED`). Writes `bench_calibration.jsonl` to
`--out`. About ten minutes on a CPU core.
"""

import dataclasses
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.flags import (
    COUNT,
    GIVEN,
    check_flags,
    flag,
    parse_numbers,
    run_program,
)
from experiments.common.results import environment_fields, merge_records, prepare_output
from experiments.common.tables import Column, aligned_table, fixed
from kashin_jax import JointKashin
from kashin_jax.methods import quantize_stack
from kashin_jax.methods.feedback import damped_in_place, triangular_factors
from kashin_jax.methods.joint.coder import EFFORTS
from kashin_jax.pipeline.moments import MeanMoments, Moments, half_moments

__all__ = ["ASSUMED", "MODELS", "estimate", "main"]

TOKENS = 1024
CONFIG = JointKashin(bits=2, effort="fast").for_feedback()
_MOST = 2**16
_DAMPINGS = 2


class Model(NamedTuple):
    """A decoder's blocks.

    Attributes:
      blocks: How many.
      width: Of hidden states.
      ffn: Of the feed-forward layer.
      kv: Outputs of its keys, and of its values.
    """

    blocks: int
    width: int
    ffn: int
    kv: int

    def layers(self) -> list[tuple[int, int]]:
        """Inputs and outputs of a block's matrices."""
        square = (self.width, self.width)
        key = (self.width, self.kv)
        up = (self.width, self.ffn)
        return [square, key, key, square, up, up, up[::-1]]


MODELS: Mapping[str, Model] = MappingProxyType({
    "llama-2-7b": Model(32, 4096, 11008, 4096),
    "llama-2-70b": Model(80, 8192, 28672, 1024),
})  # fmt: skip

ASSUMED: Mapping[str, float] = MappingProxyType({
    "tokens": 131072,
    # Of float32 products on a GPU whose data sheet says 67e12.
    "flops": 30e12,
    # A step of the search is a few kernels, however few weights there are; and
    # of many weights, what bench_joint.jsonl has of an H100: 385e6 in 50 steps.
    "step_seconds": 30e-6,
    "weight_steps": 385e6 * 50,
    # Passes through a block: one for each of four inputs, and one for its outputs.
    "passes": 5,
    # Float32 halves of moments that the host adds to float64 sums: what one core did.
    "host_bytes": 5e9,
    "batch": 8192,
})  # fmt: skip
"""What the estimates assume, in tokens, seconds, bytes and operations each second."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostConfig:
    """What is measured; meanings are in the flags."""

    inputs: tuple[str, ...] = flag(
        ("1024", "2048", "4096"), "Inputs of the layers, as a list.", GIVEN
    )
    outputs: int = flag(0, "Outputs of each of them; 0 takes as many as inputs.", COUNT)
    out: str = flag("runs", "Directory of the results.", GIVEN)

    def __post_init__(self) -> None:
        check_flags(self)
        parse_numbers("inputs", self.inputs, 256, _MOST)


def estimate(model: Model, effort: str, devices: int) -> dict[str, float]:
    """Seconds of calibrating a model on GPUs, by phase; an estimate.

    Statistics are shared by all GPUs; coding and the sums on the host are not.

    Args:
      model: Its shapes.
      effort: Of joint coding.
      devices: GPUs.
    """
    a, layers = ASSUMED, model.layers()
    weights = sum(m * n for m, n in layers)
    # q, k and v read one input, gate and up another.
    read = [model.width, model.width, model.width, model.ffn]
    squares = sum(m * m for m in read)
    rounds = -(-a["tokens"] // a["batch"] // devices) * devices * a["batch"]
    passes = a["passes"] * 2 * weights * rounds
    products = 9 / 8 * squares * rounds
    steps = EFFORTS[effort]
    search = sum(
        m / 16 * steps * max(a["step_seconds"], 16 * n / a["weight_steps"])
        for m, n in layers
    )
    factors = sum(m**3 / 3 + 2 * m * m * n for m, n in layers)
    host = 2 * squares * a["tokens"] / a["batch"] / a["host_bytes"]
    once = weights * steps / a["weight_steps"]
    per_block = {
        "statistics_seconds": (passes + products) / a["flops"] / devices + host,
        "feedback_seconds": _DAMPINGS * factors / a["flops"],
        "search_seconds": _DAMPINGS * search + once,
    }
    found = {name: model.blocks * seconds for name, seconds in per_block.items()}
    return found | {"hours": sum(found.values()) / 3600}


class _Layer(NamedTuple):
    # A random matrix, what it reads, and its code without data.
    weight: jax.Array
    x: jax.Array
    half: jax.Array
    total: Moments
    mean: MeanMoments
    free: Any

    @classmethod
    def random(cls, inputs: int, outputs: int) -> "_Layer":
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.standard_normal((TOKENS, inputs)), jnp.float32)
        weight = jnp.asarray(rng.standard_normal((inputs, outputs)), jnp.float32)
        half, total = half_moments(x), Moments.none(inputs)
        mean = total.plus(half, TOKENS).mean()
        return cls(weight, x, half, total, mean, _without(weight))

    def damped(self) -> jax.Array:
        return damped_in_place(self.mean.whole(), 0.01)

    def fed(self, moments: jax.Array) -> Any:
        return CONFIG.with_feedback(self.weight, self.free, moments)


def _without(weight: jax.Array) -> Any:
    return quantize_stack(weight, CONFIG, jax.random.key(0), path="layer")[0]


def measure(inputs: int, outputs: int) -> list[dict[str, Any]]:
    """Records of one layer: a time for every phase, and the memory of coding it."""
    layer = _Layer.random(inputs, outputs)
    shape = {"inputs": inputs, "outputs": outputs}
    records = [shape | record for record in _times(layer)]
    above = _peak_bytes(lambda: _whole_coding(layer))
    memory = {
        "part": "memory", "peak_bytes": above,
        "times_moments": above / (4 * inputs**2),
        "times_weights": above / (4 * inputs * outputs),
    }  # fmt: skip
    return [*records, shape | memory]


def _times(layer: _Layer) -> list[dict[str, Any]]:
    """Of every phase, and what it computes, the search left out."""
    m, n = layer.weight.shape
    moments = jax.block_until_ready(layer.damped())
    size = layer.fed(moments).layout.block_shape[0]
    programs: dict[str, tuple[Callable[[], Any], float]] = {
        "moments": (lambda: half_moments(layer.x), 9 / 8 * TOKENS * m * m),
        "host sum": (lambda: layer.total.plus(layer.half, TOKENS), 0.0),
        "factors": (
            lambda: triangular_factors(moments, size, last_first=True), m**3 / 3
        ),
        "coding": (lambda: layer.fed(moments), m**3 / 3 + 2.0 * m * m * n),
        "coding without": (lambda: _without(layer.weight), 0.0),
    }  # fmt: skip
    records = []
    for part, (program, operations) in programs.items():
        seconds = _cpu_seconds(program)
        rate = operations / seconds if operations else None
        records.append({
            "part": part, "cpu_seconds": seconds, "operations": operations,
            "operations_per_second": rate,
        })  # fmt: skip
    return records


def _whole_coding(layer: _Layer) -> Any:
    """With halves of its own, as a layer in work has two of them."""
    held = layer.mean.half + 0, layer.mean.half + 0
    return jax.block_until_ready(layer.fed(layer.damped())), held


def _cpu_seconds(program: Callable[[], Any]) -> float:
    """Of one call, all threads together; the better of two after one that compiles."""
    jax.block_until_ready(program())
    times = []
    for _ in range(2):
        start = time.process_time()
        jax.block_until_ready(program())
        times.append(time.process_time() - start)
    return min(times)


def _peak_bytes(program: Callable[[], Any]) -> int:
    """The most memory, above what there was, that no file backs."""
    start, peak, done = _anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        program()
    finally:
        done.set()
        watcher.join()
    return peak - start


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text().split()
    return 1024 * int(status[status.index("RssAnon:") + 1])


def run(config: CostConfig) -> int:
    """Measures, estimates, prints and writes."""
    out, load = prepare_output(config.out), os.getloadavg()[0]
    records: list[dict[str, Any]] = []
    for inputs in map(int, parse_numbers("inputs", config.inputs, 256, _MOST)):
        records += measure(inputs, config.outputs or inputs)
    columns = (
        Column("part", "part"), Column("inputs", "inputs"),
        Column("outputs", "outputs"),
        Column("cpu_seconds", "CPU s", fixed(3)),
        Column("times_moments", "times H", fixed(2)),
    )  # fmt: skip
    print(aligned_table(records, columns))
    estimates: list[dict[str, Any]] = [
        {"part": "estimate", "model": name, "effort": effort, "devices": devices,
         **estimate(model, effort, devices), "assumed": dict(ASSUMED)}
        for name, model in MODELS.items()
        for effort in ("fast", "default")
        for devices in (1, 8)
    ]  # fmt: skip
    names = ("model", "effort", "devices")
    phases = [name for name in estimates[0] if name.endswith("_seconds")]
    shown = [Column(name, name) for name in names]
    shown += [Column(name, name, fixed(0)) for name in phases]
    shown.append(Column("hours", "hours", fixed(2)))
    print(aligned_table(estimates, shown))
    fields = environment_fields() | {"load": load}
    merge_records(out, "bench_calibration", [r | fields for r in records + estimates])
    return 0


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_program(
        "benchmarks.calibration_cost", __doc__, CostConfig, run, arguments
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
