"""Names of a classifier's parameters: ours, and those that each model publishes."""

import re
from collections.abc import Sequence
from typing import Any

from kashin_jax.models.names import StoredName, parse_stored_name, tensor_name

__all__ = ["classifier_name", "is_foreign", "parse_classifier_name"]

# Ours on the left. In order: the first that matches is the one.
_BERT_ENCODER = (
    (r"encoder\.embeddings\.norm", "embeddings.LayerNorm"),
    (r"encoder\.embeddings", "embeddings"),
    (r"encoder\.layers\.(\d+)\.(query|key|value)",
     r"encoder.layer.\1.attention.self.\2"),
    (r"encoder\.layers\.(\d+)\.attention_output",
     r"encoder.layer.\1.attention.output.dense"),
    (r"encoder\.layers\.(\d+)\.attention_norm",
     r"encoder.layer.\1.attention.output.LayerNorm"),
    (r"encoder\.layers\.(\d+)\.intermediate", r"encoder.layer.\1.intermediate.dense"),
    (r"encoder\.layers\.(\d+)\.output_norm", r"encoder.layer.\1.output.LayerNorm"),
    (r"encoder\.layers\.(\d+)\.output", r"encoder.layer.\1.output.dense"),
    (r"pooler", "pooler.dense"),
)  # fmt: skip
_DISTILBERT_LAYER = {
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "attention_output": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "intermediate": "ffn.lin1",
    "output_norm": "output_layer_norm",
    "output": "ffn.lin2",
}
_DISTILBERT_ENCODER = (
    (r"encoder\.embeddings\.norm", "embeddings.LayerNorm"),
    (r"encoder\.embeddings", "embeddings"),
    *(
        (rf"encoder\.layers\.(\d+)\.{ours}", rf"transformer.layer.\1.{theirs}")
        for ours, theirs in _DISTILBERT_LAYER.items()
    ),
)
_ENCODERS = {
    "bert": _BERT_ENCODER,
    "roberta": _BERT_ENCODER,
    "distilbert": _DISTILBERT_ENCODER,
}
_HEADS = {
    "bert": {"classifier.out_proj": "classifier"},
    "roberta": {},
    "distilbert": {
        "classifier.dense": "pre_classifier",
        "classifier.out_proj": "classifier",
    },
}
# Buffers of some versions of transformers, and heads of other tasks: checkpoints of
# bare encoders carry the one they were pretrained with.
_FOREIGN = re.compile(
    r"embeddings\.(position_ids|token_type_ids)$"
    r"|(cls|lm_head|qa_outputs|vocab_transform|vocab_layer_norm|vocab_projector)\."
)
_ROBERTA_FOREIGN = re.compile(r"pooler\.")


def classifier_name(path: Sequence[Any], model_type: str) -> str:
    """Hugging Face's name, as in `bert.encoder.layer.0.attention.self.query.weight`."""
    name = tensor_name(path)
    for ours, theirs in _HEADS[model_type].items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    for pattern, theirs in _ENCODERS[model_type]:
        if re.match(rf"{pattern}\.", name):
            return f"{model_type}." + re.sub(rf"^{pattern}", theirs, name, count=1)
    return name


def parse_classifier_name(stored: str, model_type: str) -> StoredName:
    """Reads a checkpoint's name; bare encoders are stored without the prefix."""
    return parse_stored_name(stored, f"{model_type}.")


def is_foreign(name: str, model_type: str) -> bool:
    """Whether a tensor, named without prefix, is of no use to a classifier."""
    if model_type == "roberta" and _ROBERTA_FOREIGN.match(name):
        return True
    return _FOREIGN.match(name) is not None
