"""Decoder-only language models of the Llama kind, all families in one, in Flax NNX.

A block is a grouped attention with rotary positions and a gated feed-forward part;
`decoder_config.py` says in what its families differ. Modules carry Hugging Face's
names, but for norms: families call different ones the same.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from kashin_jax.models.architecture import Architecture
from kashin_jax.models.decoder_config import FAMILIES, DecoderConfig
from kashin_jax.models.names import Names
from kashin_jax.models.rope import Angles, Rope, angles, rotate
from kashin_jax.models.transformer import (
    ACTIVATIONS,
    KVCache,
    LayerCache,
    LayerFactory,
    Past,
    RMSNorm,
    attend,
    check_length,
    empty_cache,
    mask_or_ones,
    next_step,
    remember,
    remember_window,
    soft_cap,
    split_heads,
    token_positions,
    window_visible,
)

__all__ = [
    "DECODERS",
    "DecoderAttention",
    "DecoderBlock",
    "DecoderForCausalLM",
    "DecoderMLP",
]

# Our norms of a block by the published names, for each way to place them.
_NORMS: Mapping[str, Mapping[str, str]] = {
    "before": {
        "attn_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
    },
    "after": {
        "attn_out_norm": "post_attention_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    },
    "around": {
        "attn_norm": "input_layernorm",
        "attn_out_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    },
}


# What a layer may see, by its window.
_Visible = dict[int | None, Bool[Array, "b 1 t s"]]


def _norm(config: DecoderConfig, width: int, make: LayerFactory) -> RMSNorm:
    return make.rms_norm(
        width, epsilon=config.rms_norm_eps, offset=config.family.norm_offset
    )


class DecoderAttention(nnx.Module):
    """Self-attention in which groups of heads share keys and values."""

    def __init__(self, config: DecoderConfig, layer: int, make: LayerFactory):
        width, head_dim, family = config.hidden_size, config.head_dim, config.family
        queries = config.num_attention_heads * head_dim
        keys = config.num_key_value_heads * head_dim
        bias = config.attention_bias or family.qkv_bias
        if family.fused:
            self.qkv_proj = make.linear(width, queries + 2 * keys, use_bias=bias)
        else:
            self.q_proj = make.linear(width, queries, use_bias=bias)
            self.k_proj = make.linear(width, keys, use_bias=bias)
            self.v_proj = make.linear(width, keys, use_bias=bias)
        self.o_proj = make.linear(queries, width, use_bias=config.attention_bias)
        if family.normed_heads != "none":
            by_head = family.normed_heads == "head"
            self.q_norm = _norm(config, head_dim if by_head else queries, make)
            self.k_norm = _norm(config, head_dim if by_head else keys, make)
        self.config, self.window = config, config.window(layer)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        visible: Bool[Array, "b 1 t s"],
        turn: Angles | None,
        past: Past | None = None,
    ) -> tuple[Float[Array, "b t d"], LayerCache]:
        queries, keys, values = self._heads(x)
        if turn is not None:
            queries, keys = rotate(queries, turn), rotate(keys, turn)
        new = LayerCache(keys=keys, values=values)
        if past is not None and past.cache["keys"].shape[1] == self.window:
            seen, kept = remember_window(new, past)
        else:
            seen = kept = remember(new, past)
        mixed = attend(
            queries,
            seen["keys"],
            seen["values"],
            visible,
            scale=self.config.score_scale,
            cap=self.config.attn_logit_softcapping,
        )
        return self.o_proj(mixed), kept

    def _heads(
        self, x: Float[Array, "b t d"]
    ) -> tuple[Float[Array, "b t heads head_dim"], ...]:
        """Queries, keys and values, not yet turned."""
        config, kind = self.config, self.config.family.normed_heads
        if config.family.fused:
            queries = config.num_attention_heads * config.head_dim
            keys = config.num_key_value_heads * config.head_dim
            rows = jnp.split(self.qkv_proj(x), (queries, queries + keys), axis=-1)
        else:
            rows = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        if kind == "row":
            rows[:2] = self.q_norm(rows[0]), self.k_norm(rows[1])
        heads = [split_heads(row, config.head_dim) for row in rows]
        if kind == "head":
            heads[:2] = self.q_norm(heads[0]), self.k_norm(heads[1])
        return tuple(heads)


class DecoderMLP(nnx.Module):
    """Feed-forward part whose hidden features are gated."""

    def __init__(self, config: DecoderConfig, make: LayerFactory):
        width, hidden = config.hidden_size, config.intermediate_size
        bias, self.is_fused = config.mlp_bias, config.family.fused
        if self.is_fused:
            self.gate_up_proj = make.linear(width, 2 * hidden, use_bias=bias)
        else:
            self.gate_proj = make.linear(width, hidden, use_bias=bias)
            self.up_proj = make.linear(width, hidden, use_bias=bias)
        self.down_proj = make.linear(hidden, width, use_bias=bias)
        self.activation = config.hidden_act

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        if self.is_fused:
            gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(ACTIVATIONS[self.activation](gate) * up)


class DecoderBlock(nnx.Module):
    """Attention and feed-forward part, with norms before, after or around them."""

    def __init__(self, config: DecoderConfig, layer: int, make: LayerFactory):
        self.self_attn = DecoderAttention(config, layer, make)
        self.mlp = DecoderMLP(config, make)
        self.multiplier = config.residual_multiplier

        def norm(name: str) -> RMSNorm | None:
            is_there = name in _NORMS[config.family.norms]
            return _norm(config, config.hidden_size, make) if is_there else None

        self.attn_norm = norm("attn_norm")
        self.attn_out_norm = norm("attn_out_norm")
        self.mlp_norm = norm("mlp_norm")
        self.mlp_out_norm = norm("mlp_out_norm")

    def __call__(
        self,
        x: Float[Array, "b t d"],
        visible: Bool[Array, "b 1 t s"],
        turn: Angles | None,
        past: Past | None = None,
    ) -> tuple[Float[Array, "b t d"], LayerCache]:
        h = x if self.attn_norm is None else self.attn_norm(x)
        h, cache = self.self_attn(h, visible, turn, past)
        h = h if self.attn_out_norm is None else self.attn_out_norm(h)
        x = x + h * self.multiplier
        h = self.mlp(x if self.mlp_norm is None else self.mlp_norm(x))
        h = h if self.mlp_out_norm is None else self.mlp_out_norm(h)
        return x + h * self.multiplier, cache


class DecoderForCausalLM(nnx.Module):
    """A language model of any of the families in `FAMILIES`.

    It has no dropout, so that training and evaluation mode are the same.

    Attributes:
      config: The architecture.
      embed_tokens: Token embedding.
      layers: Blocks.
      norm: Behind the last block.
      lm_head: Output matrix, or `None` when tied to the token embedding.

    References:
      Touvron et al., "Llama 2" (2023), arXiv:2307.09288. Jiang et al., "Mistral 7B"
      (2023), arXiv:2310.06825. Yang et al., "Qwen2.5" (2024), arXiv:2412.15115, and
      "Qwen3" (2025), arXiv:2505.09388. Gemma Team, "Gemma 2" (2024), arXiv:2408.00118,
      and "Gemma 3" (2025), arXiv:2503.19786. Abdin et al., "Phi-3" (2024),
      arXiv:2404.14219. Walsh et al., "2 OLMo 2 Furious" (2024), arXiv:2501.00656.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        """Draws fresh weights.

        Args:
          config: The architecture.
          rngs: Source of the initial weights.
          dtype: Type of activations and matrix products. Norms, rotary positions and
            softmax are computed in float32 in any case.
          param_dtype: Type of the stored parameters.
        """
        make = LayerFactory(
            init_std=config.initializer_range,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.config = config
        self.dtype = dtype
        self.embed_tokens = make.embed(config.vocab_size, config.hidden_size)
        self.layers: nnx.List[Any] = nnx.List(
            [DecoderBlock(config, i, make) for i in range(config.num_hidden_layers)]
        )
        self.norm = _norm(config, config.hidden_size, make)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else make.linear(config.hidden_size, config.vocab_size, use_bias=False)
        )

    def __call__(
        self,
        input_ids: Int[Array, "b t"],
        attention_mask: Int[Array, "b t"] | None = None,
    ) -> Float[Array, "b t vocab"]:
        """Logits of the next token at every position, in float32.

        Args:
          input_ids: Tokens. Not checked against the vocabulary; too large an id makes
            the logits of its row NaN.
          attention_mask: 1 for real tokens, 0 for padding, on either side. Positions
            count real tokens only. Logits at padding are finite and meaningless.

        Returns:
          Unnormalised log-probabilities; position `i` has seen tokens up to `i`.

        Raises:
          ValueError: If the sequence is longer than the model has positions, or the
            mask is not of the shape of `input_ids`.
        """
        t = input_ids.shape[1]
        check_length("input_ids", t, self.config.context_length)
        mask = mask_or_ones(input_ids, attention_mask)
        real = mask.astype(bool)[:, None, None]
        now = jnp.arange(t)
        causal = now[None, :] <= now[:, None]
        visible: _Visible = {None: causal[None, None] & real}
        if (window := self.config.sliding_window) is not None:
            near = causal & (now[None, :] > now[:, None] - window)
            visible[window] = near[None, None] & real
        x, _ = self._read(input_ids, token_positions(mask), visible, t)
        return self._logits(x)

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for `max_length` tokens per row, padding included.

        Rotary positions that depend on the length of the text take this one.
        """
        config = self.config
        check_length("max_length", max_length, config.context_length)
        windows = (config.window(i) or max_length for i in range(len(self.layers)))
        layers = [
            (min(window, max_length), config.num_key_value_heads, config.head_dim)
            for window in windows
        ]
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
        t, slots = input_ids.shape[1], cache.mask.shape[1]
        visible: _Visible = {None: step.visible}
        if (window := self.config.sliding_window) is not None:
            # A cache of fewer slots keeps everything, as that of other layers does.
            visible[window] = (
                step.visible
                if slots < window
                else window_visible(step.mask, cache.length, t, window)
            )
        x, layers = self._read(input_ids, step.positions, visible, slots, cache)
        return self._logits(x[:, -1]), KVCache(layers, step.mask, cache.length + t)

    def _read(
        self,
        input_ids: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        visible: _Visible,
        length: int,
        past: KVCache | None = None,
    ) -> tuple[Float[Array, "b t d"], tuple[LayerCache, ...]]:
        """Embeddings and blocks; what is visible depends on a layer's window."""
        config, turns = self.config, self._turns(positions, length)
        x = self._embed(input_ids, positions)
        caches = []
        for i, block in enumerate(self.layers):
            own = None if past is None else Past(past.layers[i], past.length)
            turn = turns.get(config.rope_of(i))
            x, cache = block(x, visible[config.window(i)], turn, own)
            caches.append(cache)
        return self.norm(x), tuple(caches)

    def _embed(
        self, input_ids: Int[Array, "b t"], positions: Int[Array, "b t"]
    ) -> Float[Array, "b t d"]:
        x = self.embed_tokens(input_ids)
        return x * jnp.asarray(self.config.embedding_scale, x.dtype)

    def _turns(
        self, positions: Int[Array, "b t"], length: int
    ) -> dict[Rope | None, Angles]:
        """The angles of every rope that a layer has."""
        config = self.config
        # In the order of the layers: a program is kept under its text.
        ropes = dict.fromkeys(map(config.rope_of, range(len(self.layers))))
        return {
            rope: angles(
                rope,
                positions,
                head_dim=config.head_dim,
                length=length,
                max_positions=config.max_position_embeddings,
            )
            for rope in ropes
            if rope is not None
        }

    def _logits(self, x: Float[Array, "*b d"]) -> Float[Array, "*b vocab"]:
        logits = (
            self.embed_tokens.attend(x) if self.lm_head is None else self.lm_head(x)
        )
        scaled = logits.astype(jnp.float32) / self.config.logits_scaling
        return soft_cap(scaled, self.config.final_logit_softcapping)


def _architecture(model_type: str) -> Architecture:
    family = FAMILIES[model_type]
    norms = _NORMS[family.norms].items()
    modules = {f"layers.*.{ours}": f"layers.*.{theirs}" for ours, theirs in norms}
    return Architecture(
        model_type=model_type,
        config=DecoderConfig,
        model=DecoderForCausalLM,
        # Frequencies of rotary positions were stored once.
        names=Names(
            modules=modules,
            ignored=re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq$"),
        ),
        tied=(("lm_head", "kernel"), ("embed_tokens", "embedding")),
        tied_by_default=bool(family.defaults.get("tie_word_embeddings", False)),
    )


DECODERS: tuple[Architecture, ...] = tuple(map(_architecture, FAMILIES))
"""An entry of the registry for every family."""
