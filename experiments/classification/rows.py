"""Rows of a table of tasks: quantize, score all tasks, count bits, one method each."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from experiments.classification.evaluation import (
    EvaluationSet,
    classifier_outputs,
    score,
)
from experiments.classification.labels import with_task_labels
from experiments.classification.metrics import flip_rate, log_loss
from experiments.classification.quantized import save_quantized
from experiments.classification.tasks import Task
from experiments.common.calibration import NamedCalibration
from experiments.common.flags import file_stem
from experiments.common.methods import AS_STORED, FULL_PRECISION, RowKind, Width
from experiments.common.published import published_glue
from experiments.common.quantized_layers import (
    decoded_kernels,
    loss_fields,
    quantized_copy,
    size_fields,
    stored_width,
    unconverged,
)
from experiments.common.resumable import FinishedRecords, remembered
from experiments.common.tables import Record
from kashin_jax import BasisSpec, Rules
from kashin_jax.errors import NonFiniteError
from kashin_jax.methods import Method
from kashin_jax.models import LoadedClassifier, SequenceClassifier
from kashin_jax.pipeline import Calibration, replace_kernels
from kashin_jax.tensors import QuantizedTensor

__all__ = [
    "GlueBench",
    "TaskBench",
    "quantized_records",
    "save_row",
    "saved_name",
    "unchanged_records",
]


def saved_name(task: Task, row: Record) -> str:
    """The directory of a saved row: head, method, width, and what else tells it."""
    parts = [task.head_name, row["method"], f"{row['bits']}bit"]
    for name, label in (("basis", ""), ("seed", "seed")):
        if row[name] is not None:
            parts.append(f"{label}{row[name]}")
    if row.get("calibration") is not None:
        parts += [row["calibration"], f"{row['calibration_tokens']}tokens"]
    return file_stem(parts)


def save_row(
    directory: Path,
    task: Task,
    loaded: LoadedClassifier,
    order: tuple[int, ...],
    tensors: Mapping[str, QuantizedTensor],
    row: Record,
    rules: Rules,
) -> None:
    """Writes the quantized classifier of a row, as `save_quantized` does.

    Args:
      directory: Receives a directory of the row's own, see `saved_name`.
      task: What the classifier is for.
      loaded: The classifier in full precision.
      order: Its output for each label of the task, whose names are written.
      tensors: Its packed matrices.
      row: Describes them.
      rules: What they were made by.
    """
    save_quantized(
        directory / saved_name(task, row),
        loaded.model,
        tensors,
        with_task_labels(loaded.config, task, order),
        tokenizer=loaded.directory,
        rules=rules,
        seed=row["seed"] or 0,
        dtype=loaded.stored_dtype,
        extra={"finetuning_task": task.head_name},
    )


# Every record has every field, so that a reader of the file needs no special cases.
_ABSENT = dict.fromkeys((
    "stored_bits_per_weight", "model_bits_per_weight", "task", "metric", "value",
    "seed", "basis", "examples", "truncated", "flip_rate", "log_loss",
    "relative_error", "converged_share", "quantize_seconds", "published",
    "data_source", "data_sha256", "weights_sha256", "rtol", "max_steps",
))  # fmt: skip


class TaskBench(NamedTuple):
    """One task and the classifier that is scored on it.

    Attributes:
      task: What is scored.
      loaded: The classifier, decoded if it was quantized.
      order: Its output for each label of the task.
      sets: The evaluation splits.
      weights_sha256: Of the checkpoint.
      stored: Of a quantized checkpoint: its stored bits, as fields of a record, and a
        note; None in full precision.
    """

    task: Task
    loaded: LoadedClassifier
    order: tuple[int, ...]
    sets: tuple[EvaluationSet, ...]
    weights_sha256: str
    stored: Record | None = None

    def shares_head(self, other: "TaskBench") -> bool:
        """Whether both are answered by one head."""
        return self.task.head_name == other.task.head_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlueBench:
    """What all rows of one table share.

    Attributes:
      tasks: In the order of the columns.
      work: Directory for unfinished work; it must exist.
      identity: Fields that every record has: model, greatest length, versions, device.
      save: Where quantized classifiers are kept, one directory each; None keeps none.
      finished: Rows that are not made again, unless they are saved; None makes all.
      calibrations: Examples of calibrated rows, by name of the task; none where there
        are no such rows.
    """

    tasks: tuple[TaskBench, ...]
    work: Path
    identity: Record
    save: Path | None = None
    finished: FinishedRecords | None = None
    calibrations: Mapping[str, NamedCalibration] = dataclasses.field(
        default_factory=dict
    )

    def calibration_fields(self, task: Task, method: RowKind | None) -> dict[str, Any]:
        """What a record says of its calibration; nothing where there is none."""
        if method is None or not method.is_calibrated:
            return {}
        return self.calibrations[task.name].record_fields(method)

    @property
    def is_quantized(self) -> bool:
        """Whether a classifier is scored as it is stored, so that no row is added."""
        return any(one.stored is not None for one in self.tasks)

    def known(
        self, choices: Record, method: RowKind | None = None
    ) -> list[dict[str, Any]]:
        """The finished row of these choices, if all of its records are there."""
        if self.finished is None or self.save is not None:
            return []
        found = []
        for one in self.tasks:
            data = ", ".join(each.sha256 for each in one.sets)
            of_task = {
                **self.identity, **choices, "task": one.task.name,
                "data_sha256": data, "weights_sha256": one.weights_sha256,
                **self.calibration_fields(one.task, method),
            }  # fmt: skip
            for metric in one.task.metrics:
                found.append(self.finished.find({**of_task, "metric": metric}))
        return [each[0] for each in found] if all(found) else []

    def keep(self, row: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Remembers the records of a finished row and gives them back."""
        if self.finished is not None:
            self.finished.add(*row)
        return row

    def outputs(
        self, bench: TaskBench, computation: Record, model: SequenceClassifier
    ) -> list[Float[np.ndarray, "n k"]]:
        """What the model that `computation` describes answers; resumes by splits."""
        label = f"{bench.task.title}, {computation['label']}"
        return [
            remembered(
                self.work,
                {
                    **self.identity,
                    **computation,
                    "weights_sha256": bench.weights_sha256,
                    "task": bench.task.name,
                    "order": bench.order,
                    "split": one.split,
                    "data_sha256": one.sha256,
                },
                (len(one.labels), bench.task.num_outputs),
                lambda one=one: classifier_outputs(  # type: ignore[misc]
                    model, one, bench.order, progress=label
                ),
            )
            for one in bench.sets
        ]


def _records(
    bench: GlueBench,
    one: TaskBench,
    row: Record,
    computation: Record,
    model: SequenceClassifier,
    reference: SequenceClassifier | None,
) -> Iterator[dict[str, Any]]:
    outputs = bench.outputs(one, computation, model)
    flips = None
    if reference is not None and not one.task.is_regression:
        usual = bench.outputs(one, _FULL, reference)
        flips = flip_rate(one.task, np.concatenate(outputs), np.concatenate(usual))
    labels = np.concatenate([s.labels for s in one.sets])
    loss = log_loss(one.task, np.concatenate(outputs), labels)
    metrics = score(one.task, one.sets, outputs)
    for metric, value in metrics.items():
        yield {
            **row,
            "task": one.task.name,
            "metric": metric,
            "value": value,
            "examples": sum(len(s.labels) for s in one.sets),
            "truncated": sum(s.num_truncated for s in one.sets),
            "flip_rate": flips,
            "log_loss": loss,
            "published": published_glue(
                one.loaded.config, row["method"], row["bits"], one.task.name, metric
            ),
            "data_source": ", ".join(s.source for s in one.sets),
            "data_sha256": ", ".join(s.sha256 for s in one.sets),
            "weights_sha256": one.weights_sha256,
        }


_FULL: Record = {"label": FULL_PRECISION, "config": None}
_ONCE = " Deterministic: run once."


class _Prepared(NamedTuple):
    # A checkpoint after quantizing: fields of its records, decoded and packed matrices,
    # and what they were made by.
    fields: Record
    kernels: dict[str, Array]
    tensors: dict[str, QuantizedTensor]
    rules: Rules


def unchanged_records(bench: GlueBench) -> list[dict[str, Any]]:
    """The row of the model itself, a record for each metric.

    All others are compared with it; of a quantized checkpoint it is the only one.
    """
    first = _itself(bench.tasks[0])
    if known := bench.known({"method": first["method"], "bits": first["bits"]}):
        return known
    records: list[dict[str, Any]] = []
    for one in bench.tasks:
        fields = dict.fromkeys(("method", "bits"))
        row = {**fields, **_ABSENT, **_itself(one), **bench.identity}
        records += _records(bench, one, row, _FULL, one.loaded.model, None)
    return bench.keep(records)


def _itself(one: TaskBench) -> Record:
    if one.stored is not None:
        return {"method": AS_STORED, "bits": None, **one.stored}
    bits = stored_width(one.loaded.stored_dtype)
    return {
        "method": FULL_PRECISION,
        "bits": bits,
        "stored_bits_per_weight": float(bits),
        "model_bits_per_weight": float(bits),
        "note": f"{one.loaded.stored_dtype} checkpoint, computed in float32.",
    }


def quantized_records(
    bench: GlueBench,
    name: str,
    method: RowKind,
    *,
    bits: Width,
    basis: BasisSpec,
    seed: int,
    rtol: float,
    max_steps: int,
) -> list[dict[str, Any]]:
    """One row; a method that does not exist at this width is one record without value.

    Checkpoints that are shared by several tasks are quantized once, or once for each of
    the calibrations that these have.

    Raises:
      ValueError: If a layer cannot be quantized; the message names its path.
    """
    choices = {
        "method": name,
        "bits": bits,
        **method.choices(basis, seed, rtol, max_steps),
    }
    if known := bench.known(choices, method):
        return known
    first = dict.fromkeys(("method", "bits"))
    row = {**first, **_ABSENT, **choices, **bench.identity}
    label = f"{name}, {bits} bits"
    try:
        config = method.make(bits, basis, rtol, max_steps)
    except ValueError as reason:
        return [{**row, "note": str(reason)}]
    try:
        prepared = _prepared(bench, config, seed, method)
    except NonFiniteError as reason:
        # The checkpoint is finite, so it is this method whose scales overflow.
        return [{**row, "note": str(reason)}]
    row["note"] = method.note + ("" if method.is_random else _ONCE)
    computation = {"label": label, "config": repr(config), "seed": row["seed"]}
    return bench.keep(
        [
            record
            for one in bench.tasks
            for record in _scored(
                bench,
                one,
                prepared[one.task.name],
                {**row, **bench.calibration_fields(one.task, method)},
                {**computation, **bench.calibration_fields(one.task, method)},
            )
        ]
    )


def _scored(
    bench: GlueBench,
    one: TaskBench,
    prepared: _Prepared,
    row: Record,
    computation: Record,
) -> Iterator[dict[str, Any]]:
    loaded, row = one.loaded, {**row, **prepared.fields}
    model = replace_kernels(loaded.model, prepared.kernels)
    # Tasks that share a head share its classifier: it is written once.
    answered = [other for other in bench.tasks if other.shares_head(one)]
    if bench.save is not None and answered[0] is one:
        save_row(
            bench.save, one.task, loaded, one.order, prepared.tensors, row,
            prepared.rules,
        )  # fmt: skip
    return _records(bench, one, row, computation, model, loaded.model)


def _prepared(
    bench: GlueBench, config: Method, seed: int, method: RowKind
) -> dict[str, _Prepared]:
    """The quantized checkpoint of every task, by its name."""
    prepared: dict[str, _Prepared] = {}
    known: dict[tuple[str, str | None], _Prepared] = {}
    for one in bench.tasks:
        calibration = None
        if method.is_calibrated:
            calibration = bench.calibrations[one.task.name].draw(method, seed)
        digest = None if calibration is None else calibration.digest
        choice = one.weights_sha256, digest
        if choice not in known:
            known[choice] = _quantized(bench, one, config, seed, method, calibration)
        prepared[one.task.name] = known[choice]
    return prepared


def _quantized(
    bench: GlueBench,
    one: TaskBench,
    config: Method,
    seed: int,
    method: RowKind,
    calibration: Calibration | None,
) -> _Prepared:
    layers = quantized_copy(
        one.loaded, Rules(config=config), seed, bench.work, one.weights_sha256,
        calibration,
    ).layers  # fmt: skip
    width = stored_width(one.loaded.stored_dtype)
    kept = unconverged(layers) if method.keeps_failures else frozenset()
    fields = size_fields(one.loaded.model, width, layers, kept)
    coded = {path: layer for path, layer in layers.items() if path not in kept}
    skipped = [f"^{re.escape(path)}$" for path in sorted(kept)]
    return _Prepared(
        {**fields, **loss_fields(layers, kept)},
        decoded_kernels(coded),
        {path: layer.tensor for path, layer in coded.items()},
        Rules(config=config, skip=skipped),
    )
