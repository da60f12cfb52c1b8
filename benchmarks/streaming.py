"""Time and memory of `kashin quantize` on checkpoints larger than a test can hold.

    python -m benchmarks.streaming
    python -m benchmarks.streaming --layout=4gb --method=rtn --bits=4
    python -m benchmarks.streaming --layout=opt-1.3b --method=kashin-joint --effort=fast
    python -m benchmarks.streaming --layout=llama-3.2-1b --method=kashin-joint
    python -m benchmarks.streaming --layout=matrix --method=kashin

Writes a checkpoint of random weights, quantizes it in a process of its own, loads the
result in another one where it is a whole model, and adds a record to
bench_streaming.jsonl in `--out`. Needs Linux, which tells the memory of a
process that no file backs, and as much free disk as the checkpoint and its result
take. With rtn a few minutes on two CPU cores; with joint coding about ten minutes per
10^9 weights.
"""

import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.layouts import LAYOUTS, Layout
from experiments.common.flags import check_flags, flag, run_program
from experiments.common.results import environment_fields, merge_records, prepare_output
from experiments.common.tables import Column, aligned_table, fixed
from kashin_jax.errors import UsageError
from kashin_jax.io import (
    PlannedTensor,
    TensorWriter,
    open_shard,
    plan_plain,
    plan_shards,
    record_file,
    shard_names,
    write_config,
    write_index,
)
from kashin_jax.methods import method_names
from kashin_jax.methods.joint.coder import EFFORTS
from kashin_jax.pipeline import inspect_checkpoint

__all__ = ["main", "write_checkpoint"]

# Seconds between two looks at the memory of `kashin`; large matrices take longer.
_INTERVAL = 0.005
_SLICE = 2**22  # weights
# What `kashin eval` does before its first window. All arrays are read, as all of them
# are needed; importing the library is apart.
_LOAD = """
import sys, time
import jax
from flax import nnx
from kashin_jax.pipeline import load_quantized
start = time.perf_counter()
loaded = load_quantized(sys.argv[1])
jax.block_until_ready(nnx.state(loaded.model))
print(time.perf_counter() - start)
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingConfig:
    """What is quantized, and how; meanings are in the flags."""

    layout: str = flag(
        "opt-1.3b", f"One of {', '.join(LAYOUTS)}.", (LAYOUTS.__contains__, "known")
    )
    method: str = flag(
        "rtn",
        f"One of {', '.join(method_names())}.",
        (method_names().__contains__, "known"),
    )
    bits: float = flag(4.0, "Code width.")
    effort: str = flag(
        "fast",
        "Effort of joint coding.",
        (EFFORTS.__contains__, f"one of {list(EFFORTS)}"),
    )
    work: str = flag("", "Directory for the checkpoints; a temporary one when empty.")
    out: str = flag("runs", "Directory of the results.", (bool, "given"))

    def __post_init__(self) -> None:
        check_flags(self)
        if not Path("/proc/self/status").exists():
            raise UsageError("The memory of a process is measured on Linux only.")

    def rules(self) -> dict[str, Any]:
        """The rules, as `kashin quantize --rules` reads them."""
        method = {"method": self.method, "bits": self.bits}
        joint = {"effort": self.effort} if self.method == "kashin-joint" else {}
        return {"config": method | joint}


def write_checkpoint(directory: Path, layout: Layout) -> None:
    """Random weights, slice by slice and the same every time."""
    directory.mkdir(parents=True)
    planned = [plan_plain(n, layout.dtype, s) for n, s in layout.tensors.items()]
    shards = plan_shards(planned, layout.shard_bytes)
    records = []
    for name, shard in zip(shard_names(len(shards)), shards, strict=True):
        with open_shard(directory / name, shard) as writer:
            for tensor in shard:
                _write_random(writer, tensor, seed=planned.index(tensor))
        records.append(record_file(directory / name))
    write_index(directory, records)
    write_config(directory, layout.config)


def _write_random(writer: TensorWriter, tensor: PlannedTensor, seed: int) -> None:
    (spec,) = tensor.specs.values()
    rng = np.random.default_rng(seed)
    left = math.prod(spec.shape)
    while left:
        count = min(left, _SLICE)
        values = rng.standard_normal(count, np.float32) * np.float32(0.02)
        writer.append(tensor.name, values.astype(spec.dtype).tobytes())
        left -= count


def measure(work: Path, layout: Layout, rules: dict[str, Any]) -> dict[str, Any]:
    """Writes a checkpoint below `work` and quantizes it; a record of what that took."""
    source, target, file = work / "source", work / "target", work / "rules.json"
    write_checkpoint(source, layout)
    file.write_text(json.dumps(rules), "utf-8")
    module = [sys.executable, "-m", "kashin_jax.cli", "quantize"]
    command = [*module, str(source), str(target), f"--rules={file}"]
    start = time.perf_counter()
    peak, _ = _watched(command)
    seconds = time.perf_counter() - start
    load = os.getloadavg()[0]
    before = inspect_checkpoint(source, verify=False)
    after = inspect_checkpoint(target, verify=False)
    packed = [t for t in after.tensors if t.relative_squared_error is not None]
    return {
        "weights": after.weights,
        "quantized_weights": after.packed_weights,
        "largest_quantized_float32": 4 * max(math.prod(t.shape) for t in packed),
        "largest_copied": max(
            (2 * math.prod(t.shape) for t in after.tensors if t not in packed),
            default=0,
        ),
        "source_bytes": before.disk_bytes,
        "result_bytes": after.disk_bytes,
        "bits_per_weight": after.bits_per_weight,
        "model_bits_per_weight": after.model_bits_per_weight,
        "minutes": seconds / 60,
        "peak_bytes": peak,
        "load": load,
    } | (_loading(target) if layout.runs else {})


def _loading(target: Path) -> dict[str, Any]:
    """Seconds until a quantized model is in memory, and what that takes."""
    peak, output = _watched([sys.executable, "-c", _LOAD, str(target)])
    return {"load_seconds": float(output), "load_peak_bytes": peak}


def _watched(command: list[str]) -> tuple[int, str]:
    """Runs a program; the most anonymous memory seen, in bytes, and what it printed.

    What the kernel may drop at any time, mapped files, is not counted.
    """
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        while child.poll() is None:
            peak = max(peak, _anonymous_bytes(child.pid))
            time.sleep(_INTERVAL)
        output = "" if child.stdout is None else child.stdout.read()
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    return peak, output


def _anonymous_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text().split()
    # A process that has just ended has no memory to speak of.
    found = "RssAnon:" in status
    return 1024 * int(status[status.index("RssAnon:") + 1]) if found else 0


@contextlib.contextmanager
def _work(directory: str) -> Iterator[Path]:
    parent = prepare_output(directory) if directory else None
    with tempfile.TemporaryDirectory(prefix="streaming-", dir=parent) as work:
        yield Path(work)


def run(config: StreamingConfig) -> int:
    """Measures a layout beside a single small matrix; returns the exit code."""
    out, layout = prepare_output(config.out), LAYOUTS[config.layout]
    with _work(config.work) as work:
        bare = measure(work / "bare", LAYOUTS["bare"], config.rules())
        found = measure(work / "full", layout, config.rules())
    above = found["peak_bytes"] - bare["peak_bytes"]
    record = {
        "layout": config.layout, **config.rules()["config"], **found,
        "bare_peak_bytes": bare["peak_bytes"],
        "peak_bytes_above_bare": above,
        "times_largest": above / found["largest_quantized_float32"],
    }  # fmt: skip
    rows = [{"what": key, "value": value} for key, value in record.items()]
    columns = [Column("what", "", str), Column("value", "", _shown)]
    print(aligned_table(rows, columns))
    merge_records(out, "bench_streaming", [record | environment_fields()])
    return 0


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return fixed(3)(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_program("benchmarks.streaming", __doc__, StreamingConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
