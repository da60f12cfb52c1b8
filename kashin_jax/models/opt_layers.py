"""The blocks of OPT: attention and feed-forward parts, and what they remember."""

import functools
from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kashin_jax.models.opt_config import OPTConfig
from kashin_jax.models.transformer import (
    ACTIVATIONS,
    LayerFactory,
    LayerNorm,
    attend,
    split_heads,
)

__all__ = ["LayerCache", "OPTAttention", "OPTDecoderLayer", "Past", "layer_norm"]

_EPSILON = 1e-5


class LayerCache(NamedTuple):
    """Keys and values of one block; slots not yet written are zero."""

    keys: Float[Array, "b s heads head_dim"]
    values: Float[Array, "b s heads head_dim"]


class Past(NamedTuple):
    """A block's cache and its first free slot."""

    cache: LayerCache
    start: Int[Array, ""]


def layer_norm(config: OPTConfig, make: LayerFactory) -> LayerNorm:
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
        cache = LayerCache(keys, values)
        if past is not None:
            cache = jax.tree.map(
                lambda old, new: jax.lax.dynamic_update_slice_in_dim(
                    old, new, past.start, axis=1
                ),
                past.cache,
                cache,
            )
        drop = functools.partial(self.dropout, rngs=rngs)
        mixed = attend(queries, cache.keys, cache.values, visible, drop)
        return self.out_proj(mixed), cache


class OPTDecoderLayer(nnx.Module):
    """Attention and feed-forward part, each normalised before (or, 350m, after)."""

    def __init__(self, config: OPTConfig, make: LayerFactory):
        width, hidden, bias = config.hidden_size, config.ffn_dim, config.enable_bias
        self.norm_first = config.do_layer_norm_before
        self.activation = config.activation_function
        self.self_attn = OPTAttention(config, make)
        self.self_attn_layer_norm = layer_norm(config, make)
        self.fc1 = make.linear(width, hidden, use_bias=bias)
        self.fc2 = make.linear(hidden, width, use_bias=bias)
        self.final_layer_norm = layer_norm(config, make)
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
