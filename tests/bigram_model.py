"""A Llama whose next token depends on the last one alone, by a table that is known."""

import json

import jax.numpy as jnp
import numpy as np
import scipy.special
import tokenizers
from flax import nnx

from kashin_jax.models import DecoderConfig, DecoderForCausalLM, save_model

VOCAB = 24
POSITIONS = 64
WORDS = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCAB))]
BOS, EOS = 1, 2


def table(seed=0):
    """Logits of the next token, a row for every last one; padding is never likely."""
    logits = np.random.default_rng(seed).normal(size=(VOCAB, VOCAB)) * 2
    logits[:, :2] -= 20
    return logits.astype(np.float32)


def log_likelihood(logits, ids):
    """Of all tokens but the first, which is given."""
    losses = scipy.special.log_softmax(logits.astype(np.float64), axis=1)
    return losses[np.asarray(ids[:-1]), np.asarray(ids[1:])].sum()


def write_model(directory, logits):
    """Saves it with a tokenizer of words; one-hot embeddings, blocks that add nothing.

    A norm of eps 0 makes `sqrt(VOCAB)` of a one.
    """
    config = DecoderConfig.from_dict(
        {
            "model_type": "llama", "vocab_size": VOCAB, "hidden_size": VOCAB,
            "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
            "max_position_embeddings": POSITIONS, "rms_norm_eps": 1e-12,
            "bos_token_id": BOS, "eos_token_id": EOS,
        },
        "the bigram model",
    )  # fmt: skip
    model = DecoderForCausalLM(config, rngs=nnx.Rngs(0))
    block = model.layers[0]
    for layer in (block.self_attn.o_proj, block.mlp.down_proj):
        layer.kernel[...] = jnp.zeros_like(layer.kernel[...])
    model.embed_tokens.embedding[...] = jnp.eye(VOCAB)
    model.lm_head.kernel[...] = jnp.asarray(logits / np.float32(np.sqrt(VOCAB)))
    save_model(model, config, directory, dtype="float32")
    words = tokenizers.models.WordLevel(
        {word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"
    )
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(WORDS[:3])
    tokenizer.save(str(directory / "tokenizer.json"))
    stated = {"bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(stated))
    return directory
