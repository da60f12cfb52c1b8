"""Our decoders against transformers' torch models installed apart (make oracle-torch).

Other weights than the golden files have, and what only a live model can say: that it
reads what we write, and continues a text as we do.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from decoders import make
from flax import nnx

from kashin_jax.models import generate, load_model, save_model

pytestmark = [pytest.mark.oracle]


@pytest.fixture(params=make.VARIANTS)
def pair(request, tmp_path):
    """The same weights here and there."""
    theirs = make.random_model(request.param, seed=100)
    make.save(theirs, request.param, tmp_path)
    return load_model(tmp_path), theirs


@nnx.jit
def forward(model, ids, mask):
    return model(ids, mask)


def relative_difference(found, expected, mask):
    real = mask.astype(bool)
    gap = np.abs(np.asarray(found) - expected)[real].max()
    return gap / np.abs(expected[real]).max()


def test_logits_are_the_same(pair):
    ours, theirs = pair
    ids, mask = make.tokens_and_mask(seed=101)
    found = forward(ours.model, jnp.asarray(ids), jnp.asarray(mask))
    expected = make.logits(theirs, ids, mask)
    difference = relative_difference(found, expected, mask)
    print(f"largest relative difference of logits: {difference:.1e}")
    assert difference < 1e-4


def test_what_they_save_is_read_here(pair, tmp_path):
    """Names and configurations as transformers 5 writes them."""
    ours, theirs = pair
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_model(tmp_path / "theirs")
    assert again.config == ours.config
    expected = dict(nnx.to_flat_state(nnx.state(ours.model)))
    found = dict(nnx.to_flat_state(nnx.state(again.model)))
    assert found.keys() == expected.keys()
    for path, value in found.items():
        np.testing.assert_array_equal(value[...], expected[path][...], str(path))


def test_what_we_save_is_read_there(pair, tmp_path):
    from transformers import AutoModelForCausalLM

    ours, theirs = pair
    save_model(ours.model, ours.config, tmp_path / "ours", dtype="float32")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    ).float()
    ids, mask = make.tokens_and_mask(seed=102)
    expected = make.logits(theirs, ids, mask)
    found = make.logits(again.eval(), ids, mask)
    assert relative_difference(found, expected, mask) < 1e-6


# Of "dynamic" theirs reads old keys with the speeds of a shorter text.
@pytest.mark.parametrize(
    "pair", sorted(set(make.VARIANTS) - {"dynamic"}), indirect=True
)
def test_greedy_continuations_are_the_same(pair):
    """Both ends lie on the same side of the lengths at which ropes change."""
    import torch

    ours, theirs = pair
    ids, mask = make.tokens_and_mask(seed=103, length=20)
    found = generate(
        ours.model, jnp.asarray(ids), attention_mask=jnp.asarray(mask),
        max_new_tokens=20, eos_token_id=2,
    )  # fmt: skip
    expected = theirs.generate(
        torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long(),
        max_new_tokens=20, do_sample=False, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    width = expected.shape[1]
    np.testing.assert_array_equal(found[:, :width], expected.numpy())
