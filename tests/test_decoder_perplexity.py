"""Both protocols of perplexity, on a small decoder of every family."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from decoders import GOLDEN
from flax import nnx

from kashin_jax.cli import main
from kashin_jax.models import load_model

CONTEXT, WORDS, LENGTH = 16, 61, 70
# What a text begins with, by the token ids that these families have as their own.
BEGINNINGS = {
    "llama": "<s>", "mistral": "<s>", "gemma2": "<bos>", "gemma3_text": "<bos>",
    "qwen2": None, "qwen3": None, "gpt2": None, "gpt_neox": None,
}  # fmt: skip
FAMILIES = [
    name if name == "llama" else pytest.param(name, marks=pytest.mark.slow)
    for name in BEGINNINGS
]


def copy_with_words(family, directory):
    """A golden model beside a tokenizer of words; which token is which, it says."""
    shutil.copytree(GOLDEN / family, directory)
    config = json.loads((directory / "config.json").read_text())
    words = [f"w{i}" for i in range(WORDS)]
    beginning = BEGINNINGS[family] or "<|endoftext|>"
    if (own := config.get("bos_token_id")) is not None and own < WORDS:
        words[own] = beginning
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, words[-1])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    return words, own


def losses_by_hand(directory, ids, stride):
    """The loop of the guides: a window at a time, what is new in it predicted."""
    model = load_model(directory).model
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids))
    losses, end = [], 0
    for begin in range(0, len(ids), stride):
        before, end = end, min(begin + CONTEXT, len(ids))
        window = ids[begin:end]
        padded = np.zeros((1, CONTEXT), np.int32)
        padded[0, : len(window)] = window
        logits = np.asarray(run(state, jnp.asarray(padded))[0], np.float64)
        totals = np.log(np.exp(logits).sum(axis=1))
        for i in range(max(before - begin, 1), len(window)):
            losses.append(totals[i - 1] - logits[i - 1, window[i]])
        if end == len(ids):
            return losses
    return losses


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_of_a_decoder_is_that_of_its_windows(family, tmp_path, capsys):
    directory = tmp_path / family
    words, own = copy_with_words(family, directory)
    ids = np.random.default_rng(0).integers(5, WORDS - 1, LENGTH).tolist()
    text = " ".join(words[i] for i in ids)
    (tmp_path / "text.txt").write_text(text)
    if BEGINNINGS[family]:
        ids = [own, *ids]
    command = ["eval", str(directory), f"--text={tmp_path / 'text.txt'}", "--json"]
    for stride in (CONTEXT, 5):
        flags = [f"--context={CONTEXT}", f"--stride={stride}"]
        assert main([*command, *flags]) == 0
        found = json.loads(capsys.readouterr().out)
        losses = losses_by_hand(directory, ids, stride)
        assert found["bos_token"] == BEGINNINGS[family]
        assert found["predictions"] == len(losses)
        expected = math.exp(np.mean(losses))
        assert found["perplexity"] == pytest.approx(expected, rel=1e-4)
        bits = sum(losses) / math.log(2) / found["bytes"]
        assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    # All but the first token are predicted where windows overlap.
    first = 0 if BEGINNINGS[family] else len(words[ids[0]])
    assert found["bytes"] == len(text) - first
