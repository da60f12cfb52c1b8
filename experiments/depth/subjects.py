"""The models that are quantized, and how each metric is taken of them."""

import hashlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from experiments.classification.rows import (
    GlueBench,
    quantized_records,
    unchanged_records,
)
from experiments.classification.tasks import data_title
from experiments.common.layer_store import LayerStore
from experiments.common.methods import METHODS
from experiments.common.perplexity import Bench, full_precision_row, quantized_row
from experiments.common.results import environment_fields
from experiments.common.tables import Record
from experiments.depth.points import METHOD, Point
from kashin_jax.models.classifier_loading import LoadedClassifier
from kashin_jax.models.loading import LoadedModel

__all__ = ["Subject", "glue_subject", "language_subject"]

# Fields of a record, for a setting, or None for full precision.
Scorer = Callable[[Point | None], dict[str, Any]]


class Subject(NamedTuple):
    """A model, or several that are scored together.

    Attributes:
      identity: Fields of a record that say what is scored on what, with what.
      store: Finished layers.
      checkpoints: Every one whose layers are quantized.
      has_error: Whether the error of its weights is a metric, too.
      scorers: By metric.
    """

    identity: Record
    store: LayerStore
    checkpoints: tuple[LoadedModel | LoadedClassifier, ...]
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
        identity, bench.store, (bench.loaded,), "error" in metrics, scorers
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
        identity, bench.store, tuple(checkpoints.values()), False,
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
