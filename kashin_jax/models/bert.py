"""BERT, RoBERTa and DistilBERT with a head for classes or values, in Flax NNX."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kashin_jax.models.classifier_config import ClassifierConfig
from kashin_jax.models.encoder import Encoder
from kashin_jax.models.transformer import LayerFactory

__all__ = ["ClassifierConfig", "SequenceClassifier"]


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
          dtype: Of activations and matrix products. Softmax and the statistics of
            layer norms are float32 in any case.
          param_dtype: Of the stored parameters.
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
