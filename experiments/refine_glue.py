"""What refinement with fixed codes gives back of the accuracy that quantization takes.

    python -m experiments.refine_glue --task=mrpc --data_dir=GLUE --bits=2,3,4

Quantizes the classifier of a task by each method and width, scores it, trains its
centroids, levels, scales, biases and norms on the task's training set with the codes
fixed (as `experiments.finetune_glue --quantized=`), and scores it again: same stored
bits before and after. Adds its records to refine_glue.jsonl in `--out`, and
writes refine_glue.md and refine_glue.png; interrupted runs go on where they stopped.

Exit code 0: done; 1: a file or its content is unusable; 2: wrong flag; 3: stopped by a
signal, the same command goes on; 130: Ctrl-C.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.classification.checkpoints import load_task_bench
from experiments.classification.data import load_examples
from experiments.classification.plot import plot_refinement
from experiments.classification.rows import (
    GlueBench,
    quantized_records,
    saved_name,
    unchanged_records,
)
from experiments.classification.tasks import GLUE_TASKS, TASKS, Task
from experiments.common.flags import (
    COUNT,
    GIVEN,
    POSITIVE,
    POSITIVE_COUNT,
    check_flags,
    command_line,
    flag,
    parse_bases,
    parse_numbers,
    run_program,
    short_model_name,
)
from experiments.common.methods import METHODS, choose_methods, table_grid
from experiments.common.results import (
    environment_fields,
    prepare_output,
    remove_work,
    start_work,
    write_results,
)
from experiments.common.tables import Column, Record, aligned_table, fixed, increase
from experiments.common.text import ASSETS
from experiments.finetuning.config import FinetuneConfig
from experiments.finetuning.run import FinetuneResult, finetune

__all__ = ["RefineConfig", "main", "run", "table"]

_TOKENS_PER_BATCH = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefineConfig:
    """A table; meanings are in the flags.

    Raises:
      UsageError: If a value cannot work; the message names the flag.
    """

    task: str = flag(
        "", f"One of {', '.join(GLUE_TASKS)}.", (GLUE_TASKS.__contains__, "a GLUE task")
    )
    bits: tuple[str, ...] = flag(("2", "3", "4"), "Code widths, as a list.", GIVEN)
    methods: tuple[str, ...] = flag(
        ("kashin", "rotate-k-means"), f"A list of {', '.join(METHODS)}.", GIVEN
    )
    model: str = flag(
        str(ASSETS / "minilm-glue"), "Classifier: directory or hub id.", GIVEN
    )
    data_dir: str = flag(
        "", "Folder with RTE/train.tsv and so on; the rest is downloaded from the hub."
    )
    basis: str = flag("hadamard", "Family of the bases.", GIVEN)
    max_length: int = flag(128, "Tokens of an example.", POSITIVE_COUNT)
    epochs: float = flag(1.0, "Passes over the training set.", POSITIVE)
    batch_size: int = flag(32, "Examples per optimizer step.", POSITIVE_COUNT)
    learning_rate: float = flag(
        1e-3, "Peak rate, for leaves of unit root-mean-square.", POSITIVE
    )
    seed: int = flag(0, "Seed of bases, codebooks, dropout and order.", COUNT)
    out: str = flag("runs", "Directory of the results.", GIVEN)

    def __post_init__(self) -> None:
        check_flags(self)
        parse_numbers("bits", self.bits, 1, 8)
        choose_methods(self.methods)
        parse_bases((self.basis,))

    @property
    def glue_task(self) -> Task:
        """The task that is scored."""
        return TASKS[self.task]


def run(config: RefineConfig) -> int:
    """Makes, prints and writes the table; returns the exit code.

    Raises:
      UsageError: If a flag does not fit the model or the output cannot be written.
      CheckpointError: If the model cannot be used.
      DataError: If the task's files cannot be used.
    """
    out = prepare_output(config.out)
    work = start_work(out, config)
    with jax.default_matmul_precision("highest"):
        bench = _bench(config, work)
        records = _before(config, bench)
    for record in records[1:]:
        result = finetune(_finetune_config(config, work, record))
        if result.metrics is None:
            return 3
        record |= _after(config, result)
    _present(config, records, out)
    remove_work(work)
    return 0


def _bench(config: RefineConfig, work: Path) -> GlueBench:
    data_dir = Path(config.data_dir) if config.data_dir else None
    # Whether there is anything to learn from is known before hours of work.
    load_examples(config.glue_task, "train", data_dir)
    task = load_task_bench(
        config.glue_task, config.model, labels=(),
        data_dir=data_dir, max_length=config.max_length,
        tokens_per_batch=_TOKENS_PER_BATCH,
    )  # fmt: skip
    identity = {
        "model": short_model_name(config.model),
        "max_length": config.max_length,
        **environment_fields(),
    }
    return GlueBench(tasks=(task,), work=work, identity=identity, save=work / "save")


def _before(config: RefineConfig, bench: GlueBench) -> list[dict[str, Any]]:
    """A record per row, with the metrics of the quantized model."""
    rows = [unchanged_records(bench)]
    grid = table_grid(
        parse_numbers("bits", config.bits, 1, 8),
        choose_methods(config.methods),
        parse_bases((config.basis,)),
        (config.seed,),
    )
    rows += [
        quantized_records(
            bench, one.name, one.method, bits=one.bits, basis=one.basis, seed=one.seed,
            rtol=1e-6, max_steps=6000,
        )
        for one in grid
    ]  # fmt: skip
    records = []
    for row in rows:
        kept = {key: row[0][key] for key in _KEPT}
        # A method that does not exist at this width has no values.
        if metrics := {f"before_{r['metric']}": r["value"] for r in row if r["task"]}:
            records.append(kept | metrics)
    return records


_KEPT = (
    "method", "bits", "stored_bits_per_weight", "task", "seed", "basis", "examples",
    "model", "weights_sha256", "data_sha256", "max_length", "note",
    "kashin_jax_version", "jax_version", "device",
)  # fmt: skip


def _finetune_config(
    config: RefineConfig, work: Path, record: Record
) -> FinetuneConfig:
    name = saved_name(config.glue_task, record)
    return FinetuneConfig(
        task=config.task,
        quantized=str(work / "save" / name),
        data_dir=config.data_dir,
        max_length=config.max_length,
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        seed=config.seed,
        checkpoint_every=50,
        out=str(work / "runs" / name),
    )


def _after(config: RefineConfig, result: FinetuneResult) -> dict[str, Any]:
    metrics = result.metrics or {}
    fields = {f"after_{name}": value for name, value in metrics.items()}
    return {
        **fields,
        "steps": result.steps,
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
    }


def _present(config: RefineConfig, records: list[dict[str, Any]], out: Path) -> None:
    task = config.glue_task
    rows, columns = table(task, records)
    facts = [
        f"{task.title} dev, {records[0]['examples']:,} examples, percent. Model "
        f"{records[0]['model']}.",
        f"Refined on the training set for {config.epochs:g} epochs of batches of "
        f"{config.batch_size}, AdamW, peak rate {config.learning_rate:g}: codes, "
        "embeddings and the head's matrix fixed; centroids, levels, scales, biases and "
        "norms trained. Stored bits are the same before and after.",
        f"{records[0]['device']}, jax {records[0]['jax_version']}, kashin_jax "
        f"{records[0]['kashin_jax_version']}; one seed ({config.seed}).",
    ]
    print("\n".join(facts) + "\n\n" + aligned_table(rows, columns))
    title = f"{records[0]['model']}: refinement with fixed codes, {task.title} dev"
    written = write_results(
        out, "refine_glue", records, columns, rows=rows, title=title, facts=facts,
        command=command_line("refine_glue", config, always=("task", "bits")),
    )  # fmt: skip
    picture = out / "refine_glue.png"
    plot_refinement(records, task, picture, title=title)
    print(f"\nWritten: {written.jsonl}, {written.markdown}, {picture}")


def table(
    task: Task, records: Sequence[Record]
) -> tuple[list[dict[str, Any]], list[Column]]:
    """Rows and columns: each metric before and after, and what was gained."""
    columns = [
        Column("method", "method"),
        Column("bits", "bits"),
        Column("stored_bits_per_weight", "bits/weight", fixed(3)),
    ]
    for metric in task.metrics:
        columns += [
            Column(f"before_{metric}", f"{metric} before", fixed(2)),
            Column(f"after_{metric}", "after", fixed(2)),
            Column(f"gain_{metric}", "gain", increase),
        ]
    return [_with_gains(task, record) for record in records], columns


def _with_gains(task: Task, record: Record) -> dict[str, Any]:
    gains = {
        f"gain_{m}": record[f"after_{m}"] - record[f"before_{m}"]
        for m in task.metrics
        if f"after_{m}" in record
    }
    return {**record, **gains}


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_program("refine_glue", __doc__, RefineConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
