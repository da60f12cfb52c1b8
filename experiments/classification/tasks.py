"""Tasks of classifiers: the nine of GLUE and two embedded sets of rated sentences.

GLUE's are those of the 2024 paper's Table 3. Their label names and the order of these
are those of `nyu-mll/glue` on the Hugging Face hub, which is also the order of integer
labels in GLUE's own files.
"""

import dataclasses
import types
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from kashin_jax.errors import UsageError

__all__ = [
    "GLUE_TASKS",
    "TASKS",
    "Columns",
    "Task",
    "choose_tasks",
    "data_title",
    "label_key",
]


class Columns(NamedTuple):
    """Where a table keeps its texts and labels; `second` is None for one sentence."""

    first: str
    second: str | None
    label: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A data set together with the way it is scored.

    Attributes:
      name: Short name, of GLUE's tasks also the hub's configuration.
      title: As printed in tables.
      folder: Of its files; for GLUE's tasks, as GLUE calls it.
      labels: Label names in Hugging Face order; empty for regression.
      head: The task whose head answers this one; None for its own.
      score_range: Least and greatest label of a regression.
      rating_range: Least and greatest label of a task of two classes whose labels are
        ratings: below 0 is the first class, above 0 the second.
      layouts: The columns of files that are understood: GLUE's own first, then the
        plain ones `sentence label` or `sentence1 sentence2 label` (or `score`).
      hub_columns: The columns on the hub; None for what is embedded alone, and has no
        training set.
      header: The columns of GLUE's own file where that has no header line.
      evaluation_splits: Names of the files that are scored, without `.tsv`.
      metrics: What the table prints; with two splits, one metric of each.
      has_damaged_rows: GLUE's own files have rows broken by line ends inside a text,
        and empty texts. `nyu-mll/glue` drops the first and keeps the second.
    """

    name: str
    title: str
    folder: str
    labels: tuple[str, ...]
    layouts: tuple[Columns, ...]
    hub_columns: Columns | None
    metrics: tuple[str, ...]
    head: str | None = None
    score_range: tuple[float, float] | None = None
    rating_range: tuple[float, float] | None = None
    header: tuple[str, ...] | None = None
    evaluation_splits: tuple[str, ...] = ("dev",)
    has_damaged_rows: bool = False

    @property
    def head_name(self) -> str:
        """The task whose head answers this one."""
        return self.head or self.name

    @property
    def splits(self) -> tuple[str, ...]:
        """All that have labels."""
        training = () if self.hub_columns is None else ("train",)
        return (*training, *self.evaluation_splits)

    @property
    def is_regression(self) -> bool:
        """Whether the answer is a number rather than a class."""
        return self.score_range is not None

    @property
    def is_pair(self) -> bool:
        """Whether an example has two texts."""
        return self.layouts[0].second is not None

    @property
    def num_outputs(self) -> int:
        """Outputs of a classifier for this task: its classes, or one number."""
        return len(self.labels) or 1

    def metrics_of(self, split: str) -> tuple[str, ...]:
        """The metrics that an evaluation split gives.

        Raises:
          UsageError: If the task has no such split.
        """
        if split not in self.evaluation_splits:
            known = ", ".join(self.evaluation_splits)
            raise UsageError(
                f"{self.title} is scored on {known}. Got `split`={split}; name one."
            )
        if len(self.evaluation_splits) == 1:
            return self.metrics
        return (self.metrics[self.evaluation_splits.index(split)],)


_SENTENCE = Columns("sentence", None, "label")
_PAIR = Columns("sentence1", "sentence2", "label")
_SCORED_PAIR = Columns("sentence1", "sentence2", "score")

_GLUE = (
    Task(
        name="cola",
        title="CoLA",
        folder="CoLA",
        labels=("unacceptable", "acceptable"),
        layouts=(_SENTENCE,),
        hub_columns=_SENTENCE,
        header=("source", "label", "star", "sentence"),
        metrics=("matthews",),
    ),
    Task(
        name="sst2",
        title="SST-2",
        folder="SST-2",
        labels=("negative", "positive"),
        layouts=(_SENTENCE,),
        hub_columns=_SENTENCE,
        metrics=("accuracy",),
    ),
    Task(
        name="qqp",
        title="QQP",
        folder="QQP",
        labels=("not_duplicate", "duplicate"),
        layouts=(Columns("question1", "question2", "is_duplicate"), _PAIR),
        hub_columns=Columns("question1", "question2", "label"),
        metrics=("accuracy", "f1"),
        has_damaged_rows=True,
    ),
    Task(
        name="qnli",
        title="QNLI",
        folder="QNLI",
        labels=("entailment", "not_entailment"),
        layouts=(Columns("question", "sentence", "label"), _PAIR),
        hub_columns=Columns("question", "sentence", "label"),
        metrics=("accuracy",),
    ),
    Task(
        name="mnli",
        title="MNLI",
        folder="MNLI",
        labels=("entailment", "neutral", "contradiction"),
        layouts=(Columns("sentence1", "sentence2", "gold_label"), _PAIR),
        hub_columns=Columns("premise", "hypothesis", "label"),
        evaluation_splits=("dev_matched", "dev_mismatched"),
        metrics=("matched", "mismatched"),
    ),
    Task(
        name="rte",
        title="RTE",
        folder="RTE",
        labels=("entailment", "not_entailment"),
        layouts=(_PAIR,),
        hub_columns=_PAIR,
        metrics=("accuracy",),
    ),
    Task(
        name="stsb",
        title="STS-B",
        folder="STS-B",
        labels=(),
        score_range=(0.0, 5.0),
        layouts=(_SCORED_PAIR,),
        hub_columns=_PAIR,
        metrics=("pearson", "spearman"),
    ),
    Task(
        name="mrpc",
        title="MRPC",
        folder="MRPC",
        labels=("not_equivalent", "equivalent"),
        layouts=(Columns("#1 String", "#2 String", "Quality"), _PAIR),
        hub_columns=_PAIR,
        metrics=("accuracy", "f1"),
    ),
    Task(
        name="wnli",
        title="WNLI",
        folder="WNLI",
        labels=("not_entailment", "entailment"),
        layouts=(_PAIR,),
        hub_columns=_PAIR,
        metrics=("accuracy",),
    ),
)


def _rated_sentences(source: str, title: str) -> Task:
    return Task(
        name=f"sentiment-{source}",
        title=title,
        folder="sentiment",
        labels=("negative", "positive"),
        head="sst2",
        rating_range=(-4.0, 4.0),
        layouts=(Columns("sentence", None, "rating"),),
        hub_columns=None,
        evaluation_splits=(source,),
        metrics=("accuracy", "pearson"),
    )


_RATED = (
    _rated_sentences("amazon", "Amazon reviews"),
    _rated_sentences("nyt", "NYT editorials"),
)

GLUE_TASKS = tuple(task.name for task in _GLUE)
"""Names of GLUE's tasks, in the column order of the paper's Table 3."""

TASKS: Mapping[str, Task] = types.MappingProxyType(
    {task.name: task for task in (*_GLUE, *_RATED)}
)
"""All tasks by name, GLUE's first."""


def data_title(tasks: Iterable[Task]) -> str:
    """Names the data that some tasks are scored on, in a few words."""
    kinds = ("GLUE dev", "rated sentences")
    found = {kinds[task.rating_range is not None] for task in tasks}
    return " and ".join(kind for kind in kinds if kind in found)


def choose_tasks(names: Iterable[str]) -> tuple[Task, ...]:
    """The tasks of some names, in the order of the table, each once.

    Raises:
      UsageError: If a name is unknown, or there is none.
    """
    wanted = set(names)
    unknown = sorted(wanted - set(TASKS))
    if unknown or not wanted:
        raise UsageError(
            f"`--tasks` must name some of {', '.join(TASKS)}. "
            f"Got {', '.join(unknown) or 'none'}."
        )
    return tuple(task for name, task in TASKS.items() if name in wanted)


def label_key(name: str) -> str:
    """A label name as it is compared: `Not-Entailment` is `not_entailment`."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")
