"""How deep the paper's decomposition has to go: quality against steps and tolerance.

    python -m experiments.depth
    python -m experiments.depth --bits=4 --steps=1,2,4,8,16 --rtols= --metrics=error
    python -m experiments.depth --seed=0,1,2 --data_dir=GLUE

The paper's method (greedy decomposition, then one codebook of pairs per matrix) at each
width, stopped after each number of `--steps` at a tolerance that it does not reach, and
at each tolerance of `--rtols` with steps to spare. For each: the relative squared error
of the weights of `--model` (mean over its layers), its perplexity, and the mean score
of `--glue_model` over its tasks, those of `experiments.glue`. It marks where more depth
stops helping: at the fewest steps, or the loosest tolerance, whose value is as good as
the best at any depth, up to the spread over seeds or to 1 %.

It prints two tables, adds its records to depth.jsonl in `--out`, and writes depth.md
and depth.png. The same command goes on where an interrupted one stopped.

Exit code 0: done; 1: a file or its content is unusable; 2: wrong flag; 130: Ctrl-C.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from tqdm import tqdm

from experiments.classification.checkpoints import load_task_bench, resolve_tasks
from experiments.classification.rows import (
    GlueBench,
    TaskBench,
    quantized_records,
    unchanged_records,
)
from experiments.classification.tasks import TASKS, Task, choose_tasks, data_title
from experiments.common.checkpoints import checkpoint_sha256
from experiments.common.flags import (
    GIVEN,
    POSITIVE_COUNT,
    Allowed,
    check_flags,
    command_line,
    flag,
    parse_bases,
    parse_numbers,
    run_program,
    short_model_name,
)
from experiments.common.methods import METHODS
from experiments.common.perplexity import Bench, full_precision_row, quantized_row
from experiments.common.plots import save_picture
from experiments.common.quantized_layers import (
    loss_fields,
    quantized_copy,
    remove_copies,
)
from experiments.common.results import (
    environment_fields,
    prepare_output,
    remove_work,
    start_work,
    write_results,
)
from experiments.common.resumable import FinishedRecords
from experiments.common.tables import Record, aligned_table, markdown_table
from experiments.common.text import (
    ASSETS,
    DATASETS,
    EvaluationText,
    default_context,
    load_text,
    parse_max_tokens,
)
from experiments.depth_curves import (
    METRICS,
    RTOL,
    STEPS,
    SUMMARY_COLUMNS,
    draw,
    setting_columns,
    setting_rows,
    summary_rows,
    title_of,
)
from kashin_jax import BasisSpec, Rules, stored_bits
from kashin_jax.bases import FAMILIES
from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.methods import Method
from kashin_jax.models import LoadedClassifier
from kashin_jax.models.context import own_context
from kashin_jax.models.loading import LoadedModel, load_language_model
from kashin_jax.models.tokenizer import check_vocabulary, load_tokenizer

__all__ = [
    "METHOD",
    "DepthConfig",
    "Inputs",
    "Point",
    "Subject",
    "choose_glue_tasks",
    "glue_subject",
    "grid",
    "language_subject",
    "load_inputs",
    "main",
    "make_subjects",
    "measure",
    "present",
    "run",
]

METHOD = "kashin"
"""The paper's method: decompose, then cluster the pairs."""


class Point(NamedTuple):
    """One setting of the method.

    Attributes:
      axis: `STEPS` or `RTOL`: which of the two limits is varied.
      bits: Code width.
      max_steps: Greedy steps allowed.
      rtol: Relative residual at which the decomposition stops earlier.
      basis: Pair of families.
      seed: Of bases and codebooks.
    """

    axis: str
    bits: int
    max_steps: int
    rtol: float
    basis: BasisSpec
    seed: int

    @property
    def x(self) -> float:
        """The limit that is varied."""
        return self.max_steps if self.axis == STEPS else self.rtol

    @property
    def config(self) -> Method:
        """The configuration of every layer."""
        make = METHODS[METHOD].make
        return make(self.bits, self.basis, self.rtol, self.max_steps)

    @property
    def label(self) -> str:
        """A short name, for progress bars."""
        limit = f"{self.axis} {self.x:g}"
        return f"{self.bits} bits, {limit}, seed {self.seed}"


def grid(
    bits: Sequence[int],
    steps: Sequence[int],
    rtols: Sequence[float],
    seeds: Sequence[int],
    *,
    basis: BasisSpec,
    rtol: float,
    max_steps: int,
) -> Iterator[Point]:
    """All settings; the widths of one limit follow each other, they compile once.

    Args:
      bits: Code widths.
      steps: Numbers of steps, each at the tolerance `rtol`.
      rtols: Tolerances, each with `max_steps` steps at the most.
      seeds: Of bases and codebooks.
      basis: Pair of families.
      rtol: Tolerance of the first axis.
      max_steps: Limit of the second.
    """
    limits = [(STEPS, count, rtol) for count in steps]
    limits += [(RTOL, max_steps, tolerance) for tolerance in rtols]
    for seed, (axis, count, tolerance), width in itertools.product(seeds, limits, bits):
        yield Point(axis, width, count, tolerance, basis, seed)


_MAX_STEPS = 100_000
_BELOW_ONE: Allowed = (lambda x: 0 < x < 1, "in (0, 1)")
_METRICS: Allowed = (
    lambda x: x and set(x) <= set(METRICS), f"a list of {', '.join(METRICS)}"
)  # fmt: skip
_DATASET: Allowed = (lambda x: x in DATASETS, f"one of {', '.join(DATASETS)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthConfig:
    """A study; meanings are in the flags.

    Raises:
      UsageError: If a value cannot work; the message names the flag.
    """

    bits: tuple[str, ...] = flag(
        ("2", "3", "4", "6"), "Code widths, 1 to 8, as a list.", GIVEN
    )
    steps: tuple[str, ...] = flag(
        tuple("1 2 3 4 5 6 8 10 12 16 24 32 48".split()),
        "Numbers of greedy steps, as a list; may be empty.",
    )
    rtols: tuple[str, ...] = flag(
        tuple("1e-1 3e-2 1e-2 1e-3 1e-4 1e-5 1e-6".split()),
        "Relative residuals at which to stop, as a list; may be empty.",
    )
    metrics: tuple[str, ...] = flag(
        tuple(METRICS), f"What is measured: a list of {', '.join(METRICS)}.", _METRICS
    )
    model: str = flag(
        str(ASSETS / "opt-wiki-18m"), "Language model: directory or hub id.", GIVEN
    )
    dataset: str = flag("wiki_vital", f"One of {', '.join(DATASETS)}.", _DATASET)
    text_file: str = flag("", "Score this UTF-8 text instead of a data set.")
    max_tokens: str = flag("4096", "Tokens scored, from the first on; or `all`.")
    glue_model: str = flag(
        str(ASSETS / "minilm-glue"),
        "Classifier: directory or hub id; {task} is replaced.", GIVEN,
    )  # fmt: skip
    tasks: tuple[str, ...] = flag(
        (), f"List of {', '.join(TASKS)}; the default is that of experiments.glue."
    )
    data_dir: str = flag(
        "",
        "Folder with SST-2/dev.tsv, wikitext2/wiki.test.raw and so on; what it lacks "
        "is embedded or downloaded from the hub.",
    )
    max_length: int = flag(
        128, "Tokens of an example of a task; longer ones are cut.", POSITIVE_COUNT
    )
    basis: str = flag(
        "hadamard", f"Family ({', '.join(FAMILIES)}), or `left:right`.", GIVEN
    )
    seed: tuple[str, ...] = flag(
        ("0",), "Seeds, as a list; several give a spread.", GIVEN
    )
    rtol: float = flag(1e-6, "Relative residual that ends `--steps`.", _BELOW_ONE)
    max_steps: int = flag(
        200, "Most greedy steps until a residual of --rtols is reached.", POSITIVE_COUNT
    )
    out: str = flag("runs", "Directory of the results.", GIVEN)

    def __post_init__(self) -> None:
        check_flags(self)
        parse_max_tokens(self.max_tokens)
        parse_bases((self.basis,))
        if self.tasks:
            choose_tasks(self.tasks)
        if not self.points:
            raise UsageError("`--steps` and `--rtols` are both empty; give one.")

    @property
    def data_path(self) -> Path | None:
        """`data_dir`, if it is given."""
        return Path(self.data_dir) if self.data_dir else None

    @property
    def needs_language_model(self) -> bool:
        """Whether a metric is one of `model`."""
        return any(not METRICS[name].is_score for name in self.metrics)

    @property
    def points(self) -> list[Point]:
        """All settings, in the order of work."""
        return list(grid(
            parse_numbers("bits", self.bits, 1, 8),
            parse_numbers("steps", self.steps, 1, _MAX_STEPS),
            _parse_rtols(self.rtols),
            parse_numbers("seed", self.seed, 0, 2**31 - 1),
            basis=parse_bases((self.basis,))[0],
            rtol=self.rtol,
            max_steps=self.max_steps,
        ))  # fmt: skip


def _parse_rtols(texts: Sequence[str]) -> list[float]:
    """Tolerances from loose to tight, each once."""
    values = set()
    for text in texts:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value < 1:
            raise UsageError(f"`--rtols` must list numbers in (0, 1). Got {text!r}.")
        values.add(value)
    return sorted(values, reverse=True)


# Fields of a record, for a setting, or None for full precision.
Scorer = Callable[[Point | None], dict[str, Any]]


class Subject(NamedTuple):
    """A model, or several that are scored together.

    Attributes:
      identity: Fields of a record that say what is scored on what, with what.
      work: Directory for unfinished work.
      checkpoints: Every one whose layers are quantized, by its hash.
      has_error: Whether the error of its weights is a metric, too.
      scorers: By metric.
    """

    identity: Record
    work: Path
    checkpoints: Mapping[str, LoadedModel | LoadedClassifier]
    has_error: bool
    scorers: Mapping[str, Scorer]


def language_subject(bench: Bench, metrics: Sequence[str]) -> Subject:
    """A language model: the error of its weights and its perplexity."""
    text = bench.text.record_fields()
    identity = {
        "model": bench.identity["model"],
        "data": text["dataset"],
        "protocol": text["protocol"],
        "examples": text["tokens"],
        "data_sha256": text["text_sha256"],
        "weights_sha256": bench.weights_sha256,
        **environment_fields(),
    }
    scorers: dict[str, Scorer] = {}
    if "perplexity" in metrics:
        scorers["perplexity"] = partial(_perplexity, bench)
    return Subject(
        identity, bench.work, {bench.weights_sha256: bench.loaded}, "error" in metrics,
        scorers,
    )  # fmt: skip


def _perplexity(bench: Bench, point: Point | None) -> dict[str, Any]:
    if point is None:
        row = full_precision_row(bench)
    else:
        row = quantized_row(
            bench, METHOD, METHODS[METHOD], bits=point.bits, basis=point.basis,
            seed=point.seed, rtol=point.rtol, max_steps=point.max_steps,
        )  # fmt: skip
    return {"value": row["perplexity"]}


def glue_subject(bench: GlueBench) -> Subject:
    """Classifiers: the mean over tasks of the mean over a task's metrics."""
    sets = [one for task in bench.tasks for one in task.sets]
    checkpoints = {one.weights_sha256: one.loaded for one in bench.tasks}
    identity = {
        "model": bench.identity["model"],
        "data": ", ".join(one.task.name for one in bench.tasks),
        "protocol": f"{data_title([one.task for one in bench.tasks])}, at most "
        f"{bench.identity['max_length']} tokens",
        "examples": sum(len(one.labels) for one in sets),
        "data_sha256": _joined([one.sha256 for one in sets]),
        "weights_sha256": _joined(list(checkpoints)),
        **environment_fields(),
    }
    return Subject(
        identity, bench.work, checkpoints, False,
        {"glue": partial(_glue, bench)},
    )  # fmt: skip


def _joined(hashes: Sequence[str]) -> str:
    if len(hashes) == 1:
        return hashes[0]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _glue(bench: GlueBench, point: Point | None) -> dict[str, Any]:
    if point is None:
        records = unchanged_records(bench)
    else:
        records = quantized_records(
            bench, METHOD, METHODS[METHOD], bits=point.bits, basis=point.basis,
            seed=point.seed, rtol=point.rtol, max_steps=point.max_steps,
        )  # fmt: skip
    tasks: dict[str, dict[str, float]] = {}
    for record in records:
        tasks.setdefault(record["task"], {})[record["metric"]] = record["value"]
    means = [statistics.fmean(metrics.values()) for metrics in tasks.values()]
    return {"value": statistics.fmean(means), "scores": tasks}


_WINDOWS = 4
_BATCH_TOKENS = 1024


def choose_glue_tasks(config: DepthConfig) -> tuple[Task, ...]:
    """The tasks that are scored; none where GLUE is not asked for.

    Raises:
      UsageError: If a task is unknown, or none is named and none can be derived.
      CheckpointError: If the classifier cannot be found.
      DataError: If `--data_dir` is not a folder.
    """
    if "glue" not in config.metrics:
        return ()
    with _about_glue_model():
        return resolve_tasks(config.glue_model, config.tasks, config.data_path)[0]


@contextlib.contextmanager
def _about_glue_model() -> Iterator[None]:
    """Complaints about a classifier name the flag of `experiments.glue`, not ours."""
    try:
        yield
    except (UsageError, CheckpointError) as error:
        message = str(error).replace("`--model=", "`--glue_model=")
        raise type(error)(message) from error


class Inputs(NamedTuple):
    """What the metrics need, read and checked; None or empty where none needs it."""

    language: LoadedModel | None
    text: EvaluationText | None
    tasks: tuple[TaskBench, ...]


def load_inputs(config: DepthConfig, tasks: Sequence[Task]) -> Inputs:
    """Reads models and texts; `tasks` are those of `choose_glue_tasks`.

    Raises:
      UsageError: If a flag does not fit a model.
      CheckpointError: If a model or its tokenizer cannot be used.
      DataError: If a text or a task's file cannot be used.
    """
    language = text = None
    if config.needs_language_model:
        language = load_language_model(config.model)
        text = _text(config, language)
    with _about_glue_model():
        benches = tuple(
            load_task_bench(
                task, config.glue_model, labels=(), data_dir=config.data_path,
                max_length=config.max_length, tokens_per_batch=_BATCH_TOKENS,
            )
            for task in tasks
        )  # fmt: skip
    return Inputs(language, text, benches)


def make_subjects(config: DepthConfig, inputs: Inputs, work: Path) -> list[Subject]:
    """The models with their metrics; unfinished work goes to `work`."""
    subjects = []
    if inputs.language is not None and inputs.text is not None:
        name = short_model_name(config.model)
        fields = {**inputs.text.record_fields(), **environment_fields()}
        bench = Bench(
            loaded=inputs.language, text=inputs.text, work=work,
            identity={"model": name, **fields},
            weights_sha256=checkpoint_sha256(inputs.language.directory),
            batch_size=_WINDOWS,
        )  # fmt: skip
        subjects.append(language_subject(bench, config.metrics))
    if inputs.tasks:
        name = short_model_name(config.glue_model)
        fields = {"max_length": config.max_length, **environment_fields()}
        identity = {"model": name, **fields}
        subjects.append(
            glue_subject(GlueBench(tasks=inputs.tasks, work=work, identity=identity))
        )
    return subjects


def _text(config: DepthConfig, loaded: LoadedModel) -> EvaluationText:
    tokenizer = load_tokenizer(loaded.directory)
    check_vocabulary(tokenizer, loaded.config.vocab_size)
    return load_text(
        config.dataset,
        tokenizer,
        context=default_context(config.dataset, own_context(loaded)),
        text_file=config.text_file or None,
        max_tokens=parse_max_tokens(config.max_tokens),
        data_dir=config.data_path,
    )


ERROR = "error"
# Every record has every field, so that a reader of the file needs no special cases.
_ABSENT = dict.fromkeys((
    "value", "scores", "stored_bits_per_weight", "relative_error",
    "residual", "steps_taken", "converged_share", "quantize_seconds",
))  # fmt: skip


def measure(
    subjects: Sequence[Subject], points: Sequence[Point], work: Path
) -> list[dict[str, Any]]:
    """All records: full precision first, then the settings in their order.

    A finished record is kept in `work`, the layers of a setting only until all of its
    records are there: they would take a gigabyte.

    Args:
      subjects: Models with their metrics.
      points: Settings.
      work: Directory for unfinished work; it must exist.

    Raises:
      DataError: If the file of finished records is damaged.
    """
    finished = FinishedRecords(work / "records.jsonl")
    records = []
    bar = tqdm([None, *points], desc="settings", unit="setting", disable=None)
    for point in bar:
        fresh = False
        of_point = []
        for subject in subjects:
            for record, is_new in _of_subject(subject, point, finished):
                if is_new:
                    finished.add(record)
                    fresh = True
                of_point.append(record)
        if fresh:
            tqdm.write(_sentence(point, of_point), file=sys.stderr)
            remove_copies(work)
        records += of_point
    return records


def _of_subject(
    subject: Subject, point: Point | None, finished: FinishedRecords
) -> Iterator[tuple[dict[str, Any], bool]]:
    """The records of one model at one setting, and whether they are new."""
    metrics = list(subject.scorers)
    if subject.has_error and point is not None:
        metrics.insert(0, ERROR)
    lost: Record | None = None
    for metric in metrics:
        key = {"metric": metric, **_setting(point), **subject.identity}
        if known := finished.find(key):
            yield known[0], False
            continue
        if lost is None:
            lost = {} if point is None else _lost(subject, point)
        if metric == ERROR:
            scored = {"value": lost["relative_error"]}
        else:
            scored = subject.scorers[metric](point)
        yield {**_ABSENT, **key, **lost, **scored}, True


def _setting(point: Point | None) -> dict[str, Any]:
    if point is None:
        return dict.fromkeys(Point._fields)
    return {**point._asdict(), "basis": str(point.basis)}


def _lost(subject: Subject, point: Point) -> dict[str, Any]:
    layers = {
        f"{number}/{path}": layer
        for number, (sha256, loaded) in enumerate(subject.checkpoints.items())
        for path, layer in quantized_copy(
            loaded, Rules(config=point.config), point.seed, subject.work, sha256
        ).layers.items()
    }  # fmt: skip
    bits = sum(stored_bits(layer.tensor) for layer in layers.values())
    weights = sum(math.prod(layer.tensor.shape) for layer in layers.values())

    def mean(name: str) -> float:
        verdicts = [layer.report.decomposition for layer in layers.values()]
        return statistics.fmean(float(jnp.mean(v[name])) for v in verdicts if v)

    return {
        "stored_bits_per_weight": bits / weights,
        "residual": mean("residual"),
        "steps_taken": mean("num_steps"),
        **loss_fields(layers),
    }


def _sentence(point: Point | None, records: Sequence[Record]) -> str:
    values = [
        f"{METRICS[r['metric']].name} {METRICS[r['metric']].show(r['value'])}"
        for r in records
    ]
    label = "full precision" if point is None else point.label
    return f"{label}: {', '.join(values)}"


_ENOUGH = (
    "Enough: the fewest steps, or the loosest tolerance, whose value is worse than the "
    "best at any depth by no more than the standard deviation over seeds at the best, "
    "or by no more than 1 % of it."
)
_ALL = "All settings"


def present(config: DepthConfig, records: Sequence[Record], out: Path) -> None:
    """Prints the tables; adds to depth.jsonl, writes depth.md and depth.png.

    Args:
      config: The flags.
      records: All of the study.
      out: An existing directory.
    """
    summary, settings = summary_rows(records), setting_rows(records)
    columns = setting_columns(records)
    facts = _facts(config, records)
    print("\n".join(facts) + "\n\n" + aligned_table(summary, SUMMARY_COLUMNS))
    print(f"\n{_ALL} (* enough):\n{aligned_table(settings, columns)}")
    title = title_of(records)
    written = write_results(
        out, "depth", records, SUMMARY_COLUMNS, rows=summary, title=title, facts=facts,
        command=command_line("depth", config, always=("bits",)),
        appendix=f"## {_ALL}\n`*` marks enough.\n\n{markdown_table(settings, columns)}",
    )  # fmt: skip
    picture = out / "depth.png"
    figure = draw(records, title)
    save_picture(figure, picture)
    print(f"\nWritten: {written.jsonl}, {written.markdown}, {picture}")


def _facts(config: DepthConfig, records: Sequence[Record]) -> list[str]:
    last = records[-1]
    subjects = dict.fromkeys(
        f"Model {r['model']}: {r['data']}, {r['examples']:,} examples or predictions; "
        f"{r['protocol']}."
        for r in records
    )
    return [
        *subjects,
        f"The paper's method, basis {config.basis}: `--steps` end at the tolerance "
        f"{config.rtol:g}, `--rtols` after {config.max_steps} steps.",
        _ENOUGH,
        "Steps and residuals are means over layers, sizes are stored bits, `seconds` "
        "is quantization time on this device, compilation included.",
        f"{last['device']}, jax {last['jax_version']}, kashin_jax "
        f"{last['kashin_jax_version']}.",
    ]


def run(config: DepthConfig) -> int:
    """Measures, prints and writes the study; returns the exit code.

    Raises:
      UsageError: If a flag does not fit a model or the output cannot be written.
      CheckpointError: If a model or its tokenizer cannot be used.
      DataError: If a text or a task's file cannot be used.
    """
    out = prepare_output(config.out)
    # TF32 would put the products of a float32 model at three digits on a GPU.
    with jax.default_matmul_precision("highest"):
        tasks = choose_glue_tasks(config)
        inputs = load_inputs(config, tasks)
        work = start_work(out, config)
        subjects = make_subjects(config, inputs, work)
        records = measure(subjects, config.points, work)
    present(config, records, out)
    remove_work(work)
    return 0


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_program("depth", __doc__, DepthConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
