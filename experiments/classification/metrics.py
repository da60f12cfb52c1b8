"""Metrics of tasks, in percent as the paper's Table 3 prints them.

| metric | tasks | definition |
|---|---|---|
| `accuracy`, `matched`, `mismatched` | all classes | share of right predictions |
| `f1` | MRPC, QQP | of class 1; 0 where there is neither a hit nor a miss |
| `matthews` | CoLA | 0 where predictions or labels are constant |
| `pearson`, `spearman` | STS-B | 0 where predictions or labels are constant |
| `pearson` | rated sentences | of the output for positive less that for negative |

A constant prediction has no correlation; 0 is what a model that knows nothing scores on
average, and what scikit-learn says for the Matthews coefficient in that case.
"""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float, Float64, Int, Int32, Num

from experiments.classification.tasks import Task
from kashin_jax.errors import NonFiniteError

__all__ = ["class_labels", "flip_rate", "glue_metrics", "log_loss", "predictions"]


def predictions(
    task: Task, outputs: Float[np.ndarray, "n k"]
) -> Int32[np.ndarray, " n"] | Float64[np.ndarray, " n"]:
    """Classes, by the largest output (the first of equals), or scores.

    Args:
      task: What was asked.
      outputs: Logits in the order of `task.labels`, or one column of scores.

    Raises:
      NonFiniteError: If an output is NaN or infinite.
      ValueError: If there is not one column for each label.
    """
    if outputs.shape[1] != task.num_outputs:
        raise ValueError(
            f"`outputs` must have {task.num_outputs} columns for {task.title}. "
            f"Got {outputs.shape[1]}; select them by `output_order`."
        )
    finite = np.isfinite(outputs).all(axis=1)
    if not finite.all():
        raise NonFiniteError(
            f"The model's output for example {int(np.argmin(finite))} of {task.title} "
            "is not finite; check the weights, or compute in float32."
        )
    if task.is_regression:
        return outputs[:, 0].astype(np.float64)
    return outputs.argmax(axis=1).astype(np.int32)


def class_labels(task: Task, labels: Num[np.ndarray, " n"]) -> Num[np.ndarray, " n"]:
    """The classes that ratings stand for; other labels as they are."""
    return labels if task.rating_range is None else (labels > 0).astype(np.int32)


def glue_metrics(
    task: Task,
    outputs: Float[np.ndarray, "n k"],
    labels: Num[np.ndarray, " n"],
    *,
    split: str | None = None,
) -> dict[str, float]:
    """The metrics of a task on one split.

    Args:
      task: What was asked.
      outputs: As in `predictions`.
      labels: As in `Examples.labels`.
      split: The evaluation split the outputs are for; None is the task's first. MNLI
        has two, whose accuracies are called `matched` and `mismatched`.

    Returns:
      Name to percent, in the order of `task.metrics`.

    Raises:
      NonFiniteError: If an output is NaN or infinite.
      UsageError: If the task has no such split.
      ValueError: If the shapes do not fit, or there is no example.
    """
    if not 0 < len(labels) == len(outputs):
        raise ValueError(
            f"`outputs` and `labels` must be as long as each other and not empty. "
            f"Got {len(outputs)} and {len(labels)}."
        )
    answers = class_labels(task, labels), predictions(task, outputs)
    rated = labels, answers[1]
    if task.rating_range is not None:
        # How sure the head is: finer than the class, and no threshold moves it.
        rated = labels, np.diff(outputs.astype(np.float64))[:, 0]
    names = task.metrics_of(split or task.evaluation_splits[0])
    return {
        name: 100.0 * float(_METRICS[name](*(rated if name in _RATED else answers)))
        for name in names
    }


def flip_rate(
    task: Task,
    outputs: Float[np.ndarray, "n k"],
    reference: Float[np.ndarray, "n k"],
) -> float | None:
    """Share (0 to 1) of examples whose predicted class differs from the reference's.

    Returns:
      None for a regression, which predicts no class.

    Raises:
      NonFiniteError: If an output is NaN or infinite.
      ValueError: If the shapes do not fit.
    """
    if outputs.shape != reference.shape:
        raise ValueError(
            "`outputs` and `reference` must have one shape. "
            f"Got {outputs.shape} and {reference.shape}."
        )
    ours, theirs = predictions(task, outputs), predictions(task, reference)
    return None if task.is_regression else float(np.mean(ours != theirs))


def log_loss(
    task: Task, outputs: Float[np.ndarray, "n k"], labels: Num[np.ndarray, " n"]
) -> float | None:
    """Mean negative log likelihood of the labels in nats, which no threshold moves.

    Returns:
      None for a regression.

    Raises:
      NonFiniteError: If an output is NaN or infinite.
    """
    from scipy.special import log_softmax

    predicted = predictions(task, outputs)
    if task.is_regression:
        return None
    logs = log_softmax(outputs.astype(np.float64), axis=1)
    return float(-logs[np.arange(len(predicted)), class_labels(task, labels)].mean())


def _accuracy(labels: Int[np.ndarray, " n"], predicted: Int[np.ndarray, " n"]) -> float:
    from sklearn.metrics import accuracy_score

    return accuracy_score(labels, predicted)


def _f1(labels: Int[np.ndarray, " n"], predicted: Int[np.ndarray, " n"]) -> float:
    from sklearn.metrics import f1_score

    return f1_score(labels, predicted, pos_label=1, zero_division=0.0)


def _matthews(labels: Int[np.ndarray, " n"], predicted: Int[np.ndarray, " n"]) -> float:
    from sklearn.metrics import matthews_corrcoef

    constant = _is_constant(labels) or _is_constant(predicted)
    return 0.0 if constant else matthews_corrcoef(labels, predicted)


def _pearson(
    labels: Float[np.ndarray, " n"], predicted: Float[np.ndarray, " n"]
) -> float:
    from scipy.stats import pearsonr

    constant = _is_constant(labels) or _is_constant(predicted)
    return 0.0 if constant else pearsonr(_float64(labels), predicted).statistic


def _spearman(
    labels: Float[np.ndarray, " n"], predicted: Float[np.ndarray, " n"]
) -> float:
    from scipy.stats import spearmanr

    constant = _is_constant(labels) or _is_constant(predicted)
    return 0.0 if constant else spearmanr(_float64(labels), predicted).statistic


def _float64(values: Num[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    return values.astype(np.float64)


def _is_constant(values: Num[np.ndarray, " n"]) -> bool:
    # Neighbouring float32 differ by 6e-8 of their size: closer is rounding of float64,
    # for which SciPy warns that a correlation means nothing.
    spread = np.ptp(_float64(values))
    return bool(spread <= 1e-9 * np.abs(_float64(values)).max())


_RATED = frozenset({"pearson", "spearman"})
_METRICS: Mapping[str, Callable[..., float]] = {
    "accuracy": _accuracy,
    "matched": _accuracy,
    "mismatched": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}
