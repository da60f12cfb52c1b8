"""A classifier's configuration: read from every model's own spelling, or refused."""

import dataclasses
import json
import pathlib

import pytest

from kashin_jax.errors import CheckpointError
from kashin_jax.models import ClassifierConfig

GOLDEN = pathlib.Path(__file__).parent / "golden" / "classifier"
KINDS = ["bert", "bert-regression", "roberta", "distilbert"]
ATTENTION = "attention_probs_dropout_prob"


def content(name="bert"):
    return json.loads((GOLDEN / name / "config.json").read_text())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "gpt2"}, "bert, roberta, distilbert"),
        ({"model_type": None}, "`model_type` is None"),
        ({"position_embedding_type": "relative_key"}, "only 'absolute'"),
        ({"hidden_act": "swiglu"}, "`hidden_act`='swiglu'"),
        ({"num_attention_heads": 5}, "must divide"),
        ({"hidden_size": "32"}, "field `hidden_size` is '32'"),
        ({"hidden_size": True}, "field `hidden_size` is True"),
        ({"hidden_dropout_prob": 1.0}, "must lie in [0, 1)"),
        ({"id2label": {"0": "a", "2": "b"}}, "names of the outputs 0, 1"),
        ({"id2label": {}}, "names of the outputs 0, 1"),
        ({"id2label": ["a", "b"]}, "names of the outputs 0, 1"),
        ({"id2label": None, "num_labels": 0}, "`num_labels` is 0"),
        ({"problem_type": "multi_label_classification"}, "is not supported"),
        ({"max_position_embeddings": 0}, "must be at least 1"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(fields, words):
    with pytest.raises(CheckpointError) as caught:
        ClassifierConfig.from_dict(content() | fields, "here/config.json")
    assert words in str(caught.value)
    assert str(caught.value).startswith("here/config.json: ")
    assert "\n" not in str(caught.value)


def test_a_missing_size_is_named():
    without = content()
    del without["intermediate_size"]
    with pytest.raises(CheckpointError, match="`intermediate_size` is missing"):
        ClassifierConfig.from_dict(without, "config.json")


@pytest.mark.parametrize("name", KINDS)
def test_configurations_survive_the_round_trip(name):
    config = ClassifierConfig.from_dict(content(name), "x")
    assert ClassifierConfig.from_dict(config.to_dict(), "y") == config


def test_distilberts_own_spelling_is_read_and_written():
    stored = content("distilbert")
    config = ClassifierConfig.from_dict(stored | {"dropout": 0.3}, "x")
    assert (config.hidden_size, config.num_hidden_layers) == (
        stored["dim"], stored["n_layers"]
    )  # fmt: skip
    assert (config.hidden_dropout_prob, config.type_vocab_size) == (0.3, 0)
    assert "hidden_size" not in config.to_dict()
    assert config.to_dict()["dim"] == stored["dim"]


def test_robertas_padding_is_1_where_nothing_is_said_and_costs_positions():
    stored = content("roberta")
    stored.pop("pad_token_id", None)
    config = ClassifierConfig.from_dict(stored, "x")
    assert (config.pad_token_id, config.position_offset) == (1, 2)
    assert config.max_length == config.max_position_embeddings - 2


@pytest.mark.parametrize("name", KINDS)
def test_a_dropout_of_null_is_none_at_all(name):
    spelled = "dropout" if name == "distilbert" else "hidden_dropout_prob"
    attention = "attention_dropout" if name == "distilbert" else ATTENTION
    config = ClassifierConfig.from_dict(
        content(name) | {spelled: None, attention: None}, "x"
    )
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0, 0)


def test_padding_of_null_is_none_but_for_roberta_which_counts_positions_by_it():
    assert ClassifierConfig.from_dict(content() | {"pad_token_id": None}, "x")
    with pytest.raises(CheckpointError, match="`pad_token_id` is None; expected int"):
        ClassifierConfig.from_dict(content("roberta") | {"pad_token_id": None}, "x")


def test_one_output_is_a_regression_unless_said_otherwise():
    one, two = (
        ClassifierConfig.from_dict(content() | {"id2label": {"0": "x"}}, "x"),
        (
            ClassifierConfig.from_dict(
                content() | {"id2label": {"1": "b", "0": "a"}}, "x"
            )
        ),
    )
    one = dataclasses.replace(one, problem_type=None)
    two = dataclasses.replace(two, problem_type=None)
    assert (one.is_regression, two.is_regression) == (True, False)
    assert two.id2label == ("a", "b")
    said = dataclasses.replace(one, problem_type="single_label_classification")
    assert not said.is_regression


def test_the_dropout_of_the_head_is_the_models_where_it_has_none_of_its_own():
    config = ClassifierConfig.from_dict(content() | {"hidden_dropout_prob": 0.2}, "x")
    assert dataclasses.replace(config, classifier_dropout=None).head_dropout_prob == 0.2
    assert dataclasses.replace(config, classifier_dropout=0.4).head_dropout_prob == 0.4
