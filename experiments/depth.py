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
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from experiments.classification.checkpoints import load_task_bench, resolve_tasks
from experiments.classification.rows import (
    GlueBench,
    TaskBench,
)
from experiments.classification.tasks import TASKS, Task, choose_tasks
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
from experiments.common.perplexity import Bench
from experiments.common.plots import save_picture
from experiments.common.results import (
    environment_fields,
    prepare_output,
    remove_work,
    start_work,
    write_results,
)
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
    SUMMARY_COLUMNS,
    draw,
    setting_columns,
    setting_rows,
    summary_rows,
    title_of,
)
from experiments.depth_points import (
    Point,
    Subject,
    glue_subject,
    grid,
    language_subject,
    measure,
)
from kashin_jax.bases import FAMILIES
from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.models.context import own_context
from kashin_jax.models.loading import LoadedModel, load_language_model
from kashin_jax.models.tokenizer import check_vocabulary, load_tokenizer

__all__ = [
    "DepthConfig",
    "Inputs",
    "choose_glue_tasks",
    "load_inputs",
    "main",
    "make_subjects",
    "present",
    "run",
]

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
