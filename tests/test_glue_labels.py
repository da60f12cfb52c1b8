"""GLUE's tasks, and whose output means what."""

import itertools

import pytest

from experiments.classification.labels import output_order, with_task_labels
from experiments.classification.tasks import TASKS, choose_tasks
from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.models import ClassifierConfig

MNLI, RTE, STSB = TASKS["mnli"], TASKS["rte"], TASKS["stsb"]


def test_tasks_stand_in_the_order_of_the_paper():
    titles = [task.title for task in TASKS.values()]
    assert titles == [
        "CoLA", "SST-2", "QQP", "QNLI", "MNLI", "RTE", "STS-B", "MRPC", "WNLI",
        "Amazon reviews", "NYT editorials",
    ]  # fmt: skip
    assert [task.name for task in TASKS.values()] == list(TASKS)


def test_labels_are_those_of_the_hub_in_its_order():
    # From the data card of nyu-mll/glue; rated sentences have those of their head.
    assert {name: task.labels for name, task in TASKS.items()} == {
        "cola": ("unacceptable", "acceptable"),
        "sst2": ("negative", "positive"),
        "qqp": ("not_duplicate", "duplicate"),
        "qnli": ("entailment", "not_entailment"),
        "mnli": ("entailment", "neutral", "contradiction"),
        "rte": ("entailment", "not_entailment"),
        "stsb": (),
        "mrpc": ("not_equivalent", "equivalent"),
        "wnli": ("not_entailment", "entailment"),
        "sentiment-amazon": ("negative", "positive"),
        "sentiment-nyt": ("negative", "positive"),
    }


def test_chosen_tasks_come_once_and_in_the_order_of_the_table():
    assert [t.name for t in choose_tasks(["stsb", "cola", "stsb"])] == ["cola", "stsb"]


@pytest.mark.parametrize(("names", "got"), [(["rte", "snli"], "snli"), ([], "none")])
def test_an_unknown_task_is_an_error_that_names_the_known(names, got):
    with pytest.raises(UsageError, match=f"cola, sst2, .*sentiment-nyt. Got {got}"):
        choose_tasks(names)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_permuted_labels_are_mapped(order):
    id2label = tuple(MNLI.labels[i] for i in order)
    found = output_order(MNLI, id2label)
    assert tuple(id2label[i] for i in found) == MNLI.labels


@pytest.mark.parametrize(
    "id2label",
    [
        ("not_entailment", "entailment"),
        ("NOT_ENTAILMENT", "ENTAILMENT"),
        ("Not-Entailment", "Entailment"),
        ("not entailment ", "entailment"),
    ],
)
def test_names_are_compared_without_case_spaces_and_hyphens(id2label):
    assert output_order(RTE, id2label) == (1, 0)


@pytest.mark.parametrize(
    "id2label", [("LABEL_0", "LABEL_1"), ("0", "1"), ("label 0", "entailment")]
)
def test_generic_names_are_never_scored_silently(id2label):
    with pytest.raises(CheckpointError, match=r"`--labels=entailment,not_entailment`"):
        output_order(RTE, id2label)


def test_stated_labels_give_generic_names_their_meaning():
    generic = ("LABEL_0", "LABEL_1", "LABEL_2")
    assert output_order(MNLI, generic, ("task",)) == (0, 1, 2)
    stated = ("Contradiction", "ENTAILMENT", "neutral")
    assert output_order(MNLI, generic, stated) == (1, 2, 0)


def test_stated_labels_that_agree_with_the_checkpoint_are_fine():
    assert output_order(RTE, RTE.labels[::-1], RTE.labels[::-1]) == (1, 0)
    assert output_order(RTE, RTE.labels, ("task",)) == (0, 1)


@pytest.mark.parametrize("stated", [("task",), RTE.labels])
def test_stated_labels_that_contradict_the_checkpoint_are_refused(stated):
    with pytest.raises(UsageError, match="contradicts the checkpoint, whose outputs"):
        output_order(RTE, RTE.labels[::-1], stated)


@pytest.mark.parametrize(
    "stated",
    [("yes", "no"), ("entailment",), ("entailment", "entailment"), ("tasks",)],
)
def test_stated_labels_must_be_the_tasks_own(stated):
    with pytest.raises(UsageError, match="each label of RTE once"):
        output_order(RTE, ("LABEL_0", "LABEL_1"), stated)


@pytest.mark.parametrize(
    "id2label", [("negative", "positive"), ("entailment", "entailment")]
)
def test_a_head_of_another_task_is_refused(id2label):
    with pytest.raises(CheckpointError, match=f"{id2label[0]}, .* the labels of RTE"):
        output_order(RTE, id2label)


@pytest.mark.parametrize(
    ("task", "id2label", "message"),
    [
        (RTE, MNLI.labels, r"RTE needs .* 2 outputs .*, and this .* has 3 outputs"),
        (MNLI, RTE.labels, r"MNLI needs .* 3 outputs .*, and this .* has 2 outputs"),
        (RTE, ("score",), "has one output, as for a regression"),
        (STSB, RTE.labels, r"STS-B needs a head with one output \(a regression\)"),
        (STSB, (), "has 0 outputs"),
    ],
)
@pytest.mark.parametrize("stated", [(), ("task",)])
def test_a_head_of_another_size_is_refused(task, id2label, message, stated):
    with pytest.raises(CheckpointError, match=message):
        output_order(task, id2label, stated)


def test_a_regression_has_one_output_of_any_name():
    assert output_order(STSB, ("LABEL_0",)) == (0,)
    assert output_order(STSB, ("similarity",), ("task",)) == (0,)
    with pytest.raises(UsageError, match="STS-B has none"):
        output_order(STSB, ("LABEL_0",), ("similarity",))


def config(labels):
    return ClassifierConfig(
        model_type="bert", vocab_size=9, hidden_size=8, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=8, id2label=labels,
    )  # fmt: skip


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_head_that_took_the_tasks_names_needs_none_stated(order):
    generic = config(("LABEL_0", "LABEL_1", "LABEL_2"))
    named = with_task_labels(generic, MNLI, order)
    assert output_order(MNLI, named.id2label) == order
    assert not named.is_regression


def test_a_regression_has_no_names_to_take():
    named = with_task_labels(config(("similarity",)), STSB, (0,))
    assert (named.id2label, named.is_regression) == (("similarity",), True)
