"""What a BERT, RoBERTa or DistilBERT classifier says about itself in `config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.models.config_fields import check_rates, check_sizes, read_fields
from kashin_jax.models.transformer import ACTIVATIONS

__all__ = ["MODEL_TYPES", "ClassifierConfig"]

# Spellings that differ from BERT's.
_ALIASES: dict[str, dict[str, str]] = {
    "bert": {},
    "roberta": {},
    "distilbert": {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "classifier_dropout": "seq_classif_dropout",
    },
}
MODEL_TYPES = tuple(_ALIASES)
# DistilBERT has no token types, and its epsilon is not in its configuration.
_FIXED: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "distilbert": {"type_vocab_size": 0, "layer_norm_eps": 1e-12},
}
_ARCHITECTURES = {
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForSequenceClassification",
    "distilbert": "DistilBertForSequenceClassification",
}
REGRESSION, SINGLE_LABEL = "regression", "single_label_classification"


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """Architecture of a sequence classifier; field names are those of BERT.

    Attributes:
      model_type: One of `MODEL_TYPES`.
      vocab_size: Rows of the token embedding.
      hidden_size: Width of the residual stream.
      num_hidden_layers: Number of blocks.
      num_attention_heads: Heads per block; divides `hidden_size`.
      intermediate_size: Width inside the feed-forward parts.
      max_position_embeddings: Rows of the position table; RoBERTa leaves the first
        `pad_token_id + 1` of them unused, see `max_length`.
      type_vocab_size: Kinds of token types; 0 where the model has none.
      layer_norm_eps: Added to the variance in layer norms.
      hidden_act: Activation of the feed-forward parts.
      hidden_dropout_prob: Dropout rate of the residual stream, training only.
      attention_probs_dropout_prob: Of attention probabilities, training only.
      classifier_dropout: Before the output matrix; None means `hidden_dropout_prob`.
      initializer_range: Standard deviation of freshly drawn weights.
      pad_token_id: Token used as padding by the tokenizer.
      id2label: Name of each output, in order.
      problem_type: `regression`, `single_label_classification`, or None, which stands
        for regression where there is a single output.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    initializer_range: float = 0.02
    pad_token_id: int = 0
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    problem_type: str | None = None

    def __post_init__(self) -> None:
        if self.model_type not in MODEL_TYPES:
            raise UsageError(
                f"`model_type` is {self.model_type!r}; known are "
                f"{', '.join(MODEL_TYPES)}."
            )
        check_sizes(self, _SIZES)
        check_rates(self, _RATES)
        if self.hidden_act not in ACTIVATIONS:
            raise UsageError(
                f"`hidden_act`={self.hidden_act!r} is not supported; known are "
                f"{', '.join(ACTIVATIONS)}."
            )
        if self.max_length < 1:
            raise UsageError(
                f"`max_position_embeddings`={self.max_position_embeddings} leaves no "
                f"position behind `pad_token_id`={self.pad_token_id}."
            )
        if not self.id2label:
            raise UsageError("`id2label` must name at least one output. Got none.")
        if self.problem_type not in (None, REGRESSION, SINGLE_LABEL):
            raise UsageError(
                f"`problem_type`={self.problem_type!r} is not supported; known are "
                f"{REGRESSION} and {SINGLE_LABEL}."
            )

    @property
    def num_labels(self) -> int:
        """Outputs of the classifier."""
        return len(self.id2label)

    @property
    def is_regression(self) -> bool:
        """Whether outputs are values and not scores of classes."""
        if self.problem_type is None:
            return self.num_labels == 1
        return self.problem_type == REGRESSION

    @property
    def head_dropout_prob(self) -> float:
        """Dropout rate of the head."""
        rate = self.classifier_dropout
        return self.hidden_dropout_prob if rate is None else rate

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def position_offset(self) -> int:
        """Row of the position table that belongs to the first token."""
        return self.pad_token_id + 1 if self.model_type == "roberta" else 0

    @property
    def max_length(self) -> int:
        """Longest sequence that has positions, in tokens."""
        return self.max_position_embeddings - self.position_offset

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], source: str) -> "ClassifierConfig":
        """Reads the content of a Hugging Face `config.json`.

        Args:
          mapping: The parsed JSON object.
          source: Where it came from, for error messages.

        Raises:
          CheckpointError: If the model type or a field is missing, unknown or of the
            wrong type, or labels are not numbered from 0; names `source` and the field.
        """
        model_type = mapping.get("model_type")
        if model_type not in _ALIASES:
            raise CheckpointError(
                f"{source}: `model_type` is {model_type!r}; classifiers that can be "
                f"loaded here are {', '.join(MODEL_TYPES)}."
            )
        if mapping.get("position_embedding_type", "absolute") != "absolute":
            raise CheckpointError(
                f"{source}: `position_embedding_type` is "
                f"{mapping['position_embedding_type']!r}; only 'absolute' is supported."
            )
        fixed = {"id2label": _labels(mapping, source), **_FIXED[model_type]}
        # Transformers leaves out what has its default, and RoBERTa has its own.
        defaults = {"pad_token_id": 1} if model_type == "roberta" else {}
        return read_fields(
            cls, {**defaults, **mapping}, source,
            aliases=_ALIASES[model_type], fixed=fixed,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """The content of a Hugging Face `config.json`; inverse of `from_dict`."""
        aliases, fixed = _ALIASES[self.model_type], _FIXED[self.model_type]
        named = {
            aliases.get(name, name): value
            for name, value in dataclasses.asdict(self).items()
            if name not in fixed and not (name == "problem_type" and value is None)
        }
        if self.model_type == "distilbert":
            named["seq_classif_dropout"] = self.head_dropout_prob
        return {
            "architectures": [_ARCHITECTURES[self.model_type]],
            **named,
            "id2label": {str(i): label for i, label in enumerate(self.id2label)},
            "label2id": {label: i for i, label in enumerate(self.id2label)},
        }


_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
_RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")


def _labels(mapping: Mapping[str, Any], source: str) -> tuple[str, ...]:
    found = mapping.get("id2label")
    if found is None:
        count = mapping.get("num_labels", 2)
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise CheckpointError(
                f"{source}: field `num_labels` is {count!r}; expected a count."
            )
        return tuple(f"LABEL_{i}" for i in range(count))
    numbers = [str(i) for i in range(len(found))] if isinstance(found, Mapping) else []
    if not numbers or set(map(str, found)) != set(numbers):
        raise CheckpointError(
            f"{source}: field `id2label` is {found!r}; expected names of the outputs "
            "0, 1, ..."
        )
    by_number = {str(key): str(value) for key, value in found.items()}
    return tuple(by_number[number] for number in numbers)
