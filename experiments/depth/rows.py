"""Records of the depth study, one per metric and setting, none computed twice."""

import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from experiments.common.quantized_layers import loss_fields, quantize_layers
from experiments.common.results import append_jsonl, read_jsonl
from experiments.common.tables import Record
from experiments.depth.points import Point
from experiments.depth.subjects import Subject
from experiments.depth_curves import METRICS
from kashin_jax import stored_bits
from kashin_jax.pipeline import selected_kernels

__all__ = ["measure"]

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
    path = work / "records.jsonl"
    finished = read_jsonl(path)
    records = []
    bar = tqdm([None, *points], desc="settings", unit="setting", disable=None)
    for point in bar:
        fresh = False
        of_point = []
        for subject in subjects:
            for record, is_new in _of_subject(subject, point, finished):
                if is_new:
                    append_jsonl(path, record)
                    fresh = True
                of_point.append(record)
        if fresh:
            tqdm.write(_sentence(point, of_point), file=sys.stderr)
            for file in work.glob("*.safetensors"):
                file.unlink()
        records += of_point
    return records


def _of_subject(
    subject: Subject, point: Point | None, finished: Sequence[Record]
) -> Iterator[tuple[dict[str, Any], bool]]:
    """The records of one model at one setting, and whether they are new."""
    metrics = list(subject.scorers)
    if subject.has_error and point is not None:
        metrics.insert(0, ERROR)
    lost: Record | None = None
    for metric in metrics:
        key = {"metric": metric, **_setting(point), **subject.identity}
        known = next((r for r in finished if r.items() >= key.items()), None)
        if known is not None:
            yield dict(known), False
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
        for number, loaded in enumerate(subject.checkpoints)
        for path, layer in quantize_layers(
            subject.store, selected_kernels(loaded.model), point.config,
            jax.random.key(point.seed), point.label,
        ).items()
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
        **loss_fields(point.config, layers),
    }


def _sentence(point: Point | None, records: Sequence[Record]) -> str:
    values = [
        f"{METRICS[r['metric']].name} {METRICS[r['metric']].show(r['value'])}"
        for r in records
    ]
    label = "full precision" if point is None else point.label
    return f"{label}: {', '.join(values)}"
