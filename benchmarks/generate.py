"""Tokens per second of language models, dense and packed, by the CPU kernel and by XLA.

    python -m benchmarks.generate
    python -m benchmarks.generate --models=llama-3.2-1b --bits=4 --batch=1 --ways=kernel

Random weights of the embedded OPT's shape, of OPT-1.3B's and of Llama-3.2-1B's continue
a prompt. Every model is in a process of its own (`benchmarks.generator`), and processes
take turns, a few packed ones at a time beside dense float32, which ratios are to.
Weights are random, since times do not depend on them. Heads are tied to embeddings: the
ways `kernel` and `xla` (`KASHIN_JAX_KERNELS=off`) leave both dense, in float32; `head`
packs them, too. Memory is that of arrays, and all of the process that no file
backs; the share of bandwidth is the bytes of weights that every token reads, over its
time, to what the machine reads.

Prints a table and adds records to bench_generate.jsonl in `--out` after every batch;
what is recorded there with its memory is left out.
"""

import contextlib
import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.alternating import time_in_turn
from benchmarks.generator import MODELS, Job
from experiments.common.flags import (
    check_flags,
    chosen_names,
    flag,
    parse_numbers,
    parse_widths,
    run_program,
)
from experiments.common.result_files import RESULT_FILES
from experiments.common.results import (
    environment_fields,
    merge_records,
    prepare_output,
    read_jsonl,
    record_key,
)
from experiments.common.tables import Column, aligned_table, fixed, share
from kashin_jax.tensors.kernels.library import VARIABLE

__all__ = ["main"]

ARTIFACT = "bench_generate"
WAYS = {"kernel": "by kernel", "head": "by kernel, head too", "xla": "by XLA"}
_WIDTHS = ("2", "2.5", "3", "3.5", "4", "4.5", "5")
# Packed models at a time: with the dense ones in 16 GB.
_TOGETHER = 4
_STREAMED = (2**13, 2**14)  # 512 MiB as float32, more than caches hold


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Which models generate, and how often."""

    models: tuple[str, ...] = flag(("all",), f"all, or some of {', '.join(MODELS)}.")
    bits: tuple[str, ...] = flag(_WIDTHS, "Code widths.")
    batch: tuple[str, ...] = flag(("1", "8"), "Prompts that are continued at a time.")
    ways: tuple[str, ...] = flag(("all",), f"all, or some of {', '.join(WAYS)}.")
    prompt: int = flag(16, "Tokens of a prompt.", (lambda x: x >= 1, "at least 1"))
    tokens: int = flag(64, "New tokens.", (lambda x: x >= 1, "at least 1"))
    rounds: int = flag(2, "Rounds of all.", (lambda x: x >= 1, "at least 1"))
    out: str = flag("runs", "Directory of the results.", (bool, "given"))

    def __post_init__(self) -> None:
        check_flags(self)


def run(config: GenerateConfig) -> int:
    """Times all that has no record yet; returns the exit code."""
    out = prepare_output(config.out)
    batches = parse_numbers("batch", config.batch, 1, 2**10)
    widths = parse_widths("bits", config.bits, 2, 5)
    ways = chosen_names("ways", config.ways, WAYS)
    bandwidth = _bandwidth()
    for model in chosen_names("models", config.models, MODELS):
        jobs = _jobs(model, widths, ways, config)
        names = [name for name in jobs if name not in ("float32", "bfloat16")]
        first, later = names[:_TOGETHER], range(_TOGETHER, len(names), _TOGETHER)
        _measure(jobs, ["bfloat16", *first], batches, bandwidth, config)
        for i in later:
            _measure(jobs, names[i : i + _TOGETHER], batches, bandwidth, config)
    shown = [r for r in read_jsonl(out / f"{ARTIFACT}.jsonl") if _is_complete(r)]
    print(aligned_table(shown, COLUMNS))
    return 0


def _measure(
    jobs: dict[str, Job],
    names: list[str],
    batches: list[int],
    bandwidth: float,
    config: GenerateConfig,
) -> None:
    """Records what is missing of some jobs, in turn with float32."""
    out, model = prepare_output(config.out), jobs["float32"].model
    missing = {b: _missing(out, model, ["float32", *names], b) for b in batches}
    wanted = {name for each in missing.values() for name in each}
    if not wanted:
        return
    kept = {n: job for n, job in jobs.items() if n in wanted | {"float32"}}
    with _processes(kept) as own:
        for batch, absent in missing.items():
            among = {n: own[n] for n in own if n in {"float32", *absent}}
            if absent:
                found = _timed(among, batch, config, bandwidth)
                keys = {"model": model, "batch": batch}
                rows = [keys | row for row in found if row["weights"] in absent]
                merge_records(out, ARTIFACT, rows)


def _jobs(
    model: str, widths: list[float], ways: Sequence[str], config: GenerateConfig
) -> dict[str, Job]:
    """What there is to measure, by the name of the weights."""
    make = partial(Job, model=model, prompt=config.prompt, tokens=config.tokens)
    jobs = {name: make(dtype=name) for name in ("float32", "bfloat16")}
    for way in ways:
        for bits in widths:
            name = f"{bits:g} bits {WAYS[way]}"
            jobs[name] = make(bits=bits, packs_head=way == "head")
    return jobs


def _is_complete(record: Mapping[str, Any]) -> bool:
    return "resident_megabytes" in record


def _missing(out: Path, model: str, names: list[str], batch: int) -> list[str]:
    fields = RESULT_FILES[ARTIFACT].key
    records = read_jsonl(out / f"{ARTIFACT}.jsonl")
    known = {record_key(r, fields) for r in records if _is_complete(r)}
    own = {"model": model, "batch": batch, **environment_fields()}
    return [n for n in names if record_key(own | {"weights": n}, fields) not in known]


class _Process:
    """A model that generates when asked."""

    def __init__(self, name: str, job: Job):
        off = {VARIABLE: "off"} if name.endswith(WAYS["xla"]) else {}
        command = [sys.executable, "-m", "benchmarks.generator"]
        self.child = subprocess.Popen(
            [*command, json.dumps(dataclasses.asdict(job))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **off},
        )  # fmt: skip

    def line(self) -> dict[str, Any]:
        """What the process says next."""
        assert self.child.stdout is not None, "it is a pipe"
        text = self.child.stdout.readline()
        if not text:
            raise subprocess.CalledProcessError(self.child.wait(), self.child.args)
        answer: dict[str, Any] = json.loads(text)
        return answer

    def generate(self, batch: int) -> dict[str, Any]:
        """Seconds of a batch, and the memory of the process after it."""
        assert self.child.stdin is not None, "it is a pipe"
        self.child.stdin.write(f"{batch}\n")
        self.child.stdin.flush()
        return self.line()


@contextlib.contextmanager
def _processes(
    jobs: dict[str, Job],
) -> Iterator[dict[str, tuple[_Process, dict[str, Any]]]]:
    """Processes by name, and what each said of its model; ended at last."""
    own: dict[str, tuple[_Process, dict[str, Any]]] = {}
    try:
        for name, job in jobs.items():
            process = _Process(name, job)
            own[name] = process, {}
            own[name] = process, process.line()
        yield own
    finally:
        for process, _ in own.values():
            process.child.kill()
            process.child.communicate()


def _timed(
    own: dict[str, tuple[_Process, dict[str, Any]]],
    batch: int,
    config: GenerateConfig,
    bandwidth: float,
) -> list[dict[str, Any]]:
    """A record for every process; they take turns, in every round in another order."""
    answers = {name: process.generate(batch) for name, (process, _) in own.items()}
    times: dict[str, list[float]] = {name: [] for name in own}
    for number in range(config.rounds):
        for name in random.Random(number).sample(list(own), len(own)):
            answers[name] = own[name][0].generate(batch)
            times[name].append(answers[name]["seconds"])
    load, tokens = os.getloadavg()[0], batch * config.tokens
    dense, records = times["float32"], []
    for name, seconds in times.items():
        said, best = own[name][1], min(seconds)
        median = statistics.median(seconds)
        reads = said["read_megabytes"] * 1e6 * config.tokens
        records.append({
            "weights": name,
            "tokens_per_second": tokens / best,
            "median_tokens_per_second": tokens / median,
            "times_float32": min(dense) / best,
            "median_times_float32": statistics.median(dense) / median,
            "megabytes": said["megabytes"],
            "resident_megabytes": answers[name]["resident_megabytes"],
            "bare_megabytes": said["bare_megabytes"],
            "bandwidth_share": reads / best / bandwidth,
            "bytes_per_second": bandwidth,
            "load": load,
            "instruction_set": answers[name]["instruction_set"],
        } | environment_fields())  # fmt: skip
    return records


def _bandwidth() -> float:
    """Bytes per second that this machine reads or copies, at best."""
    a = jnp.ones(_STREAMED, jnp.float32)
    x = jnp.ones((1, len(a)), jnp.float32)
    programs = {
        "read": partial(jax.jit(jnp.matmul), x, a),
        "copied": partial(jax.jit(lambda a: a + 1), a),
    }
    times, _ = time_in_turn(programs, 5, 0.0)
    return max(a.nbytes / times["read"].best, 2 * a.nbytes / times["copied"].best)


COLUMNS = (
    Column("model", "model"),
    Column("batch", "batch"),
    Column("weights", "weights"),
    Column("tokens_per_second", "tokens/s", fixed(1)),
    Column("times_float32", "times float32", fixed(2)),
    Column("median_times_float32", "of medians", fixed(2)),
    Column("megabytes", "MB of arrays", fixed(0)),
    Column("resident_megabytes", "MB resident", fixed(0)),
    Column("bandwidth_share", "of bandwidth", share),
    Column("load", "load", fixed(1)),
)


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_program("benchmarks.generate", __doc__, GenerateConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
