"""Settings of the paper's method, what they are tried on, and what comes of each.

`experiments.depth` has the flags and presents what `measure` finds.
"""

import hashlib
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from tqdm import tqdm

from experiments.classification.rows import (
    GlueBench,
    quantized_records,
    unchanged_records,
)
from experiments.classification.tasks import data_title
from experiments.common.methods import METHODS
from experiments.common.perplexity import Bench, full_precision_row, quantized_row
from experiments.common.quantized_layers import (
    loss_fields,
    quantized_copy,
    remove_copies,
)
from experiments.common.results import environment_fields
from experiments.common.resumable import FinishedRecords
from experiments.common.tables import Record
from experiments.depth_curves import METRICS, RTOL, STEPS
from kashin_jax import BasisSpec, Rules, stored_bits
from kashin_jax.methods import Method
from kashin_jax.models import LoadedClassifier
from kashin_jax.models.loading import LoadedModel

__all__ = [
    "METHOD",
    "Point",
    "Subject",
    "glue_subject",
    "grid",
    "language_subject",
    "measure",
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
    def choices(self) -> dict[str, Any]:
        """What functions that measure a row ask for."""
        return {k: value for k, value in self._asdict().items() if k != "axis"}

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
        row = quantized_row(bench, METHOD, METHODS[METHOD], **point.choices)
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
        records = quantized_records(bench, METHOD, METHODS[METHOD], **point.choices)
    tasks: dict[str, dict[str, float]] = {}
    for record in records:
        tasks.setdefault(record["task"], {})[record["metric"]] = record["value"]
    means = [statistics.fmean(metrics.values()) for metrics in tasks.values()]
    return {"value": statistics.fmean(means), "scores": tasks}


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
