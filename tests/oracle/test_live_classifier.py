"""Our classifiers against Hugging Face's Flax ones, installed apart (make oracle)."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from kashin_jax.models import load_classifier, save_classifier

ASSETS = pathlib.Path(__file__).parents[2] / "experiments" / "assets"
VARIANTS = ["bert", "bert-regression", "roberta", "distilbert"]

pytestmark = [pytest.mark.oracle]


@pytest.fixture
def oracle():
    """Imported by the test, since normal runs collect this file and lack the models."""
    import classifier_oracle
    import transformers

    assert transformers.__version__ == "4.57.6"
    return classifier_oracle


def relative_difference(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


def assert_equal_outputs(oracle, ours, theirs, ids, mask, types):
    arrays = [jnp.asarray(a, jnp.int32) for a in (ids, mask, types)]
    hidden, logits = oracle.outputs(theirs, ids, mask, types)
    real = mask.astype(bool)
    found = np.asarray(ours.hidden_states(*arrays))
    assert relative_difference(found[real], hidden[real]) < 1e-4
    assert relative_difference(np.asarray(ours(*arrays)), logits) < 1e-4


@pytest.mark.parametrize("safe", [False, True], ids=["msgpack", "safetensors"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_models_that_hugging_face_saved_give_its_outputs(
    oracle, tmp_path, variant, safe
):
    theirs = oracle.random_model(variant, seed=10)
    theirs.save_pretrained(tmp_path, safe_serialization=safe)
    ours = load_classifier(tmp_path).model
    ids = np.random.RandomState(11).randint(3, 61, size=(2, 20))
    kind, _ = oracle.VARIANTS[variant]
    for padding in oracle.PADDINGS:
        filled, mask = oracle.padded(ids, padding, oracle.PAD[kind])
        types = (np.arange(20)[None] > 8) * np.ones((2, 1), int) * (kind == "Bert")
        assert_equal_outputs(oracle, ours, theirs, filled, mask, types)


@pytest.mark.parametrize("variant", VARIANTS)
def test_models_that_we_saved_give_our_outputs_at_hugging_face(
    oracle, tmp_path, variant
):
    theirs = oracle.random_model(variant, seed=20)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_classifier(tmp_path / "theirs")
    save_classifier(ours.model, ours.config, tmp_path / "ours")
    kind, _ = oracle.VARIANTS[variant]
    again = oracle.pretrained_model(tmp_path / "ours", kind)
    ids = np.random.RandomState(21).randint(3, 61, size=(2, 20))
    ones, zeros = np.ones_like(ids), np.zeros_like(ids)
    assert_equal_outputs(oracle, ours.model, again, ids, ones, zeros)


@pytest.mark.parametrize(
    ("head", "count"), [("cola", 2), ("mrpc", 2), ("rte", 2), ("stsb", 1)]
)
def test_the_embedded_encoder_gives_the_same_outputs(oracle, head, count):
    directory = ASSETS / "minilm-glue"
    theirs = oracle.model_with_head(directory, head, count)
    ours = load_classifier(directory, head=head).model
    ids = np.random.RandomState(41).randint(1000, 30000, size=(2, 100))
    ids[:, 0] = 101
    for padding in oracle.PADDINGS:
        filled, mask = oracle.padded(ids, padding, 0)
        types = (np.arange(100)[None] > 60) * np.ones((2, 1), int)
        assert_equal_outputs(oracle, ours, theirs, filled, mask, types)
