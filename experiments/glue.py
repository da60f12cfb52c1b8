"""Accuracy of a quantized classifier: the 2024 paper's Table 3, with its controls.

    python -m experiments.glue --bits=4
    python -m experiments.glue --bits=2,3,4,6 --seeds=3 --data_dir=GLUE
    python -m experiments.glue --bits=2 --calibration=default \
        --methods=kashin-joint,kashin-joint-calibrated,gptq-g128
    python -m experiments.glue --model='runs/bert-base-uncased-{task}/hf' --tasks=rte

Without flags it takes the embedded encoder minilm-glue and two embedded sets of rated
sentences, which its SST-2 head answers. GLUE's nine tasks are scored where `--data_dir`
has them, or `--tasks` names them and the hub has them; it says which were left out.
`--model` is any BERT, RoBERTa or DistilBERT classifier in Hugging Face's layout;
`{task}` in it stands for the name of the task, for one checkpoint per task. One that is
quantized already, by `--save` or `kashin quantize`, is scored as it is. By the paper's
protocol all matrices are quantized but embeddings and the classifier. It prints one row
per method, adds them to table3_glue.jsonl in `--out`, and writes table3_glue.md and
table3_glue.png; with `--calibration` these are called calibrated_glue. The same command
goes on where an interrupted one stopped. Rows that the file has, of the same model,
data, choices, versions and device, are taken from there unless `--fresh`, or `--save`
needs the classifiers.

Exit code 0: done; 1: a file or its content is unusable; 2: wrong flag; 130: Ctrl-C.
"""

import dataclasses
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.classification.calibration import TRAIN, load_task_calibration
from experiments.classification.checkpoints import load_task_bench, resolve_tasks
from experiments.classification.plot import plot_glue
from experiments.classification.rows import (
    GlueBench,
    TaskBench,
    quantized_records,
    unchanged_records,
)
from experiments.classification.tasks import TASKS, Task, choose_tasks, data_title
from experiments.common.calibration import DEFAULT, NamedCalibration
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
from experiments.common.methods import (
    FULL_PRECISION,
    GLUE_CALIBRATED,
    GLUE_METHODS,
    METHODS,
    RowKind,
    choose_methods,
    table_grid,
)
from experiments.common.results import (
    earlier_records,
    environment_fields,
    prepare_output,
    remove_work,
    start_work,
    write_results,
)
from experiments.common.resumable import FinishedRecords
from experiments.common.tables import Column, Record, aligned_table, fixed, share
from experiments.common.text import ASSETS
from kashin_jax.bases import FAMILIES
from kashin_jax.errors import UsageError

__all__ = ["GlueConfig", "glue_columns", "main", "run", "table_facts", "table_rows"]

ARTIFACT, CALIBRATED_ARTIFACT = "table3_glue", "calibrated_glue"
EMBEDDED = ASSETS / "minilm-glue"
_QUANTIZING = (
    "bits", "methods", "basis", "seeds", "rtol", "max_steps", "save", "calibration"
)  # fmt: skip


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
        "plain one; other tasks are embedded or downloaded from the hub.",
    )
    labels: tuple[str, ...] = flag(
        (), "What the outputs mean, in order, where config.json does not say; or task."
    )
    max_length: int = flag(
        128, "Tokens of an example; longer ones are cut.", POSITIVE_COUNT
    )
    methods: tuple[str, ...] = flag(
        ("all",),
        f"A list of {', '.join((*METHODS, *GLUE_CALIBRATED))}; all stands for "
        f"{', '.join(GLUE_METHODS)}; the last {len(GLUE_CALIBRATED)} need "
        "--calibration, with which all stands for them, too.",
    )
    calibration: str = flag(
        "",
        f"Text that calibrated methods learn from: {TRAIN}, the task's training set; "
        f"{DEFAULT}, the split of wiki_vital for it; or a UTF-8 file.",
    )
    calibration_tokens: int = flag(
        32_768, "Tokens of it, in whole examples.", POSITIVE_COUNT
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
    fresh: bool = flag(
        False, "Compute rows again that the results in --out have already."
    )
    out: str = flag("runs", "Directory of the results.", GIVEN)

    def __post_init__(self) -> None:
        check_flags(self)
        _methods(self)
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
        work = start_work(out, config, leaving=("batch_tokens", "save", "fresh"))
        # Records do not say what `--labels` did.
        is_fresh = config.fresh or config.labels
        # Methods without calibration are the same in both files.
        names = (_artifact(config), ARTIFACT)
        earlier = [] if is_fresh else earlier_records(out, names)
        identity = {
            "model": name, "max_length": config.max_length, **environment_fields()
        }  # fmt: skip
        save = prepare_output(config.save) if config.save else None
        bench = GlueBench(
            tasks=benches, work=work, identity=identity, save=save,
            finished=FinishedRecords(work / "rows.jsonl", earlier),
            calibrations=_calibrations(config, benches, data_dir),
        )  # fmt: skip
        records = _records(config, bench)
    _present(config, bench, records, left_out, out)
    remove_work(work)
    return 0


def _artifact(config: GlueConfig) -> str:
    """The name of the files: tables with calibrated rows are other ones."""
    return CALIBRATED_ARTIFACT if config.calibration else ARTIFACT


def _methods(config: GlueConfig) -> dict[str, RowKind]:
    calibrated = GLUE_CALIBRATED if config.calibration else None
    return choose_methods(config.methods, GLUE_METHODS, calibrated=calibrated)


def _calibrations(
    config: GlueConfig, benches: Sequence[TaskBench], data_dir: Path | None
) -> dict[str, NamedCalibration]:
    """The examples of every task's calibration, by its name."""
    scored = {each.sha256 for one in benches for each in one.sets}
    return {
        one.task.name: load_task_calibration(
            one.task, one.loaded, config.calibration, config.calibration_tokens,
            data_dir=data_dir, max_length=config.max_length, scored=scored,
        )
        for one in benches
        if config.calibration
    }  # fmt: skip


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
        _methods(config),
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
    shown = dataclasses.replace(config, fresh=False)
    written = write_results(
        out, _artifact(config), records, columns, rows=rows, title=title, facts=facts,
        command=command_line("glue", shown, always=_shown(bench)),
    )  # fmt: skip
    picture = out / f"{_artifact(config)}.png"
    plot_glue(records, tasks, picture, title=title)
    print(f"\nWritten: {written.jsonl}, {written.markdown}, {picture}")


def _shown(bench: GlueBench) -> tuple[str, ...]:
    return () if bench.is_quantized else ("bits",)


_GLUE = (
    "Percent: Matthews (CoLA), accuracy (SST-2, RTE, WNLI, QNLI), accuracy / F1 (MRPC, "
    "QQP), Pearson / Spearman (STS-B), matched / mismatched (MNLI)."
)
_RATED = (
    "Percent: accuracy / Pearson ({}) of the SST-2 head, fine-tuned on film reviews: "
    "its class against the sign of the mean human rating, and its output for positive "
    "less its output for negative against the rating itself."
)
_QUANTIZED_HERE = (
    "All matrices but embeddings and classifier are quantized, decoded, and run in "
    "float32. Sizes are stored bits: codes, centroids, scales, zero points, seeds. "
    "`seconds` is quantization time on this device, compilation included."
)
_QUANTIZED_BEFORE = (
    "The model was quantized before; its matrices are decoded and run in float32. "
    "Sizes are stored bits."
)


def table_facts(
    bench: GlueBench,
    records: Sequence[Record],
    left_out: Sequence[Task],
    max_length: int,
    seeds: int,
) -> list[str]:
    """The protocol, what was left out, and what computed it.

    Args:
      bench: What was scored.
      records: Its records; there is at least one.
      left_out: Tasks that the model knows but nobody has data for.
      max_length: Tokens of an example.
      seeds: Of the methods that are random.
    """
    first = records[0]
    sizes = "; ".join(
        f"{one.task.title} {sum(len(s.labels) for s in one.sets):,}"
        + _cut(sum(s.num_truncated for s in one.sets))
        + _skipped(sum(s.num_skipped for s in one.sets))
        for one in bench.tasks
    )
    facts = [
        f"Model {first['model']}; examples: {sizes}; at most {max_length} tokens each.",
        *_metrics([one.task for one in bench.tasks]),
        _QUANTIZED_BEFORE if bench.is_quantized else _QUANTIZED_HERE,
    ]
    if left_out:
        facts.append(
            f"Left out: {', '.join(task.title for task in left_out)}, whose files are "
            "not at hand (GLUE is not embedded); give `--data_dir`, or name them by "
            "`--tasks` to have them fetched."
        )
    if seeds > 1:
        facts.append(
            f"Random methods: mean over seeds 0 to {seeds - 1}, ± standard deviation."
        )
    facts.append(
        f"{first['device']}, jax {first['jax_version']}, kashin_jax "
        f"{first['kashin_jax_version']}."
    )
    return facts


def _metrics(tasks: Sequence[Task]) -> list[str]:
    rated = [task.title for task in tasks if task.rating_range is not None]
    glue = [_GLUE] if len(rated) < len(tasks) else []
    return glue + ([_RATED.format(", ".join(rated))] if rated else [])


def _cut(count: int) -> str:
    return f" ({count} cut)" if count else ""


def _skipped(count: int) -> str:
    return f" ({count} damaged rows left out)" if count else ""


_KEYS = ("method", "bits", "basis", "calibration", "calibration_tokens")
_MEANS = (
    "relative_error", "converged_share", "quantize_seconds", "output_error",
    "data_free_output_error",
)  # fmt: skip


def glue_columns(
    tasks: Sequence[Task], records: Sequence[Record]
) -> tuple[Column, ...]:
    """The columns for some tasks; bases are one only where there are several."""
    first = [Column("method", "method"), Column("bits", "bits")]
    if len({r["basis"] for r in records if r["basis"] is not None}) > 1:
        first.append(Column("basis", "basis"))
    is_calibrated = any(r.get("calibration") for r in records)
    if is_calibrated:
        first.append(Column("calibration", "calibration"))
    outputs = (
        Column("output_error", "outputs lose", fixed(4)),
        Column("data_free_output_error", "without text", fixed(4)),
    )
    return (
        *first,
        Column("stored_bits_per_weight", "bits/weight", fixed(3)),
        Column("seeds", "seeds"),
        *(Column(task.name, task.title) for task in tasks),
        Column("relative_error", "rel. sq. error", fixed(5)),
        *(outputs if is_calibrated else ()),
        Column("converged_share", "converged", share),
        Column("quantize_seconds", "seconds", fixed(1)),
    )


def table_rows(
    tasks: Sequence[Task], records: Sequence[Record]
) -> list[dict[str, Any]]:
    """Records of all tasks, metrics and seeds as the lines of a table.

    A cell has the task's metrics with a slash between them; of several seeds the mean
    and, behind ±, the standard deviation. Behind each line that the paper has, too,
    stands the paper's.
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(map(record.get, _KEYS)), []).append(record)
    rows: list[dict[str, Any]] = []
    for key, group in groups.items():
        cells = {task.name: _cell(task, group, "value", 2) for task in tasks}
        seeds = {r["seed"] for r in group if r["seed"] is not None}
        rows.append({
            **dict(zip(_KEYS, key, strict=True)),
            **cells,
            "seeds": len(seeds) or None,
            "stored_bits_per_weight": _mean(group, "stored_bits_per_weight"),
            **{name: _mean(group, name) for name in _MEANS},
            "note": group[0]["note"],
        })  # fmt: skip
        published = {task.name: _cell(task, group, "published", 2) for task in tasks}
        if any(published.values()):
            rows.append({
                "method": f"{key[0]}, published",
                "bits": 32 if key[0] == FULL_PRECISION else key[1],
                **published,
                "note": _PAPER,
            })  # fmt: skip
    return rows


_PAPER = (
    "Table 3 of the paper (arXiv 2404.09737): a single run on the authors' own "
    "checkpoint."
)


def _cell(task: Task, group: Sequence[Record], field: str, digits: int) -> str | None:
    parts = []
    for metric in task.metrics:
        values = [
            r[field]
            for r in group
            if (r["task"], r["metric"]) == (task.name, metric) and r[field] is not None
        ]
        if not values:
            return None
        several = len(set(values)) > 1 or (len(values) > 1 and field == "value")
        spread = f"±{statistics.stdev(values):.1f}" if several else ""
        parts.append(f"{statistics.fmean(values):.{digits}f}{spread}")
    return " / ".join(parts)


def _mean(group: Sequence[Record], field: str) -> float | None:
    # One value per checkpoint and seed, however many tasks and metrics they have; each
    # task has a calibration of its own.
    runs = {
        (r["weights_sha256"], r["seed"], r.get("calibration") and r["task"]): r.get(
            field
        )
        for r in group
    }
    values = [value for value in runs.values() if value is not None]
    return statistics.fmean(values) if values else None


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_program("glue", __doc__, GlueConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
