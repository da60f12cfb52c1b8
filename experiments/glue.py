"""Accuracy of a quantized classifier: the 2024 paper's Table 3, with its controls.

    python -m experiments.glue --bits=4
    python -m experiments.glue --bits=2,3,4,6 --seeds=3 --data_dir=GLUE
    python -m experiments.glue --model='runs/bert-base-uncased-{task}/hf' --tasks=rte

Without flags it takes the embedded encoder minilm-glue and two embedded sets of rated
sentences, which its SST-2 head answers. GLUE's nine tasks are scored where `--data_dir`
has them, or `--tasks` names them and the hub has them; it says which were left out.
`--model` is any BERT, RoBERTa or DistilBERT classifier in Hugging Face's layout;
`{task}` in it stands for the name of the task, for one checkpoint per task. One that is
quantized already, by `--save` or `kashin quantize`, is scored as it is. By the paper's
protocol all matrices are quantized but embeddings and the classifier. It prints one row
per method, adds them to table3_glue.jsonl in `--out`, and writes table3_glue.md and
table3_glue.png. The same command goes on where an interrupted one stopped.

Exit code 0: done; 1: a file or its content is unusable; 2: wrong flag; 130: Ctrl-C.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.classification.checkpoints import load_task_bench, resolve_tasks
from experiments.classification.facts import table_facts
from experiments.classification.plot import plot_glue
from experiments.classification.rows import (
    GlueBench,
    quantized_records,
    unchanged_records,
)
from experiments.classification.table import glue_columns, table_rows
from experiments.classification.tasks import TASKS, Task, choose_tasks, data_title
from experiments.common.flags import (
    GIVEN,
    POSITIVE_COUNT,
    check_flags,
    command_line,
    flag,
    parse_bases,
    parse_widths,
    plain_differences,
    run_program,
    short_model_name,
)
from experiments.common.methods import GLUE_METHODS, METHODS, choose_methods, table_grid
from experiments.common.results import (
    environment_fields,
    prepare_output,
    remove_work,
    start_work,
    write_results,
)
from experiments.common.tables import Record, aligned_table
from experiments.common.text import ASSETS
from kashin_jax.bases import FAMILIES
from kashin_jax.errors import UsageError

__all__ = ["GlueConfig", "main", "run"]

ARTIFACT = "table3_glue"
EMBEDDED = ASSETS / "minilm-glue"
_QUANTIZING = ("bits", "methods", "basis", "seeds", "rtol", "max_steps", "save")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlueConfig:
    """A table; meanings are in the flags.

    Raises:
      UsageError: If a value cannot work; the message names the flag.
    """

    bits: tuple[str, ...] = flag(("4",), "Code widths, 1 to 8, as a list.", GIVEN)
    model: str = flag(
        str(EMBEDDED), "Classifier: directory or hub id; {task} is replaced.", GIVEN
    )
    tasks: tuple[str, ...] = flag(
        (),
        f"List of {', '.join(TASKS)}; by default what the model knows and --data_dir "
        "has, without it the embedded ones.",
    )
    data_dir: str = flag(
        "",
        "Folder with RTE/dev.tsv or glue/RTE/dev.tsv and so on, in GLUE's layout or a "
        "plain one; what else --tasks names is embedded or asked of the hub.",
    )
    labels: tuple[str, ...] = flag(
        (), "What the outputs mean, in order, where config.json does not say; or task."
    )
    max_length: int = flag(
        128, "Tokens of an example; longer ones are cut.", POSITIVE_COUNT
    )
    methods: tuple[str, ...] = flag(
        ("all",),
        f"A list of {', '.join(METHODS)}; all stands for {', '.join(GLUE_METHODS)}.",
    )
    basis: tuple[str, ...] = flag(
        ("hadamard",),
        f"List of families ({', '.join(FAMILIES)}); `left:right` for unequal sides.",
        GIVEN,
    )
    seeds: int = flag(
        1, "Seeds, from 0 on, of the methods that are random.", POSITIVE_COUNT
    )
    rtol: float = flag(
        1e-6, "Relative residual at which the decomposition has converged.",
        (lambda x: 0 < x < 1, "in (0, 1)"),
    )  # fmt: skip
    max_steps: int = flag(
        6000, "Greedy steps allowed per matrix; the authors' script has 6000 too.",
        POSITIVE_COUNT,
    )  # fmt: skip
    batch_tokens: int = flag(
        1024, "Tokens per forward pass, padding included.", POSITIVE_COUNT
    )
    save: str = flag(
        "",
        "Directory that receives each quantized classifier, in the library's format "
        "(docs/format.md).",
    )
    out: str = flag("runs", "Directory of the results.", GIVEN)

    def __post_init__(self) -> None:
        check_flags(self)
        choose_methods(self.methods)
        parse_widths("bits", self.bits, 1, 8)
        parse_bases(self.basis)
        if self.tasks:
            choose_tasks(self.tasks)


def run(config: GlueConfig) -> int:
    """Makes, prints and writes the table; returns the exit code.

    Raises:
      UsageError: If a flag does not fit the model or the output cannot be written.
      CheckpointError: If a model or its tokenizer cannot be used.
      DataError: If a task's file cannot be used.
    """
    out = prepare_output(config.out)
    # TF32 would put the products of a float32 model at three digits on a GPU.
    with jax.default_matmul_precision("highest"):
        data_dir = Path(config.data_dir) if config.data_dir else None
        tasks, left_out = resolve_tasks(config.model, config.tasks, data_dir)
        benches = tuple(
            load_task_bench(
                task, config.model, labels=config.labels, data_dir=data_dir,
                max_length=config.max_length, tokens_per_batch=config.batch_tokens,
                takes_quantized=True,
            )
            for task in tasks
        )  # fmt: skip
        if any(one.stored is not None for one in benches):
            _refuse_choices(config)
        name = short_model_name(config.model)
        work = start_work(out, config, leaving=("batch_tokens", "save"))
        identity = {
            "model": name, "max_length": config.max_length, **environment_fields()
        }  # fmt: skip
        save = prepare_output(config.save) if config.save else None
        bench = GlueBench(tasks=benches, work=work, identity=identity, save=save)
        records = _records(config, bench)
    _present(config, bench, records, left_out, out)
    remove_work(work)
    return 0


def _refuse_choices(config: GlueConfig) -> None:
    if plain_differences(config, dict.fromkeys(_QUANTIZING, "")):
        raise UsageError(
            f"`--model={config.model}` is quantized already and scored as it is; leave "
            f"out --{', --'.join(_QUANTIZING)}, or name the original checkpoint."
        )


def _records(config: GlueConfig, bench: GlueBench) -> list[dict[str, Any]]:
    records = unchanged_records(bench)
    _announce(records)
    if bench.is_quantized:
        return records
    grid = table_grid(
        parse_widths("bits", config.bits, 1, 8),
        choose_methods(config.methods, GLUE_METHODS),
        parse_bases(config.basis),
        range(config.seeds),
    )
    for one in grid:
        row = quantized_records(
            bench, one.name, one.method, bits=one.bits, basis=one.basis, seed=one.seed,
            rtol=config.rtol, max_steps=config.max_steps,
        )  # fmt: skip
        records += row
        _announce(row)
    return records


def _announce(row: Sequence[Record]) -> None:
    values = [
        f"{r['task']} {r['metric']} {r['value']:.2f}" for r in row if r["task"]
    ] or ["-"]
    first = row[0]
    seed = "" if first["seed"] is None else f", seed {first['seed']}"
    print(
        f"{first['method']}, {first['bits']} bits{seed}: {', '.join(values)}",
        file=sys.stderr,
    )


def _present(
    config: GlueConfig,
    bench: GlueBench,
    records: Sequence[Record],
    left_out: Sequence[Task],
    out: Path,
) -> None:
    tasks = [one.task for one in bench.tasks]
    columns, rows = glue_columns(tasks, records), table_rows(tasks, records)
    facts = table_facts(bench, records, left_out, config.max_length, config.seeds)
    print("\n".join(facts) + "\n\n" + aligned_table(rows, columns))
    title = f"{records[0]['model']}: {data_title(tasks)}"
    written = write_results(
        out, ARTIFACT, records, columns, rows=rows, title=title, facts=facts,
        command=command_line("glue", config, always=_shown(bench)),
    )  # fmt: skip
    picture = out / f"{ARTIFACT}.png"
    plot_glue(records, tasks, picture, title=title)
    print(f"\nWritten: {written.jsonl}, {written.markdown}, {picture}")


def _shown(bench: GlueBench) -> tuple[str, ...]:
    return () if bench.is_quantized else ("bits",)


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_program("glue", __doc__, GlueConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
