"""Which tasks a table has, and the classifier of each of them."""

import math
from collections.abc import Sequence
from pathlib import Path

from experiments.classification.data import EMBEDDED, has_files
from experiments.classification.evaluation import load_evaluation_sets
from experiments.classification.labels import output_order
from experiments.classification.quantized import load_classifier_packed
from experiments.classification.rows import TaskBench
from experiments.classification.tasks import GLUE_TASKS, TASKS, Task, choose_tasks
from experiments.common.checkpoints import (
    checkpoint_sha256,
    dense_directory,
    is_quantized,
)
from experiments.common.corpora import check_data_dir
from experiments.common.tables import Record
from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.io import checkpoint_directory, read_json
from kashin_jax.models import LoadedClassifier, head_names, load_classifier
from kashin_jax.pipeline import inspect_checkpoint

__all__ = ["load_task_bench", "resolve_tasks"]

_PLACEHOLDER = "{task}"
_INSTEAD = (
    "`experiments.glue` scores it, `experiments.finetune_glue --quantized=` refines it."
)


def resolve_tasks(
    model: str, names: Sequence[str], data_dir: Path | None
) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
    """The tasks of a table, and those that the model knows but nobody has data for.

    Args:
      model: The value of `--model`.
      names: The value of `--tasks`. When empty, GLUE's tasks that the model knows and
        `data_dir` has: the heads of a checkpoint that has several; the task that
        `finetuning_task` names in `config.json`; or, where `{task}` stands in `model`,
        the tasks whose directory exists. Without a `data_dir`, the embedded tasks that
        one of those heads answers.
      data_dir: The value of `--data_dir`.

    Raises:
      UsageError: If a task is unknown, or none is named and none can be derived.
      CheckpointError: If the model cannot be found.
      DataError: If `data_dir` is not a folder.
    """
    check_data_dir(data_dir)
    if names:
        return choose_tasks(names), ()
    known = _tasks_of(model)
    if not known:
        raise UsageError(
            f"`--tasks` is needed: `--model={model}` does not say which task it is "
            f"for. Choose from {', '.join(TASKS)}."
        )
    at_hand = _at_hand(known, data_dir)
    if not at_hand and len(known) == 1:
        return choose_tasks(known), ()
    if not at_hand:
        raise UsageError(
            f"None of {', '.join(known)} has data at hand; give `--data_dir`, or "
            "`--tasks` to have it fetched."
        )
    rest = [name for name in known if name not in at_hand]
    return choose_tasks(at_hand), choose_tasks(rest) if rest else ()


def _tasks_of(model: str) -> list[str]:
    if _PLACEHOLDER in model:
        return [
            name
            for name in GLUE_TASKS
            if Path(model.replace(_PLACEHOLDER, name)).expanduser().is_dir()
        ]
    if heads := head_names(model):
        return [name for name in GLUE_TASKS if name in heads]
    content = read_json(checkpoint_directory(model) / "config.json")
    task = str(content.get("finetuning_task", "")).lower().replace("-", "")
    return [task] if task in GLUE_TASKS else []


def _at_hand(known: Sequence[str], data_dir: Path | None) -> list[str]:
    """The tasks of a table: those with data, among what heads of these names answer."""
    # A folder of GLUE asks for GLUE: no other task stands in for what it lacks.
    folder = EMBEDDED if data_dir is None else data_dir
    own = [name for name in known if has_files(TASKS[name], folder)]
    return own or [
        name
        for name, task in TASKS.items()
        if task.head in known and has_files(task, folder)
    ]


def load_task_bench(
    task: Task,
    model: str,
    *,
    labels: tuple[str, ...],
    data_dir: Path | None,
    max_length: int,
    tokens_per_batch: int,
    takes_quantized: bool = False,
) -> TaskBench:
    """Loads the classifier of a task, checks its head, and reads the task's data.

    One that is quantized already is decoded, or refused unless `takes_quantized`.

    Raises:
      CheckpointError: If the checkpoint cannot be used, or its head is not one for the
        task.
      UsageError: If a flag does not fit the model.
      DataError: If the data cannot be used.
    """
    path = model.replace(_PLACEHOLDER, task.head_name)
    if not takes_quantized:
        dense_directory(path, instead=_INSTEAD)
    heads = head_names(path)
    if heads and task.head_name not in heads:
        raise CheckpointError(
            f"`--model={path}` has no head for {task.title}; its heads are "
            f"{', '.join(heads)}."
        )
    loaded, stored = _loaded(path, task.head_name if heads else None)
    if loaded.config.is_regression != task.is_regression:
        kind = "a regression" if loaded.config.is_regression else "classes"
        raise CheckpointError(
            f"`--model={path}` has a head for {kind}, which {task.title} is not; name "
            "a classifier fine-tuned for this task."
        )
    return TaskBench(
        task=task,
        loaded=loaded,
        order=output_order(task, loaded.config.id2label, labels),
        sets=load_evaluation_sets(
            task, loaded, data_dir=data_dir, max_length=max_length,
            tokens_per_batch=tokens_per_batch,
        ),
        weights_sha256=checkpoint_sha256(loaded.directory),
        stored=stored,
    )  # fmt: skip


def _loaded(path: str, head: str | None) -> tuple[LoadedClassifier, Record | None]:
    """A classifier with dense layers and, if it was quantized, what it stores."""
    if not is_quantized(path):
        return load_classifier(path, head=head), None
    found = load_classifier_packed(path, head)
    inside = inspect_checkpoint(found.loaded.directory, verify=False)
    bits = sum(row.bits_per_weight * math.prod(row.shape) for row in inside.tensors)
    method, width = found.described["method"], found.described["bits"]
    stored = {
        "stored_bits_per_weight": inside.bits_per_weight,
        "model_bits_per_weight": bits / inside.weights,
        "note": f"Quantized already by {method} at {width} bits; decoded, and computed "
        "in float32.",
    }
    return found.decoded(), stored
