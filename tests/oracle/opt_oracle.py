"""Hugging Face's Flax OPT, for comparison; needs transformers 4.57.6 on the path."""

import contextlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "ffn_dim": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
VARIANTS = {
    "prenorm": {},
    "postnorm": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "untied": {
        "tie_word_embeddings": False,
        "_remove_final_layer_norm": True,
        "activation_function": "gelu",
    },
}
PADDINGS = {
    "none": (0, 0),
    "left": (5, 0),
    "right": (0, 5),
}


@contextlib.contextmanager
def usual_numerics():
    """The promotion that Hugging Face's code counts on."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def random_model(variant: str, seed: int):
    """A small model with weights large enough that every part of it matters."""
    from transformers import FlaxOPTForCausalLM, OPTConfig

    config = OPTConfig(**SMALL, **VARIANTS[variant])
    with usual_numerics():
        model = FlaxOPTForCausalLM(config, seed=seed)
    return with_large_weights(model, seed)


def with_large_weights(model, seed: int):
    """The model with other random weights, large enough that every part matters."""
    from flax import traverse_util

    rng = np.random.RandomState(seed)
    flat = traverse_util.flatten_dict(model.params)
    for path in sorted(flat):
        noise = rng.normal(size=flat[path].shape)
        spread = 0.3 if path[-1] in ("bias", "scale") else 2 / np.sqrt(noise.shape[0])
        spread = 1.0 if path[-1] == "embedding" else spread
        value = (path[-1] == "scale") + spread * noise
        flat[path] = jnp.asarray(value, jnp.float32)
    model.params = traverse_util.unflatten_dict(flat)
    return model


def pretrained_model(directory: pathlib.Path):
    """A checkpoint as Hugging Face reads it, computed in float32."""
    from transformers import FlaxOPTForCausalLM

    with usual_numerics():
        return FlaxOPTForCausalLM.from_pretrained(directory, dtype=jnp.float32)


def padding_mask(shape: tuple[int, int], padding: str) -> np.ndarray:
    """Ones, with padding in the second row only, on the side that is named."""
    left, right = PADDINGS[padding]
    mask = np.ones(shape, np.int32)
    mask[1, :left] = 0
    mask[1, shape[1] - right :] = 0
    return mask


def logits(model, input_ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits at every position, meaningless where the mask is 0."""
    with usual_numerics():
        return np.asarray(model(input_ids, attention_mask=mask).logits)


def greedy(
    model, input_ids: np.ndarray, mask: np.ndarray, max_new_tokens: int
) -> np.ndarray:
    """Prompts and their likeliest continuation."""
    with usual_numerics():
        output = model.generate(
            input_ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
    return np.asarray(output.sequences)
