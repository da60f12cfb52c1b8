"""Error, speed and memory of the joint search against its length and width.

    python -m benchmarks.joint
    python -m benchmarks.joint --steps=50,200

Mean squared error on a unit Gaussian source, 1,048,576 weights (on an accelerator
16,777,216) in blocks of 64 x 64, the levels refitted to all of them; weights per second
of one call, compilation excluded; memory that the coder of a 1024 x 1024 matrix takes
beside it, as the compiler reports it. With and without repulsion. Writes
`bench_joint.jsonl` and `bench_joint.png` to `--out`. About ten minutes on two CPU
cores, two on a GPU.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from tqdm import tqdm

from experiments.common.flags import (
    GIVEN,
    check_flags,
    flag,
    parse_numbers,
    run_program,
)
from experiments.common.plots import COLOURS, new_figure, save_picture
from experiments.common.results import environment_fields, merge_records, prepare_output
from experiments.common.tables import Column, Record, aligned_table, fixed
from kashin_jax import BasisSpec, JointKashin, make_pair
from kashin_jax.methods.joint.anneal import anneal
from kashin_jax.methods.joint.coder import EFFORTS, joint_code
from kashin_jax.methods.joint.schedules import SPLITS, Split, schedule_for
from kashin_jax.methods.joint.words import decode_words

SIDE = 64
# Without repulsion two lengths show enough.
_PLAIN_STEPS = (50, 200)
_LONGEST_HALF = 400
_MOST_STEPS = 10**5


@dataclasses.dataclass(frozen=True, kw_only=True)
class JointBenchConfig:
    """What is measured; meanings are in the flags."""

    steps: tuple[str, ...] = flag(
        ("10", "25", "50", "100", "200", "400", "1600"),
        "Steps of the search, as a list.",
        GIVEN,
    )
    out: str = flag("runs", "Directory of the results.", GIVEN)

    def __post_init__(self) -> None:
        check_flags(self)
        parse_numbers("steps", self.steps, 1, _MOST_STEPS)


def measure(
    x: Float[Array, "k m n"], split: Split, steps: int, *, repels: bool
) -> dict[str, float]:
    """Error and speed of one search."""
    basis = make_pair(BasisSpec.parse("hadamard"), jax.random.key(5), (SIDE, SIDE))
    schedule = schedule_for(split, steps)
    if not repels:
        none = (0.0,) * len(schedule.repulsion)
        schedule = dataclasses.replace(schedule, repulsion=none)

    def run() -> Any:
        return anneal(x, basis, split=split, steps=steps, schedule=schedule)

    jax.block_until_ready(run())
    start = time.perf_counter()
    words = jax.block_until_ready(run())
    seconds = time.perf_counter() - start
    error = jnp.mean(jnp.square(x - decode_words(words, basis)))
    return {"mse": float(error), "weights_per_second": x.size / seconds}


def memory(bits: float) -> float:
    """Bytes beside a 1024 x 1024 matrix that coding it takes, over its own."""
    pair = make_pair(BasisSpec.parse("hadamard"), jax.random.key(0), (SIDE, SIDE))
    weight = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    config = JointKashin(bits=bits, effort="fast")
    code = joint_code.lower(weight, pair, pair, config, (SIDE, SIDE))
    used: Any = code.compile().memory_analysis()
    return (used.temp_size_in_bytes + used.output_size_in_bytes) / (4 * 1024**2)


def plot(records: Sequence[Record], path: Path) -> None:
    """Draws error over Shannon's bound against steps, one line for each width."""
    figure = new_figure(6.4, 4.0)
    axes = figure.subplots()
    for colour, bits in zip(COLOURS, SPLITS, strict=False):
        ours = [r for r in records if r["bits"] == bits and r["repulsion"]]
        axes.plot(
            [r["steps"] for r in ours], [r["mse"] * 4**bits for r in ours],
            marker="o", lw=1, color=colour, label=f"{bits:g} bits",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("steps of the search")
    axes.set_ylabel("mean squared error over Shannon's bound")
    for name, steps in EFFORTS.items():
        axes.axvline(steps, color="#BBBBBB", lw=0.8, zorder=0)
        axes.text(steps, axes.get_ylim()[1], f" {name}", fontsize=7, va="top")
    axes.grid(color="#E5E5E5", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    save_picture(figure, path, bbox_inches=None)


def run(config: JointBenchConfig) -> int:
    """Measures, prints, draws and writes the curve."""
    out = prepare_output(config.out)
    count = 256 if jax.default_backend() == "cpu" else 4096
    x = jax.random.normal(jax.random.key(1), (count, SIDE, SIDE))
    lengths = parse_numbers("steps", config.steps, 1, _MOST_STEPS)
    jobs = [
        (split, steps, repels)
        for split in SPLITS.values()
        for repels in (True, False)
        for steps in lengths
        if repels or steps in _PLAIN_STEPS
        if not (split.half and steps > _LONGEST_HALF)
    ]
    records = []
    for split, steps, repels in tqdm(jobs, unit="search", disable=None):
        found = measure(x, split, steps, repels=repels)
        records.append({
            "bits": split.bits, "steps": steps, "repulsion": repels, **found,
            "over_shannon": found["mse"] * 4**split.bits, "weights": x.size,
            **environment_fields(),
        })  # fmt: skip
    columns = (
        Column("bits", "bits"),
        Column("repulsion", "repulsion"),
        Column("steps", "steps"),
        Column("mse", "mse", fixed(5)),
        Column("over_shannon", "mse / Shannon", fixed(3)),
        Column("weights_per_second", "weights/s", fixed(0)),
    )
    print(aligned_table(records, columns))
    for bits in SPLITS:
        used = memory(bits)
        records.append({"bits": bits, "memory": used, **environment_fields()})
        print(f"{bits:g} bits: memory {used:.2f} times the float32 matrix")
    merge_records(out, "bench_joint", records)
    curve = [record for record in records if "mse" in record]
    plot(curve, out / "bench_joint.png")
    return 0


if __name__ == "__main__":
    sys.exit(run_program("joint", __doc__, JointBenchConfig, run, sys.argv[1:]))
