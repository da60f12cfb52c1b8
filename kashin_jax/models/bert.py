"""BERT, RoBERTa and DistilBERT with a head for classes or values, in Flax NNX.

The three share an encoder, post-norm and bidirectional, and differ in the spelling of
their configuration, in positions and token types, in their heads and published names.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.models.architecture import Architecture
from kashin_jax.models.config_fields import (
    check_heads,
    check_known,
    check_rates,
    check_sizes,
    read_fields,
)
from kashin_jax.models.names import Names
from kashin_jax.models.transformer import (
    ACTIVATIONS,
    LayerFactory,
    LayerNorm,
    attend,
    split_heads,
)

__all__ = [
    "BERT",
    "DISTILBERT",
    "REGRESSION",
    "ROBERTA",
    "SINGLE_LABEL",
    "ClassifierConfig",
    "Embeddings",
    "Encoder",
    "EncoderLayer",
    "SequenceClassifier",
]

REGRESSION, SINGLE_LABEL = "regression", "single_label_classification"

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
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
_RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """Architecture of a sequence classifier; field names are those of BERT.

    Attributes:
      model_type: `bert`, `roberta` or `distilbert`.
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
      attention_probs_dropout_prob: Dropout rate of attention, training only.
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
        if self.model_type not in _ALIASES:
            raise UsageError(
                f"`model_type` is {self.model_type!r}; known are {', '.join(_ALIASES)}."
            )
        check_sizes(self, _SIZES)
        check_heads(self)
        check_rates(self, _RATES)
        check_known(self, "hidden_act", ACTIVATIONS)
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
                f"loaded here are {', '.join(_ALIASES)}."
            )
        if mapping.get("position_embedding_type", "absolute") != "absolute":
            raise CheckpointError(
                f"{source}: `position_embedding_type` is "
                f"{mapping['position_embedding_type']!r}; only 'absolute' is supported."
            )
        fixed = {"id2label": _labels(mapping, source), **_FIXED[model_type]}
        # Transformers leaves out what has its default, and RoBERTa has its own.
        defaults = {"pad_token_id": 1} if model_type == "roberta" else {}
        # No rate is no dropout. Without a token for padding none is masked; RoBERTa
        # needs it to count positions.
        nulls = dict.fromkeys(_RATES[:2], 0.0)
        nulls |= {} if model_type == "roberta" else {"pad_token_id": 0}
        return read_fields(
            cls, {**defaults, **mapping}, source,
            aliases=_ALIASES[model_type], fixed=fixed, nulls=nulls,
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


def _norm(config: ClassifierConfig, make: LayerFactory) -> LayerNorm:
    return make.layer_norm(config.hidden_size, epsilon=config.layer_norm_eps)


class Embeddings(nnx.Module):
    """Sum of token, position and type embeddings, normalised."""

    def __init__(self, config: ClassifierConfig, make: LayerFactory):
        width = config.hidden_size
        # Not the whole configuration: encoders that differ in their labels alone shall
        # be equal to JAX, and compile once.
        self.position_offset = config.position_offset
        self.pad_token_id = config.pad_token_id
        self.word_embeddings = make.embed(config.vocab_size, width)
        self.position_embeddings = make.embed(config.max_position_embeddings, width)
        self.token_type_embeddings = (
            make.embed(config.type_vocab_size, width)
            if config.type_vocab_size
            else None
        )
        self.norm = _norm(config, make)
        self.dropout = make.dropout(config.hidden_dropout_prob)

    def __call__(
        self,
        input_ids: Int[Array, "b t"],
        token_type_ids: Int[Array, "b t"],
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b t d"]:
        x = self.word_embeddings(input_ids)
        x = x + self.position_embeddings(self._positions(input_ids))
        if self.token_type_embeddings is not None:
            x = x + self.token_type_embeddings(token_type_ids)
        return self.dropout(self.norm(x), rngs=rngs)

    def _positions(self, input_ids: Int[Array, "b t"]) -> Int[Array, "#b t"]:
        if not self.position_offset:
            return jnp.arange(input_ids.shape[1])[None]
        # RoBERTa counts the tokens that are not padding, and gives padding its own row.
        is_real = (input_ids != self.pad_token_id).astype(jnp.int32)
        return jnp.cumsum(is_real, axis=1) * is_real + (self.position_offset - 1)


class EncoderLayer(nnx.Module):
    """Attention and feed-forward part, each normalised after its residual sum."""

    def __init__(self, config: ClassifierConfig, make: LayerFactory):
        width, hidden = config.hidden_size, config.intermediate_size
        self.head_dim = config.head_dim
        self.activation = config.hidden_act
        self.query = make.linear(width, width)
        self.key = make.linear(width, width)
        self.value = make.linear(width, width)
        self.attention_output = make.linear(width, width)
        self.attention_norm = _norm(config, make)
        self.intermediate = make.linear(width, hidden)
        self.output = make.linear(hidden, width)
        self.output_norm = _norm(config, make)
        self.attention_dropout = make.dropout(config.attention_probs_dropout_prob)
        self.dropout = make.dropout(config.hidden_dropout_prob)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        visible: Bool[Array, "b 1 1 t"],
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b t d"]:
        queries, keys, values = (
            split_heads(project(x), self.head_dim)
            for project in (self.query, self.key, self.value)
        )
        drop = functools.partial(self.attention_dropout, rngs=rngs)
        h = self.attention_output(attend(queries, keys, values, visible, drop))
        x = self.attention_norm(x + self.dropout(h, rngs=rngs))
        h = self.output(ACTIVATIONS[self.activation](self.intermediate(x)))
        return self.output_norm(x + self.dropout(h, rngs=rngs))


class Encoder(nnx.Module):
    """Embeddings and blocks."""

    def __init__(self, config: ClassifierConfig, make: LayerFactory):
        self.embeddings = Embeddings(config, make)
        self.layers = nnx.List(
            [EncoderLayer(config, make) for _ in range(config.num_hidden_layers)]
        )

    def __call__(
        self,
        input_ids: Int[Array, "b t"],
        attention_mask: Int[Array, "b t"],
        token_type_ids: Int[Array, "b t"],
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b t d"]:
        x = self.embeddings(input_ids, token_type_ids, rngs)
        visible = attention_mask.astype(bool)[:, None, None]
        for layer in self.layers:
            x = layer(x, visible, rngs)
        return x


class ClassificationHead(nnx.Module):
    """From the first token's vector to scores.

    BERT's has the output matrix only: the dense layer before it is the pooler, part of
    the pretrained encoder. Parameters lie below `classifier`, as in the published
    names, exactly where they do not belong to the encoder.
    """

    def __init__(self, config: ClassifierConfig, make: LayerFactory):
        self.model_type = config.model_type
        has_dense = config.model_type != "bert"
        width = config.hidden_size
        self.dense = make.linear(width, width) if has_dense else None
        self.out_proj = make.linear(width, config.num_labels)
        self.dropout = make.dropout(config.head_dropout_prob)

    def __call__(
        self, x: Float[Array, "b d"], rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b labels"]:
        if self.dense is not None and self.model_type == "roberta":
            x = jnp.tanh(self.dense(self.dropout(x, rngs=rngs)))
        elif self.dense is not None:
            x = jax.nn.relu(self.dense(x))
        return self.out_proj(self.dropout(x, rngs=rngs))


class SequenceClassifier(nnx.Module):
    """An encoder with a head that reads the first token.

    Starts in evaluation mode and then needs no rngs. `model.train()` turns dropout on;
    calls then take the keys as an argument, so the state of a model is its parameters
    and nothing else: `model(input_ids, rngs=nnx.Rngs(dropout=key))`.

    Attributes:
      config: The architecture.
      encoder: Embeddings and blocks.
      pooler: BERT's dense layer over the first token; None in the other models.
      classifier: The head.

    References:
      Devlin et al., "BERT" (2019), arXiv:1810.04805; Liu et al., "RoBERTa" (2019),
      arXiv:1907.11692; Sanh et al., "DistilBERT" (2019), arXiv:1910.01108.
    """

    def __init__(
        self,
        config: ClassifierConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        """Draws fresh weights.

        Args:
          config: The architecture.
          rngs: Source of the initial weights.
          dtype: Type of activations and matrix products. Softmax and the statistics of
            layer norms are float32 in any case.
          param_dtype: Type of the stored parameters.
        """
        make = LayerFactory(
            init_std=config.initializer_range,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        width = config.hidden_size
        self.config = config
        self.encoder = Encoder(config, make)
        self.pooler = make.linear(width, width) if config.model_type == "bert" else None
        self.classifier = ClassificationHead(config, make)

    def __call__(
        self,
        input_ids: Int[Array, "b t"],
        attention_mask: Int[Array, "b t"] | None = None,
        token_type_ids: Int[Array, "b t"] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b labels"]:
        """Scores of the classes, or values.

        Args:
          input_ids: Tokens, the special ones included; pad on the right, and RoBERTa
            with its own padding token.
          attention_mask: 1 for tokens, 0 for padding; all 1 when None.
          token_type_ids: 0 for the first sentence, 1 for the second; all 0 when None,
            and not used by models without token types.
          rngs: Stream `dropout`, in training mode only.

        Raises:
          ValueError: If the tokens exceed the positions of the model, or an argument is
            not of the shape of `input_ids`.
        """
        x = self.hidden_states(input_ids, attention_mask, token_type_ids, rngs=rngs)
        return self.classify(x[:, 0], rngs=rngs)

    def hidden_states(
        self,
        input_ids: Int[Array, "b t"],
        attention_mask: Int[Array, "b t"] | None = None,
        token_type_ids: Int[Array, "b t"] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b t d"]:
        """The last block's output; arguments and errors as for a call."""
        if input_ids.shape[1] > (limit := self.config.max_length):
            raise ValueError(
                f"`input_ids` has {input_ids.shape[1]} tokens; at most {limit} have "
                "positions. Shorten it."
            )
        mask, types = (
            _same_shape(name, given, fill, input_ids)
            for name, given, fill in (
                ("attention_mask", attention_mask, 1),
                ("token_type_ids", token_type_ids, 0),
            )
        )
        return self.encoder(input_ids, mask, types, rngs)

    def classify(
        self, first: Float[Array, "b d"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b labels"]:
        """The outputs for hidden states of the first token, BERT's pooler included."""
        if self.pooler is not None:
            first = jnp.tanh(self.pooler(first))
        return self.classifier(first, rngs).astype(jnp.float32)


def _same_shape(
    name: str,
    given: Int[Array, "..."] | None,
    fill: int,
    input_ids: Int[Array, "b t"],
) -> Int[Array, "b t"]:
    if given is None:
        return jnp.full(input_ids.shape, fill, jnp.int32)
    if given.shape != input_ids.shape:
        raise ValueError(
            f"`{name}` must have the shape of `input_ids`, {input_ids.shape}. Got "
            f"{given.shape}."
        )
    return given


# Published names of modules by ours, the prefix left out.
_EMBEDDINGS = {
    "encoder.embeddings.word_embeddings": "embeddings.word_embeddings",
    "encoder.embeddings.position_embeddings": "embeddings.position_embeddings",
    "encoder.embeddings.token_type_embeddings": "embeddings.token_type_embeddings",
    "encoder.embeddings.norm": "embeddings.LayerNorm",
}
_BERT_BLOCK = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}
_DISTILBERT_BLOCK = {
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "attention_output": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "intermediate": "ffn.lin1",
    "output": "ffn.lin2",
    "output_norm": "output_layer_norm",
}


def _encoder_names(published: str, block: Mapping[str, str]) -> dict[str, str]:
    """Names of an encoder whose blocks are published as `published.NUMBER`."""
    blocks = {
        f"encoder.layers.*.{ours}": f"{published}.*.{theirs}"
        for ours, theirs in block.items()
    }
    return _EMBEDDINGS | blocks


# Buffers of some versions of transformers, and heads of other tasks: checkpoints of
# bare encoders carry the one they were pretrained with.
_FOREIGN = (
    r"embeddings\.(position_ids|token_type_ids)$"
    r"|(cls|lm_head|qa_outputs|vocab_transform|vocab_layer_norm|vocab_projector)\."
)


def _architecture(
    model_type: str,
    names: Mapping[str, str],
    *,
    fresh: frozenset[str] = frozenset({"classifier"}),
    foreign: str = _FOREIGN,
) -> Architecture:
    return Architecture(
        model_type=model_type,
        config=ClassifierConfig,
        model=SequenceClassifier,
        names=Names(
            prefix=f"{model_type}.",
            bare=frozenset({"classifier", "pre_classifier"}),
            modules=names,
            ignored=re.compile(foreign),
        ),
        head="classifier",
        fresh=fresh,
    )


BERT = _architecture(
    "bert",
    _encoder_names("encoder.layer", _BERT_BLOCK)
    | {"pooler": "pooler.dense", "classifier.out_proj": "classifier"},
    fresh=frozenset({"classifier", "pooler"}),
)
ROBERTA = _architecture(
    "roberta",
    _encoder_names("encoder.layer", _BERT_BLOCK),
    foreign=rf"{_FOREIGN}|pooler\.",
)
DISTILBERT = _architecture(
    "distilbert",
    _encoder_names("transformer.layer", _DISTILBERT_BLOCK)
    | {"classifier.dense": "pre_classifier", "classifier.out_proj": "classifier"},
)
