"""The encoder that BERT, RoBERTa and DistilBERT share: post-norm, bidirectional."""

import functools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kashin_jax.models.classifier_config import ClassifierConfig
from kashin_jax.models.transformer import (
    ACTIVATIONS,
    LayerFactory,
    LayerNorm,
    attend,
    split_heads,
)

__all__ = ["Embeddings", "Encoder", "EncoderLayer"]


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
