"""Error of the joint search against its length, with and without repulsion.

    python -m benchmarks.joint

Mean squared error on a unit Gaussian source, 262,144 weights in blocks of 64 x 64, the
levels refitted to all of them; weights per second of one call, compilation excluded.
Writes `results/benchmarks/joint.jsonl`. A minute or two on two CPU cores.
"""

import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments.results import environment_fields, write_jsonl
from experiments.tables import Column, aligned_table, fixed
from kashin_jax import BasisSpec, make_pair
from kashin_jax.coding.anneal import SCHEDULES, Schedule, anneal

OUT = Path(__file__).resolve().parents[1] / "results" / "benchmarks" / "joint.jsonl"
SIDE, COUNT = 64, 64
STEPS = (10, 25, 50, 100, 200, 400, 1600)
# Without repulsion two lengths show enough.
_LENGTHS = {True: STEPS, False: (50, 200)}


def measure(bits: tuple[int, int], steps: int, schedule: Schedule) -> dict[str, float]:
    """Error and speed of one search."""
    basis = make_pair(BasisSpec.parse("hadamard"), jax.random.key(5), (SIDE, SIDE))
    x = jax.random.normal(jax.random.key(1), (COUNT, SIDE, SIDE))

    def run() -> jax.Array:
        words = anneal(x, basis, bits=bits, steps=steps, schedule=schedule)
        v = basis.synthesis(words.levels_v[words.v])
        return jnp.mean(jnp.square(x - words.levels_u[words.u] - v))

    run().block_until_ready()
    start = time.perf_counter()
    error = float(run())
    return {
        "mse": error,
        "weights_per_second": x.size / (time.perf_counter() - start),
    }


def main() -> None:
    """Measures, prints and writes the curve."""
    records = []
    for bits, schedule in SCHEDULES.items():
        for repels in (True, False):
            used = schedule
            if not repels:
                used = dataclasses.replace(schedule, repulsion=(0.0, 0.0))
            for steps in _LENGTHS[repels]:
                found = measure(bits, steps, used)
                records.append({
                    "bits": sum(bits), "steps": steps, "repulsion": repels, **found,
                    **environment_fields(),
                })  # fmt: skip
    columns = (
        Column("bits", "bits"),
        Column("repulsion", "repulsion"),
        Column("steps", "steps"),
        Column("mse", "mse", fixed(5)),
        Column("weights_per_second", "weights/s", fixed(0)),
    )
    print(aligned_table(records, columns))
    write_jsonl(OUT, records)


if __name__ == "__main__":
    main()
