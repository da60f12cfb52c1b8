"""Hugging Face's Flax classifiers, for comparison; needs transformers 4.57.6."""

import pathlib
import tempfile

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from opt_oracle import usual_numerics, with_large_weights

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
DISTIL = {
    "vocab_size": 61,
    "dim": 32,
    "n_layers": 2,
    "hidden_dim": 48,
    "n_heads": 4,
    "max_position_embeddings": 40,
}
# Kind of model, and what its configuration says beyond the sizes.
VARIANTS = {
    "bert": ("Bert", SMALL | {"num_labels": 3}),
    "bert-regression": ("Bert", SMALL | {"num_labels": 1, "hidden_act": "gelu_new"}),
    "roberta": (
        "Roberta",
        SMALL
        | {
            "num_labels": 3,
            "type_vocab_size": 1,
            "pad_token_id": 1,
            "layer_norm_eps": 1e-5,
        },
    ),
    "distilbert": ("DistilBert", DISTIL | {"num_labels": 2}),
}
PAD = {"Bert": 0, "Roberta": 1, "DistilBert": 0}
# Tokens of the second row that are padding, on the right.
PADDINGS = {"none": 0, "right": 5}


def random_model(variant: str, seed: int):
    """A small model with weights large enough that every part of it matters."""
    import transformers

    kind, fields = VARIANTS[variant]
    config = getattr(transformers, f"{kind}Config")(**fields)
    with usual_numerics():
        make = getattr(transformers, f"Flax{kind}ForSequenceClassification")
        model = make(config, seed=seed)
    return with_large_weights(model, seed)


def pretrained_model(directory: pathlib.Path, kind: str = "Bert"):
    """A checkpoint as Hugging Face reads it, computed in float32."""
    import transformers

    make = getattr(transformers, f"Flax{kind}ForSequenceClassification")
    with usual_numerics():
        return make.from_pretrained(directory, dtype=jnp.float32)


def model_with_head(directory: pathlib.Path, head: str, num_labels: int):
    """One head of a checkpoint with several, put where Hugging Face expects it."""
    import json

    with tempfile.TemporaryDirectory() as name:
        target = pathlib.Path(name)
        tensors = safetensors.numpy.load_file(directory / "model.safetensors")
        heads = safetensors.numpy.load_file(directory / "heads.safetensors")
        for key, value in heads.items():
            if key.startswith(f"{head}."):
                tensors[key.removeprefix(f"{head}.")] = value
        safetensors.numpy.save_file(
            tensors, target / "model.safetensors", {"format": "pt"}
        )
        content = json.loads((directory / "config.json").read_text())
        (target / "config.json").write_text(
            json.dumps(content | {"num_labels": num_labels})
        )
        model = pretrained_model(target)
    return model


def padded(ids: np.ndarray, padding: str, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens and their mask, with padding at the end of the second row."""
    ids, mask = ids.copy(), np.ones(ids.shape, np.int32)
    start = ids.shape[1] - PADDINGS[padding]
    ids[1, start:], mask[1, start:] = pad, 0
    return ids, mask


def outputs(
    model, ids: np.ndarray, mask: np.ndarray, types: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states of the last block and logits."""
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "distil" not in type(model).__name__.lower():
        inputs["token_type_ids"] = types
    with usual_numerics():
        result = model(**inputs, output_hidden_states=True)
    return np.asarray(result.hidden_states[-1]), np.asarray(result.logits)
