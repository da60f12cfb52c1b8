"""Our OPT against Hugging Face's Flax OPT, which is installed apart (make oracle)."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from kashin_jax.models import load_opt, save_opt
from kashin_jax.models.generation import generate

ASSETS = pathlib.Path(__file__).parents[2] / "experiments" / "assets"

pytestmark = [
    pytest.mark.oracle,
]


@pytest.fixture
def oracle():
    """Imported by the test, since normal runs collect this file and lack the models."""
    import opt_oracle
    import transformers

    assert transformers.__version__ == "4.57.6"
    return opt_oracle


def relative_difference(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


def assert_equal_logits(oracle, ours, theirs, ids, padding):
    mask = oracle.padding_mask(ids.shape, padding)
    found = np.asarray(ours(jnp.asarray(ids, jnp.int32), jnp.asarray(mask)))
    expected = oracle.logits(theirs, ids, mask)
    real = mask.astype(bool)
    assert relative_difference(found[real], expected[real]) < 1e-4


@pytest.mark.parametrize("safe", [False, True], ids=["msgpack", "safetensors"])
@pytest.mark.parametrize("variant", ["prenorm", "postnorm", "untied"])
def test_models_that_hugging_face_saved_give_its_logits(
    oracle, tmp_path, variant, safe
):
    theirs = oracle.random_model(variant, seed=10)
    theirs.save_pretrained(tmp_path, safe_serialization=safe)
    ours = load_opt(str(tmp_path)).model
    ids = np.random.RandomState(11).randint(0, 61, size=(2, 20))
    for padding in oracle.PADDINGS:
        assert_equal_logits(oracle, ours, theirs, ids, padding)


@pytest.mark.parametrize("variant", ["prenorm", "postnorm", "untied"])
def test_models_that_we_saved_give_our_logits_at_hugging_face(
    oracle, tmp_path, variant
):
    theirs = oracle.random_model(variant, seed=20)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_opt(str(tmp_path / "theirs"))
    save_opt(ours.model, ours.config, tmp_path / "ours", dtype="float32")
    again = oracle.pretrained_model(tmp_path / "ours")
    ids = np.random.RandomState(21).randint(0, 61, size=(2, 20))
    assert_equal_logits(oracle, ours.model, again, ids, "left")


@pytest.mark.parametrize("variant", ["prenorm", "postnorm", "untied"])
def test_greedy_continuations_are_the_same(oracle, tmp_path, variant):
    theirs = oracle.random_model(variant, seed=30)
    theirs.save_pretrained(tmp_path)
    ours = load_opt(str(tmp_path)).model
    ids = np.random.RandomState(31).randint(3, 61, size=(2, 12))
    mask = oracle.padding_mask(ids.shape, "left")
    found = generate(
        ours,
        jnp.asarray(ids, jnp.int32),
        attention_mask=jnp.asarray(mask),
        max_new_tokens=20,
        eos_token_id=2,
    )
    np.testing.assert_array_equal(found, oracle.greedy(theirs, ids, mask, 20))


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_the_embedded_checkpoint_gives_the_same_logits(oracle, padding):
    directory = ASSETS / "opt-wiki-18m"
    theirs = oracle.pretrained_model(directory)
    ours = load_opt(str(directory)).model
    ids = np.random.RandomState(41).randint(0, 8192, size=(2, 200))
    assert_equal_logits(oracle, ours, theirs, ids, padding)
