"""Dequantized checkpoints at Hugging Face, which is installed apart (make oracle)."""

import jax.numpy as jnp
import numpy as np
import pytest

from kashin_jax import RTN, Rules
from kashin_jax.models.loading import load_opt
from kashin_jax.pipeline import dequantize_checkpoint, quantize_checkpoint

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


def test_hugging_face_loads_what_was_quantized_and_undone(oracle, tmp_path):
    theirs = oracle.random_model("prenorm", seed=30)
    theirs.save_pretrained(tmp_path / "theirs", safe_serialization=True)
    rules = Rules(config=RTN(bits=3, group_size=16))
    quantize_checkpoint(tmp_path / "theirs", tmp_path / "q", rules)
    dequantize_checkpoint(tmp_path / "q", tmp_path / "undone", max_shard_bytes=10**5)
    loaded = oracle.pretrained_model(tmp_path / "undone")
    ids = np.random.RandomState(31).randint(0, 61, size=(2, 20))
    mask = oracle.padding_mask(ids.shape, "none")
    expected = oracle.logits(loaded, ids, mask)
    ours = load_opt(tmp_path / "undone").model
    found = np.asarray(ours(jnp.asarray(ids, jnp.int32), jnp.asarray(mask)))
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() < 1e-4 * scale
    # It is the quantized model, not the one before.
    assert np.abs(oracle.logits(theirs, ids, mask) - expected).max() > 1e-3 * scale
