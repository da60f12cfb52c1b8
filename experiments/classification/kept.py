"""What a GLUE table keeps: outputs of finished splits, quantized classifiers."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from experiments.classification.labels import with_task_labels
from experiments.classification.quantized import save_quantized
from experiments.classification.tasks import Task
from experiments.common.flags import file_stem
from experiments.common.results import atomic_path, to_json
from experiments.common.tables import Record
from kashin_jax import Rules
from kashin_jax.models.classifier_loading import LoadedClassifier
from kashin_jax.tensors import QuantizedTensor

__all__ = ["remembered", "save_row", "saved_name"]


def remembered(
    directory: Path,
    fingerprint: Record,
    shape: tuple[int, ...],
    compute: Callable[[], np.ndarray],
) -> np.ndarray:
    """Reads an array if it is finished; else computes and keeps it.

    Args:
      directory: Where the files are; it must exist.
      fingerprint: Everything that the array depends on; names the file.
      shape: Of the array.
      compute: Makes it.
    """
    digest = hashlib.sha256(to_json(fingerprint).encode()).hexdigest()[:32]
    path = directory / f"{digest}.npy"
    if path.exists():
        try:
            found = np.load(path, allow_pickle=False)
        # What a damaged header raises depends on the version of Python.
        except Exception:
            # By a full disk, say: computed again and replaced.
            found = np.zeros(())
        if found.shape == shape:
            return found
    outputs = compute()
    with atomic_path(path) as temporary:
        np.save(temporary, outputs, allow_pickle=False)
    return outputs


def saved_name(task: Task, row: Record) -> str:
    """The directory of a saved row: head, method, width, and what else tells it."""
    parts = [task.head_name, row["method"], f"{row['bits']}bit"]
    for name, label in (("basis", ""), ("seed", "seed")):
        if row[name] is not None:
            parts.append(f"{label}{row[name]}")
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
