"""OPT, the decoder-only language model of Zhang et al. (2022), in Flax NNX.

Modules carry Hugging Face's names.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from kashin_jax.models.opt_config import OPTConfig
from kashin_jax.models.opt_layers import (
    LayerCache,
    OPTDecoderLayer,
    Past,
    layer_norm,
)
from kashin_jax.models.transformer import LayerFactory

__all__ = ["KVCache", "LayerCache", "OPTConfig", "OPTForCausalLM"]

# OPT's position table has two rows in front that belong to padding.
POSITION_OFFSET = 2


class KVCache(NamedTuple):
    """What a decoder remembers of the tokens it has read, in `s` fixed slots.

    Attributes:
      layers: One entry per block.
      mask: 1 where a slot holds a real token, 0 for padding and unused slots.
      length: Slots in use, padding included; the same for every row.
    """

    layers: tuple[LayerCache, ...]
    mask: Int[Array, "b s"]
    length: Int[Array, ""]


class OPTDecoder(nnx.Module):
    """Embeddings, blocks and what follows them, up to the output matrix."""

    def __init__(self, config: OPTConfig, make: LayerFactory):
        width, embedding = config.hidden_size, config.embedding_size
        positions = config.max_position_embeddings + POSITION_OFFSET
        projected = embedding != width
        self.embed_tokens = make.embed(config.vocab_size, embedding)
        self.embed_positions = make.embed(positions, width)
        self.project_in = (
            make.linear(embedding, width, use_bias=False) if projected else None
        )
        self.project_out = (
            make.linear(width, embedding, use_bias=False) if projected else None
        )
        self.layers = nnx.List(
            [OPTDecoderLayer(config, make) for _ in range(config.num_hidden_layers)]
        )
        self.final_layer_norm = (
            layer_norm(config, make) if config.has_final_layer_norm else None
        )

    def __call__(
        self,
        input_ids: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        visible: Bool[Array, "b 1 t s"],
        past: KVCache | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "b t e"], tuple[LayerCache, ...]]:
        x = self.embed_tokens(input_ids)
        if self.project_in is not None:
            x = self.project_in(x)
        x = x + self.embed_positions(positions + POSITION_OFFSET)
        caches = []
        for i, layer in enumerate(self.layers):
            layer_past = None if past is None else Past(past.layers[i], past.length)
            x, cache = layer(x, visible, layer_past, rngs)
            caches.append(cache)
        if self.final_layer_norm is not None:
            x = self.final_layer_norm(x)
        if self.project_out is not None:
            x = self.project_out(x)
        return x, tuple(caches)


class OPTForCausalLM(nnx.Module):
    """OPT with its language-modelling head.

    Starts in evaluation mode and then needs no rngs. `model.train()` turns dropout on;
    calls then take the keys as an argument, so the state of a model is its parameters
    and nothing else: `model(input_ids, rngs=nnx.Rngs(dropout=key))`.

    Attributes:
      config: The architecture.
      decoder: Embeddings and blocks.
      lm_head: Output matrix, or `None` when tied to the token embedding.

    References:
      Zhang et al., "OPT: Open pre-trained transformer language models" (2022),
      arXiv:2205.01068.
    """

    def __init__(
        self,
        config: OPTConfig,
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
            init_std=config.init_std, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.config = config
        self.dtype = dtype
        self.decoder = OPTDecoder(config, make)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else make.linear(config.embedding_size, config.vocab_size, use_bias=False)
        )

    def __call__(
        self,
        input_ids: Int[Array, "b t"],
        attention_mask: Int[Array, "b t"] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b t vocab"]:
        """Logits of the next token at every position, in float32.

        Args:
          input_ids: Tokens. Not checked against the vocabulary; too large an id makes
            the logits of its row NaN.
          attention_mask: 1 for real tokens, 0 for padding, on either side. Positions
            count real tokens only. Logits at padding are finite and meaningless.
          rngs: Keys for dropout; needed in training mode only.

        Returns:
          Unnormalised log-probabilities; position `i` has seen tokens up to `i`.

        Raises:
          ValueError: If the sequence is longer than the model has positions, or the
            mask is not of the shape of `input_ids`.
        """
        t = input_ids.shape[1]
        _check_length("input_ids", t, self.config.max_position_embeddings)
        mask = _mask_or_ones(input_ids, attention_mask)
        causal = jnp.tril(jnp.ones((t, t), bool))
        visible = causal[None, None] & mask.astype(bool)[:, None, None]
        x, _ = self.decoder(input_ids, _positions(mask), visible, rngs=rngs)
        return self._logits(x)

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for `max_length` tokens per row, padding included."""
        _check_length("max_length", max_length, self.config.max_position_embeddings)
        heads, width = self.config.num_attention_heads, self.config.head_dim
        shape = (batch_size, max_length, heads, width)

        def zeros() -> Float[Array, "b s heads head_dim"]:
            return jnp.zeros(shape, self.dtype)

        # No array twice, so that a cache can be donated.
        layers = range(self.config.num_hidden_layers)
        return KVCache(
            layers=tuple(LayerCache(zeros(), zeros()) for _ in layers),
            mask=jnp.zeros((batch_size, max_length), jnp.int32),
            length=jnp.zeros((), jnp.int32),
        )

    def decode(
        self,
        input_ids: Int[Array, "b t"],
        cache: KVCache,
        attention_mask: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b vocab"], KVCache]:
        """Reads `t` more tokens and predicts the one that follows them.

        Args:
          input_ids: Tokens that continue those in the cache. That `t` slots are free
            is not checked: the number in use is known only at run time.
          cache: From `init_cache` or an earlier call; not changed.
          attention_mask: As for a call. Rows must end in a real token, so pad on the
            left.

        Returns:
          Float32 logits of the next token, and the cache with the new tokens in it.

        Raises:
          ValueError: If `input_ids` is longer than the cache, or the mask is not of
            the shape of `input_ids`.
        """
        t, slots = input_ids.shape[1], cache.mask.shape[1]
        _check_length("input_ids", t, slots)
        mask = jax.lax.dynamic_update_slice_in_dim(
            cache.mask, _mask_or_ones(input_ids, attention_mask), cache.length, axis=1
        )
        positions = jax.lax.dynamic_slice_in_dim(
            _positions(mask), cache.length, t, axis=1
        )
        now = cache.length + jnp.arange(t)
        causal = jnp.arange(slots)[None, :] <= now[:, None]
        visible = causal[None, None] & mask.astype(bool)[:, None, None]
        x, layers = self.decoder(input_ids, positions, visible, cache)
        return self._logits(x[:, -1]), KVCache(layers, mask, cache.length + t)

    def _logits(self, x: Float[Array, "*b e"]) -> Float[Array, "*b vocab"]:
        if self.lm_head is None:
            return self.decoder.embed_tokens.attend(x).astype(jnp.float32)
        return self.lm_head(x).astype(jnp.float32)


def _positions(mask: Int[Array, "b s"]) -> Int[Array, "b s"]:
    # Padding gets -1, row 1 of the table, as at Hugging Face.
    return jnp.cumsum(mask, axis=1) * mask - 1


def _mask_or_ones(
    input_ids: Int[Array, "b t"], mask: Int[Array, "..."] | None
) -> Int[Array, "b t"]:
    if mask is None:
        return jnp.ones(input_ids.shape, jnp.int32)
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` must have the shape of `input_ids`, {input_ids.shape}. "
            f"Got {mask.shape}."
        )
    return mask.astype(jnp.int32)


def _check_length(name: str, length: int, limit: int) -> None:
    if not 1 <= length <= limit:
        raise ValueError(
            f"`{name}` has {length} tokens; between 1 and {limit} fit. Shorten it."
        )
