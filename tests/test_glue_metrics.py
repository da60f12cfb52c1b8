"""GLUE's metrics against cases worked by hand, in percent."""

import math

import numpy as np
import pytest

from experiments.classification.metrics import (
    flip_rate,
    glue_metrics,
    log_loss,
    predictions,
)
from experiments.classification.tasks import TASKS
from kashin_jax.errors import NonFiniteError, UsageError


def choosing(*classes, count=2):
    """Outputs whose largest column is the given class."""
    return np.eye(count, dtype=np.float32)[list(classes)] * 3 - 1


def scores(*values):
    return np.asarray(values, np.float32)[:, None]


def classes(*values):
    return np.asarray(values, np.int32)


def floats(*values):
    return np.asarray(values, np.float32)


# Of eight: 3 true positives, 1 false negative, 2 false positives, 2 true negatives.
LABELS = classes(1, 1, 1, 1, 0, 0, 0, 0)
OUTPUTS = choosing(1, 1, 1, 0, 1, 1, 0, 0)


def test_matthews_of_a_hand_worked_case():
    # (tp tn - fp fn) / sqrt((tp+fp) (tp+fn) (tn+fp) (tn+fn))
    #   = (3*2 - 2*1) / sqrt(5 * 4 * 4 * 3) = 4 / sqrt(240)
    found = glue_metrics(TASKS["cola"], OUTPUTS, LABELS)
    assert found == {"matthews": pytest.approx(400 / math.sqrt(240), rel=1e-12)}


@pytest.mark.parametrize("name", ["mrpc", "qqp"])
def test_accuracy_and_f1_of_a_hand_worked_case(name):
    # accuracy = 5 / 8; F1 of class 1 = 2 tp / (2 tp + fp + fn) = 6 / 9
    found = glue_metrics(TASKS[name], OUTPUTS, LABELS)
    assert found == {
        "accuracy": pytest.approx(62.5, rel=1e-12),
        "f1": pytest.approx(200 / 3, rel=1e-12),
    }


def test_f1_is_that_of_class_one():
    # Of class 1: 2*1 / (2*1 + 0 + 1) = 2/3. Of class 0 it would be 4/5.
    found = glue_metrics(TASKS["mrpc"], choosing(1, 0, 0, 0), classes(1, 1, 0, 0))
    assert found["f1"] == pytest.approx(200 / 3, rel=1e-12)


@pytest.mark.parametrize("name", ["sst2", "rte", "wnli", "qnli"])
def test_two_class_tasks_have_accuracy_alone(name):
    assert glue_metrics(TASKS[name], OUTPUTS, LABELS) == {"accuracy": 62.5}


def test_the_two_splits_of_mnli_have_an_accuracy_of_their_own_name():
    outputs = choosing(2, 0, 1, 1, count=3)
    labels = classes(2, 0, 0, 1)
    mnli = TASKS["mnli"]
    assert glue_metrics(mnli, outputs, labels) == {"matched": 75.0}
    assert glue_metrics(mnli, outputs, labels, split="dev_mismatched") == {
        "mismatched": 75.0
    }
    with pytest.raises(UsageError, match="scored on dev_matched, dev_mismatched. Got"):
        glue_metrics(mnli, outputs, labels, split="dev")


def test_correlations_of_a_hand_worked_case():
    # Predictions 1 2 3 10, labels 0 2 1 5; means 4 and 2.
    # Deviations: (-3 -2 -1 6) and (-2 0 -1 3). Products add up to 6 + 0 + 1 + 18 = 25,
    # squares to 50 and 14: Pearson = 25 / sqrt(700).
    # Ranks 1 2 3 4 and 1 3 2 4 differ by 0 1 1 0:
    # Spearman = 1 - 6 * 2 / (4 * 15) = 0.8
    found = glue_metrics(TASKS["stsb"], scores(1, 2, 3, 10), floats(0, 2, 1, 5))
    assert found == {
        "pearson": pytest.approx(2500 / math.sqrt(700), rel=1e-12),
        "spearman": pytest.approx(80.0, rel=1e-12),
    }


def test_equal_scores_share_the_mean_of_their_ranks():
    # Ranks 1.5 1.5 3 4 against 1 2 3 4; deviations (-1 -1 .5 1.5), (-1.5 -.5 .5 1.5):
    # 1.5 + .5 + .25 + 2.25 = 4.5 over sqrt(4.5 * 5).
    found = glue_metrics(TASKS["stsb"], scores(1, 1, 2, 3), floats(0, 1, 2, 3))
    assert found["spearman"] == pytest.approx(450 / math.sqrt(22.5), rel=1e-12)


def test_rescaling_scores_changes_no_correlation():
    labels = floats(0, 2, 1, 5)
    usual = glue_metrics(TASKS["stsb"], scores(1, 2, 3, 10), labels)
    for scale in (1e-30, 1e30, 1e-40):
        scaled = glue_metrics(
            TASKS["stsb"], scores(1, 2, 3, 10) * np.float32(scale), labels
        )
        assert scaled == pytest.approx(usual, rel=1e-4)


@pytest.mark.parametrize("constant", [0, 1])
def test_a_constant_prediction_has_no_matthews_correlation(constant):
    outputs = choosing(*[constant] * 4)
    assert glue_metrics(TASKS["cola"], outputs, classes(0, 1, 1, 0)) == {"matthews": 0}
    same = classes(*[constant] * 4)
    assert glue_metrics(TASKS["cola"], outputs, same) == {"matthews": 0}


def test_a_constant_score_has_no_correlation():
    none = {"pearson": 0.0, "spearman": 0.0}
    stsb = TASKS["stsb"]
    for value in (0.0, 2.5, -1e30):
        assert glue_metrics(stsb, scores(*[value] * 3), floats(1, 2, 3)) == none
    assert glue_metrics(stsb, scores(1, 2, 3), floats(2, 2, 2)) == none
    assert glue_metrics(stsb, scores(1), floats(2)) == none
    # Equal but for the rounding of float64.
    almost = 1 + np.arange(3.0)[:, None] * 1e-13
    assert glue_metrics(stsb, almost, floats(1, 2, 3)) == none


def test_scores_that_differ_by_one_float32_step_do_correlate():
    step = np.nextafter(np.float32(2), np.float32(3))
    found = glue_metrics(TASKS["stsb"], scores(2, step), floats(1, 2))
    assert found == {"pearson": pytest.approx(100), "spearman": pytest.approx(100)}


def test_f1_without_any_positive_is_zero():
    found = glue_metrics(TASKS["mrpc"], choosing(0, 0), classes(0, 0))
    assert found == {"accuracy": 100.0, "f1": 0.0}


def test_metrics_stand_in_the_order_of_the_table():
    for task in TASKS.values():
        outputs = np.asarray([[0.0], [1.0]], np.float32) * np.ones(
            (1, task.num_outputs), np.float32
        )
        labels = floats(1, 2) if task.is_regression else classes(0, 1)
        found = [
            name
            for split in task.evaluation_splits
            for name in glue_metrics(task, outputs, labels, split=split)
        ]
        assert tuple(found) == task.metrics


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["sst2", "stsb"])
def test_an_output_that_is_not_finite_is_an_error_that_names_the_example(bad, name):
    outputs = np.zeros((4, TASKS[name].num_outputs), np.float32)
    outputs[2, -1] = bad
    with pytest.raises(NonFiniteError, match="for example 2 of S"):
        predictions(TASKS[name], outputs)


def test_predictions_are_classes_or_scores():
    found = predictions(TASKS["mnli"], choosing(2, 0, count=3))
    assert found.dtype == np.int32 and found.tolist() == [2, 0]
    assert predictions(TASKS["stsb"], scores(1.5, -7)).tolist() == [1.5, -7.0]


@pytest.mark.parametrize(("name", "columns"), [("mnli", 2), ("stsb", 2), ("rte", 1)])
def test_a_wrong_number_of_columns_is_refused(name, columns):
    with pytest.raises(ValueError, match=f"columns for .* Got {columns}"):
        predictions(TASKS[name], np.zeros((2, columns), np.float32))


@pytest.mark.parametrize("count", [0, 3])
def test_outputs_and_labels_belong_together(count):
    with pytest.raises(ValueError, match=f"as long as .* Got {count} and 0"):
        glue_metrics(TASKS["rte"], np.zeros((count, 2), np.float32), classes())


def test_flip_rate_is_the_share_of_changed_classes():
    rte = TASKS["rte"]
    reference = choosing(0, 1, 0, 1)
    assert flip_rate(rte, choosing(0, 1, 0, 1) * 9, reference) == 0.0
    assert flip_rate(rte, choosing(0, 1, 1, 1), reference) == 0.25
    assert flip_rate(rte, choosing(1, 0, 1, 0), reference) == 1.0
    assert flip_rate(TASKS["stsb"], scores(1, 2), scores(2, 1)) is None
    with pytest.raises(ValueError, match="one shape"):
        flip_rate(rte, choosing(0), reference)


def test_ratings_are_scored_by_their_sign_and_by_their_size():
    """A head of two outputs against ratings: the class, and how sure it is."""
    outputs = floats(2, 0, 0, 1, 1, 2, 0, 5).reshape(4, 2)
    ratings = floats(-3, 1, -1, 3)
    found = glue_metrics(TASKS["sentiment-nyt"], outputs, ratings)
    # Positive less negative: -2, 1, 1, 5, mean 1.25; ratings have the mean 0. Products
    # 6 + 1 - 1 + 15 = 21, squares 31 - 4 * 1.25^2 = 24.75 and 20.
    assert found == {
        "accuracy": 75.0,
        "pearson": pytest.approx(2100 / math.sqrt(24.75 * 20), rel=1e-12),
    }
    sure = [math.log1p(math.exp(-x)) for x in (2, 1, -1, 5)]
    loss = log_loss(TASKS["sentiment-nyt"], outputs, ratings)
    assert loss == pytest.approx(np.mean(sure), rel=1e-12)


def test_a_margin_that_is_constant_has_no_correlation():
    found = glue_metrics(TASKS["sentiment-amazon"], choosing(1, 1, 1), floats(-1, 2, 3))
    assert found == {"accuracy": pytest.approx(200 / 3), "pearson": 0.0}
