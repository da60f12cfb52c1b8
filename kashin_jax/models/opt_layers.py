"""The blocks of OPT: attention and feed-forward parts, and what they remember.

Every matrix product is an `nnx.Linear` that is only ever called, so that anything with
the same call can take its place.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from kashin_jax.models.opt_config import OPTConfig

__all__ = ["LayerCache", "LayerFactory", "OPTAttention", "OPTDecoderLayer", "Past"]

_EPSILON = 1e-5
_ACTIVATION_FNS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}


class LayerCache(NamedTuple):
    """Keys and values of one block; slots not yet written are zero."""

    keys: Float[Array, "b s heads head_dim"]
    values: Float[Array, "b s heads head_dim"]


class Past(NamedTuple):
    """A block's cache and its first free slot."""

    cache: LayerCache
    start: Int[Array, ""]


class LayerNorm(nnx.LayerNorm):
    """Layer norm computed in float32, whatever the dtype of the stream."""

    def __call__(
        self, x: Float[Array, "*b d"], *, mask: Array | None = None
    ) -> Float[Array, "*b d"]:
        return super().__call__(x.astype(jnp.float32), mask=mask).astype(x.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerFactory:
    """Makes the layers of one model: same dtypes, initialisation and rngs for all."""

    config: OPTConfig
    dtype: DTypeLike
    param_dtype: DTypeLike
    rngs: nnx.Rngs

    def linear(self, d_in: int, d_out: int, *, use_bias: bool) -> nnx.Linear:
        """A matrix product."""
        return nnx.Linear(
            d_in,
            d_out,
            use_bias=use_bias,
            kernel_init=nnx.initializers.normal(self.config.init_std),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )

    def embed(self, rows: int, width: int) -> nnx.Embed:
        """A lookup table."""
        return nnx.Embed(
            rows,
            width,
            embedding_init=nnx.initializers.normal(self.config.init_std),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )

    def layer_norm(self) -> LayerNorm:
        """A layer norm over the residual stream."""
        affine = self.config.layer_norm_elementwise_affine
        # The fast variance, E[x^2] - E[x]^2, cancels for the few very large
        # coordinates that trained OPT models have.
        return LayerNorm(
            self.config.hidden_size,
            epsilon=_EPSILON,
            use_scale=affine,
            use_bias=affine,
            use_fast_variance=False,
            dtype=jnp.float32,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )

    def dropout(self, rate: float) -> nnx.Dropout:
        """Dropout that is off until `train()` and holds no rngs of its own."""
        return nnx.Dropout(rate, deterministic=True)


class OPTAttention(nnx.Module):
    """Multi-head self-attention with a softmax in float32."""

    def __init__(self, make: LayerFactory):
        config, width = make.config, make.config.hidden_size
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
        queries = self._heads(self.q_proj(x))
        cache = LayerCache(self._heads(self.k_proj(x)), self._heads(self.v_proj(x)))
        if past is not None:
            cache = jax.tree.map(
                lambda old, new: jax.lax.dynamic_update_slice_in_dim(
                    old, new, past.start, axis=1
                ),
                past.cache,
                cache,
            )
        scores = jnp.einsum(
            "bthd,bshd->bhts",
            queries,
            cache.keys,
            preferred_element_type=jnp.float32,
        )
        # A finite floor: rows of padding see nothing, and must not become NaN.
        floor = jnp.finfo(jnp.float32).min
        scores = jnp.where(visible, scores * self.head_dim**-0.5, floor)
        weights = jax.nn.softmax(scores, axis=-1).astype(cache.values.dtype)
        weights = self.dropout(weights, rngs=rngs)
        mixed = jnp.einsum("bhts,bshd->bthd", weights, cache.values)
        return self.out_proj(mixed.reshape(x.shape)), cache

    def _heads(self, x: Float[Array, "b t d"]) -> Float[Array, "b t heads head_dim"]:
        return x.reshape(*x.shape[:2], -1, self.head_dim)


class OPTDecoderLayer(nnx.Module):
    """Attention and feed-forward part, each normalised before (or, 350m, after)."""

    def __init__(self, make: LayerFactory):
        config = make.config
        width, hidden, bias = config.hidden_size, config.ffn_dim, config.enable_bias
        self.norm_first = config.do_layer_norm_before
        self.activation = config.activation_function
        self.self_attn = OPTAttention(make)
        self.self_attn_layer_norm = make.layer_norm()
        self.fc1 = make.linear(width, hidden, use_bias=bias)
        self.fc2 = make.linear(hidden, width, use_bias=bias)
        self.final_layer_norm = make.layer_norm()
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
        h = self.fc2(_ACTIVATION_FNS[self.activation](self.fc1(h)))
        x = x + self.dropout(h, rngs=rngs)
        if not self.norm_first:
            x = self.final_layer_norm(x)
        return x, cache
