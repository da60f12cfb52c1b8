"""Metrics on a task's evaluation splits, on the way and at the end."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax

from experiments.classification.evaluation import (
    EvaluationSet,
    classifier_outputs,
    score,
)
from experiments.classification.tasks import Task
from experiments.finetuning.model import Start
from experiments.train.step import Params

__all__ = ["Evaluate", "make_evaluator"]

# From parameters to metrics in percent.
Evaluate: TypeAlias = Callable[[Params], dict[str, float]]


def make_evaluator(start: Start, task: Task, sets: Sequence[EvaluationSet]) -> Evaluate:
    """Prepares the measurement that `experiments.glue` makes at full precision.

    Args:
      start: Puts models together and says which output is which label.
      task: What is scored.
      sets: Its splits.

    Returns:
      A function of the parameters that gives what `glue_metrics` does.
    """

    def evaluate(params: Params) -> dict[str, float]:
        model = start.evaluation(params, start.frozen)
        with jax.default_matmul_precision("highest"):
            outputs = [classifier_outputs(model, one, start.order) for one in sets]
        return score(task, sets, outputs)

    return evaluate
