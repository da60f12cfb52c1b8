"""OPT, the decoder-only language model of Zhang et al. (2022), in Flax NNX.

Modules carry Hugging Face's names.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from kashin_jax.errors import CheckpointError
from kashin_jax.models.architecture import Architecture
from kashin_jax.models.config_fields import (
    TokenIds,
    check_heads,
    check_known,
    check_rates,
    check_sizes,
    read_fields,
)
from kashin_jax.models.names import Names
from kashin_jax.models.transformer import (
    ACTIVATIONS,
    KVCache,
    LayerCache,
    LayerFactory,
    LayerNorm,
    Past,
    attend,
    check_length,
    empty_cache,
    mask_or_ones,
    next_step,
    remember,
    split_heads,
    token_positions,
)

__all__ = [
    "OPT",
    "OPTAttention",
    "OPTConfig",
    "OPTDecoder",
    "OPTDecoderLayer",
    "OPTForCausalLM",
]

# OPT's position table has two rows in front that belong to padding.
POSITION_OFFSET = 2
_EPSILON = 1e-5
# The only field that Hugging Face spells in a way a dataclass should not.
_ALIASES = {"remove_final_layer_norm": "_remove_final_layer_norm"}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "ffn_dim",
    "num_attention_heads",
    "max_position_embeddings",
    "word_embed_proj_dim",
)
_RATES = ("dropout", "attention_dropout")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class OPTConfig:
    """Architecture of an OPT language model; field names are Hugging Face's.

    Layer dropping (`layerdrop`) is not implemented and not read; every published
    model has it at 0.

    Attributes:
      vocab_size: Rows of the token embedding.
      hidden_size: Width of the residual stream.
      num_hidden_layers: Number of blocks.
      ffn_dim: Width of the hidden layer of each feed-forward part.
      num_attention_heads: Heads per block; divides `hidden_size`.
      max_position_embeddings: Longest sequence that has positions. Says nothing of
        the length a model was trained at.
      word_embed_proj_dim: Width of the token embedding; `None` means `hidden_size`.
        Where it differs (opt-350m) two linears lead in and out of the stream.
      do_layer_norm_before: Pre-norm blocks and a final layer norm. False is opt-350m:
        post-norm blocks, no final norm.
      remove_final_layer_norm: Leaves the final norm out of a pre-norm model, for
        checkpoints fine-tuned before transformers 4.20.1.
      enable_bias: Whether the linears of the blocks have biases.
      layer_norm_elementwise_affine: Whether layer norms have scale and bias.
      activation_function: One of `ACTIVATIONS`.
      tie_word_embeddings: Whether the token embedding is also the output matrix.
      dropout: Rate on the output of attention and feed-forward parts, training only.
      attention_dropout: Rate on attention probabilities, training only.
      init_std: Standard deviation of freshly drawn weights.
      pad_token_id: Token used as padding by the tokenizer.
      bos_token_id: Token that starts a text.
      eos_token_id: Token that ends a text, or several of which any does.
    """

    model_type: ClassVar[str] = "opt"

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    ffn_dim: int
    num_attention_heads: int
    max_position_embeddings: int
    word_embed_proj_dim: int | None = None
    do_layer_norm_before: bool = True
    remove_final_layer_norm: bool = False
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    activation_function: str = "relu"
    tie_word_embeddings: bool = True
    dropout: float = 0.1
    attention_dropout: float = 0.0
    init_std: float = 0.02
    pad_token_id: int | None = 1
    bos_token_id: int | None = 2
    eos_token_id: TokenIds = 2

    def __post_init__(self) -> None:
        check_sizes(self, _SIZES)
        check_heads(self)
        check_known(self, "activation_function", ACTIVATIONS)
        check_rates(self, _RATES)

    @property
    def embedding_size(self) -> int:
        """Width of the token embedding."""
        return self.word_embed_proj_dim or self.hidden_size

    @property
    def context_length(self) -> int:
        """Tokens of the longest text that has positions."""
        return self.max_position_embeddings

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def has_final_layer_norm(self) -> bool:
        """Whether a layer norm follows the last block."""
        return self.do_layer_norm_before and not self.remove_final_layer_norm

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], source: str) -> "OPTConfig":
        """Reads the content of a Hugging Face `config.json`.

        Sizes must be present; other fields default as they do at Hugging Face, and
        fields unknown here are ignored.

        Args:
          mapping: The parsed JSON object.
          source: Where it came from, for error messages.

        Returns:
          The configuration.

        Raises:
          CheckpointError: If the model type is not "opt", a size is missing, or a
            value is of the wrong type or not supported; names `source` and the field.
        """
        model_type = mapping.get("model_type", "opt")
        if model_type != "opt":
            raise CheckpointError(
                f"{source}: `model_type` is {model_type!r}; only 'opt' checkpoints can "
                "be loaded here."
            )
        # No rate is no dropout.
        nulls = dict.fromkeys(_RATES, 0.0)
        return read_fields(cls, mapping, source, aliases=_ALIASES, nulls=nulls)

    def to_dict(self) -> dict[str, Any]:
        """The content of a Hugging Face `config.json`; inverse of `from_dict`."""
        fields = dataclasses.asdict(self)
        named = {_ALIASES.get(name, name): value for name, value in fields.items()}
        return {
            "architectures": ["OPTForCausalLM"],
            "model_type": self.model_type,
            **named,
            "word_embed_proj_dim": self.embedding_size,
        }


def _layer_norm(config: OPTConfig, make: LayerFactory) -> LayerNorm:
    """A norm of the residual stream."""
    affine = config.layer_norm_elementwise_affine
    return make.layer_norm(config.hidden_size, epsilon=_EPSILON, affine=affine)


class OPTAttention(nnx.Module):
    """Multi-head self-attention with a softmax in float32."""

    def __init__(self, config: OPTConfig, make: LayerFactory):
        width = config.hidden_size
        self.head_dim = config.head_dim
        self.q_proj = make.linear(width, width, use_bias=config.enable_bias)
        self.k_proj = make.linear(width, width, use_bias=config.enable_bias)
        self.v_proj = make.linear(width, width, use_bias=config.enable_bias)
        self.out_proj = make.linear(width, width, use_bias=config.enable_bias)
        self.dropout = make.dropout(config.attention_dropout)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        visible: Bool[Array, "b 1 t s"],
        past: Past | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "b t d"], LayerCache]:
        queries, keys, values = (
            split_heads(project(x), self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        cache = remember(LayerCache(keys=keys, values=values), past)
        drop = functools.partial(self.dropout, rngs=rngs)
        mixed = attend(queries, cache["keys"], cache["values"], visible, drop)
        return self.out_proj(mixed), cache


class OPTDecoderLayer(nnx.Module):
    """Attention and feed-forward part, each normalised before (or, 350m, after)."""

    def __init__(self, config: OPTConfig, make: LayerFactory):
        width, hidden, bias = config.hidden_size, config.ffn_dim, config.enable_bias
        self.norm_first = config.do_layer_norm_before
        self.activation = config.activation_function
        self.self_attn = OPTAttention(config, make)
        self.self_attn_layer_norm = _layer_norm(config, make)
        self.fc1 = make.linear(width, hidden, use_bias=bias)
        self.fc2 = make.linear(hidden, width, use_bias=bias)
        self.final_layer_norm = _layer_norm(config, make)
        self.dropout = make.dropout(config.dropout)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        visible: Bool[Array, "b 1 t s"],
        past: Past | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "b t d"], LayerCache]:
        h = self.self_attn_layer_norm(x) if self.norm_first else x
        h, cache = self.self_attn(h, visible, past, rngs)
        x = x + self.dropout(h, rngs=rngs)
        if not self.norm_first:
            x = self.self_attn_layer_norm(x)
        h = self.final_layer_norm(x) if self.norm_first else x
        h = self.fc2(ACTIVATIONS[self.activation](self.fc1(h)))
        x = x + self.dropout(h, rngs=rngs)
        if not self.norm_first:
            x = self.final_layer_norm(x)
        return x, cache


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
            _layer_norm(config, make) if config.has_final_layer_norm else None
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
          dtype: Type of activations and matrix products. Softmax and the statistics of
            layer norms are float32 in any case.
          param_dtype: Type of the stored parameters.
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
        check_length("input_ids", t, self.config.max_position_embeddings)
        mask = mask_or_ones(input_ids, attention_mask)
        causal = jnp.tril(jnp.ones((t, t), bool))
        visible = causal[None, None] & mask.astype(bool)[:, None, None]
        x, _ = self.decoder(input_ids, token_positions(mask), visible, rngs=rngs)
        return self._logits(x)

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for `max_length` tokens per row, padding included."""
        check_length("max_length", max_length, self.config.max_position_embeddings)
        config = self.config
        layer = (max_length, config.num_attention_heads, config.head_dim)
        layers = [layer] * config.num_hidden_layers
        return empty_cache(batch_size, max_length, layers, self.dtype)

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
        step = next_step(input_ids, cache, attention_mask)
        x, layers = self.decoder(input_ids, step.positions, step.visible, cache)
        length = cache.length + input_ids.shape[1]
        return self._logits(x[:, -1]), KVCache(layers, step.mask, length)

    def _logits(self, x: Float[Array, "*b e"]) -> Float[Array, "*b vocab"]:
        if self.lm_head is None:
            return self.decoder.embed_tokens.attend(x).astype(jnp.float32)
        return self.lm_head(x).astype(jnp.float32)


OPT = Architecture(
    model_type=OPTConfig.model_type,
    config=OPTConfig,
    model=OPTForCausalLM,
    # The version is left in some conversions from fairseq; a number, not a weight.
    names=Names(ignored=re.compile(r"decoder\.version$")),
    tied=(("lm_head", "kernel"), ("decoder", "embed_tokens", "embedding")),
    tied_by_default=True,
)
