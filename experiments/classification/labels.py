"""Which output of a classifier means which label of a task.

A head's order is its own business: MNLI classifiers come in all six. Scoring outputs
by position would give a plausible, wrong number, so order is always taken from names.
"""

import dataclasses
import re

from experiments.classification.tasks import Task, label_key
from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.models import ClassifierConfig
from kashin_jax.models.bert import REGRESSION, SINGLE_LABEL

__all__ = ["output_order", "with_task_labels"]

_GENERIC = re.compile(r"(label_?)?\d+")


def output_order(
    task: Task, id2label: tuple[str, ...], stated: tuple[str, ...] = ()
) -> tuple[int, ...]:
    """The output of the classifier that belongs to each label of the task.

    `outputs[:, list(order)]` has its columns in the order of `task.labels`. Names are
    compared in lower case, with spaces and hyphens as underscores.

    Args:
      task: What is scored.
      id2label: The checkpoint's name of each output.
      stated: The value of `--labels`: the task's label names in the order of the
        classifier's outputs, or `("task",)` for the order of `task.labels`. Needed
        where the checkpoint has only generic names such as `LABEL_0`.

    Returns:
      One index for each label; `(0,)` for a regression.

    Raises:
      CheckpointError: If the head has another number of outputs, or its names are
        generic or not those of the task.
      UsageError: If `stated` is not an order of the task's labels, or contradicts
        names that the checkpoint does have.
    """
    _check_head(task, id2label)
    if task.is_regression:
        if stated not in ((), ("task",)):
            raise UsageError(
                f"`--labels` names classes and {task.title} has none; leave it out."
            )
        return (0,)
    own = tuple(map(label_key, id2label))
    generic = any(_GENERIC.fullmatch(name) for name in own)
    if not stated:
        if generic:
            raise CheckpointError(_generic_message(task, id2label))
        return _order(task, own, id2label)
    keys = task.labels if stated == ("task",) else tuple(map(label_key, stated))
    if sorted(keys) != sorted(task.labels):
        raise UsageError(
            f"`--labels`={','.join(stated)} must hold each label of {task.title} once, "
            f"in the order of the classifier's outputs: {','.join(task.labels)}; or "
            "say `task` for exactly that order."
        )
    order = tuple(map(keys.index, task.labels))
    if not generic and order != _order(task, own, id2label):
        raise UsageError(
            f"`--labels`={','.join(stated)} contradicts the checkpoint, whose outputs "
            f"are {', '.join(id2label)}; leave `--labels` out, or correct `id2label` "
            "in its `config.json`."
        )
    return order


def with_task_labels(
    config: ClassifierConfig, task: Task, order: tuple[int, ...]
) -> ClassifierConfig:
    """The configuration with the task's own names of the outputs, which stay in place.

    What is written from it needs no `--labels` any more.

    Args:
      config: Of a head that may spell the labels in a way of its own, or not at all.
      task: What the head is for.
      order: From `output_order`.
    """
    names = tuple(task.labels[order.index(i)] for i in range(len(task.labels)))
    return dataclasses.replace(
        config,
        id2label=names or config.id2label,
        problem_type=REGRESSION if task.is_regression else SINGLE_LABEL,
    )


def _check_head(task: Task, id2label: tuple[str, ...]) -> None:
    if len(id2label) == task.num_outputs:
        return
    wanted = (
        "one output (a regression)"
        if task.is_regression
        else f"{task.num_outputs} outputs ({', '.join(task.labels)})"
    )
    has = (
        "one output, as for a regression"
        if len(id2label) == 1
        else f"{len(id2label)} outputs ({', '.join(id2label)})"
    )
    raise CheckpointError(
        f"{task.title} needs a head with {wanted}, and this classifier has {has}; "
        "name one fine-tuned for this task."
    )


def _generic_message(task: Task, id2label: tuple[str, ...]) -> str:
    return (
        f"The checkpoint names its outputs {', '.join(id2label)}, which does not say "
        f"what they mean for {task.title}; state their order, as in "
        f"`--labels={','.join(task.labels)}`, or `--labels=task` if it is that one."
    )


def _order(
    task: Task, own: tuple[str, ...], id2label: tuple[str, ...]
) -> tuple[int, ...]:
    if sorted(own) != sorted(task.labels):
        raise CheckpointError(
            f"The checkpoint's outputs are {', '.join(id2label)}, the labels of "
            f"{task.title} are {', '.join(task.labels)}; name a classifier fine-tuned "
            "for this task, or correct `id2label` in its `config.json`."
        )
    return tuple(map(own.index, task.labels))
