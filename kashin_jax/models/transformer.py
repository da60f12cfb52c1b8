"""What all transformers here are made of: layers, attention, and its memory.

Every matrix product is an `nnx.Linear` that is only ever called, so that anything with
the same call can take its place.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

__all__ = [
    "ACTIVATIONS",
    "KVCache",
    "LayerCache",
    "LayerFactory",
    "LayerNorm",
    "Past",
    "RMSNorm",
    "Step",
    "attend",
    "check_length",
    "empty_cache",
    "mask_or_ones",
    "next_step",
    "remember",
    "remember_window",
    "soft_cap",
    "split_heads",
    "token_positions",
    "window_visible",
]

# Names are Hugging Face's: its "gelu" is exact, its "gelu_new" the tanh form.
ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}


class LayerNorm(nnx.LayerNorm):
    """Layer norm computed in float32, whatever the dtype of the stream."""

    def __call__(
        self, x: Float[Array, "*b d"], *, mask: Array | None = None
    ) -> Float[Array, "*b d"]:
        return super().__call__(x.astype(jnp.float32), mask=mask).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Division by the root of the mean square, computed in float32.

    Attributes:
      scale: What the quotient is multiplied by, less `offset`.
      epsilon: Added to the mean square.
      offset: 1 where scales are stored as differences from 1 (Gemma), else 0.

    References:
      Zhang and Sennrich, "Root mean square layer normalization" (2019),
      arXiv:1910.07467.
    """

    def __init__(
        self, width: int, *, epsilon: float, offset: float, param_dtype: DTypeLike
    ):
        self.scale = nnx.Param(jnp.full(width, 1 - offset, param_dtype))
        self.epsilon, self.offset = epsilon, offset

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        whole = x.astype(jnp.float32)
        square = jnp.mean(jnp.square(whole), axis=-1, keepdims=True)
        scale = self.scale[...].astype(jnp.float32) + self.offset
        scale = scale.reshape((1,) * (x.ndim - 1) + scale.shape)
        return (whole * jax.lax.rsqrt(square + self.epsilon) * scale).astype(x.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerFactory:
    """Makes the layers of one model: same dtypes, initialisation and rngs for all.

    Attributes:
      init_std: Standard deviation of fresh kernels and embeddings.
      dtype: Type of activations and products.
      param_dtype: Type of parameters.
      rngs: Source of fresh weights.
    """

    init_std: float
    dtype: DTypeLike
    param_dtype: DTypeLike
    rngs: nnx.Rngs

    def linear(self, d_in: int, d_out: int, *, use_bias: bool = True) -> nnx.Linear:
        """A matrix product."""
        return nnx.Linear(
            d_in,
            d_out,
            use_bias=use_bias,
            kernel_init=nnx.initializers.normal(self.init_std),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )

    def embed(self, rows: int, width: int) -> nnx.Embed:
        """A lookup table."""
        return nnx.Embed(
            rows,
            width,
            embedding_init=nnx.initializers.normal(self.init_std),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )

    def layer_norm(
        self, width: int, *, epsilon: float, affine: bool = True
    ) -> LayerNorm:
        """A layer norm over the residual stream."""
        # The fast variance, E[x^2] - E[x]^2, cancels for the few very large
        # coordinates that trained OPT models have.
        return LayerNorm(
            width,
            epsilon=epsilon,
            use_scale=affine,
            use_bias=affine,
            use_fast_variance=False,
            dtype=jnp.float32,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )

    def rms_norm(self, width: int, *, epsilon: float, offset: float = 0.0) -> RMSNorm:
        """A norm without a mean; see `RMSNorm`."""
        return RMSNorm(
            width, epsilon=epsilon, offset=offset, param_dtype=self.param_dtype
        )

    def dropout(self, rate: float) -> nnx.Dropout:
        """Dropout that is off until `train()` and holds no rngs of its own."""
        return nnx.Dropout(rate, deterministic=True)


def split_heads(
    x: Float[Array, "b t d"], head_dim: int
) -> Float[Array, "b t heads head_dim"]:
    """The stream as heads of `head_dim` neighbouring coordinates."""
    return x.reshape(*x.shape[:2], -1, head_dim)


def attend(
    queries: Float[Array, "b t heads head_dim"],
    keys: Float[Array, "b s groups head_dim"],
    values: Float[Array, "b s groups head_dim"],
    visible: Bool[Array, "b 1 #t s"],
    drop: Callable[[Float[Array, "b heads t s"]], Float[Array, "b heads t s"]] = (
        lambda weights: weights
    ),
    *,
    scale: float | None = None,
    cap: float | None = None,
) -> Float[Array, "b t d"]:
    """Multi-head attention with scores and softmax in float32, heads joined again.

    Args:
      queries: One per position that looks. Neighbouring heads share keys and values
        where there are fewer of these.
      keys: One per position that is looked at.
      values: What is seen there.
      visible: Whether position `s` may be seen from `t`.
      drop: Dropout of the attention probabilities.
      scale: Of the scores; `head_dim**-0.5` when None.
      cap: Bound of the scores' size, see `soft_cap`.
    """
    (b, t, heads, head_dim), (_, s, groups, _) = queries.shape, keys.shape
    grouped = queries.reshape(b, t, groups, heads // groups, head_dim)
    scores = jnp.einsum(
        "btgrd,bsgd->bgrts", grouped, keys, preferred_element_type=jnp.float32
    ).reshape(b, heads, t, s)
    scores = soft_cap(scores * (head_dim**-0.5 if scale is None else scale), cap)
    # A finite floor: rows of padding see nothing, and must not become NaN.
    floor = jnp.finfo(jnp.float32).min
    scores = jnp.where(visible, scores, floor)
    weights = drop(jax.nn.softmax(scores, axis=-1).astype(values.dtype))
    weights = weights.reshape(b, groups, heads // groups, t, s)
    mixed = jnp.einsum("bgrts,bsgd->btgrd", weights, values)
    return mixed.reshape(b, t, -1)


def soft_cap(x: Float[Array, "*b"], cap: float | None) -> Float[Array, "*b"]:
    """Squeezed smoothly between -cap and cap; as it is where there is none."""
    return x if cap is None else jnp.tanh(x / cap) * cap


class LayerCache(TypedDict):
    """Keys and values of one block; slots not yet written are zero.

    A dict, since blocks return it: `nnx.tabulate` shows no named tuples inside of what
    a layer returns, and ends in an error of indices.
    """

    keys: Float[Array, "b s heads head_dim"]
    values: Float[Array, "b s heads head_dim"]


class KVCache(NamedTuple):
    """Keys and values of the tokens that a decoder has read, in `s` fixed slots.

    Attributes:
      layers: One entry per block. A block that looks back over a window has no more
        slots than that, and token `i` in slot `i` modulo their number.
      mask: 1 where a slot holds a real token, 0 for padding and unused slots.
      length: Slots in use, padding included; the same for every row.
    """

    layers: tuple[LayerCache, ...]
    mask: Int[Array, "b s"]
    length: Int[Array, ""]


class Past(NamedTuple):
    """A block's cache and its first free slot."""

    cache: LayerCache
    start: Int[Array, ""]


class Step(NamedTuple):
    """Some more tokens for a cache.

    Attributes:
      mask: That of the cache, with the new tokens.
      positions: Of the new tokens, see `token_positions`.
      visible: Which slots each of them may see.
    """

    mask: Int[Array, "b s"]
    positions: Int[Array, "b t"]
    visible: Bool[Array, "b 1 t s"]


def empty_cache(
    batch_size: int,
    max_length: int,
    layers: Sequence[tuple[int, int, int]],
    dtype: DTypeLike,
) -> KVCache:
    """A cache that holds nothing.

    Args:
      batch_size: Rows.
      max_length: Slots of a row.
      layers: Of every block: slots, heads of keys and values, and their width.
      dtype: Type of keys and values.
    """

    def zeros(shape: tuple[int, int, int]) -> Float[Array, "b s heads head_dim"]:
        return jnp.zeros((batch_size, *shape), dtype)

    # No array twice, so that a cache can be donated.
    return KVCache(
        layers=tuple(
            LayerCache(keys=zeros(shape), values=zeros(shape)) for shape in layers
        ),
        mask=jnp.zeros((batch_size, max_length), jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def next_step(
    input_ids: Int[Array, "b t"],
    cache: KVCache,
    attention_mask: Int[Array, "b t"] | None,
) -> Step:
    """Where tokens that continue those in a cache stand, and what they may see.

    Raises:
      ValueError: If there are more than the cache has slots, or the mask is not of the
        shape of `input_ids`.
    """
    t, slots = input_ids.shape[1], cache.mask.shape[1]
    check_length("input_ids", t, slots)
    mask = jax.lax.dynamic_update_slice_in_dim(
        cache.mask, mask_or_ones(input_ids, attention_mask), cache.length, axis=1
    )
    positions = jax.lax.dynamic_slice_in_dim(
        token_positions(mask), cache.length, t, axis=1
    )
    now = cache.length + jnp.arange(t)
    causal = jnp.arange(slots)[None, :] <= now[:, None]
    return Step(mask, positions, causal[None, None] & mask.astype(bool)[:, None, None])


def remember(new: LayerCache, past: Past | None) -> LayerCache:
    """Keys and values that a block looks at: the new ones, behind those it has."""
    if past is None:
        return new
    return jax.tree.map(
        lambda old, new: jax.lax.dynamic_update_slice_in_dim(
            old, new, past.start, axis=1
        ),
        past.cache,
        new,
    )


def remember_window(new: LayerCache, past: Past) -> tuple[LayerCache, LayerCache]:
    """What a block with a window looks at, and what it keeps.

    It looks at all slots and, behind them, at the new tokens, of which there may be
    more than slots; it keeps the last of them in place of the oldest.
    """
    slots, t = past.cache["keys"].shape[1], new["keys"].shape[1]
    count = min(slots, t)
    index = (past.start + t - count + jnp.arange(count)) % slots
    seen = jax.tree.map(
        lambda old, new: jnp.concatenate([old, new], axis=1), past.cache, new
    )
    kept = jax.tree.map(
        lambda old, new: old.at[:, index].set(new[:, t - count :]), past.cache, new
    )
    return seen, kept


def window_visible(
    mask: Int[Array, "b s"], start: Int[Array, ""], t: int, window: int
) -> Bool[Array, "b 1 t seen"]:
    """What new tokens may see of what `remember_window` shows.

    Args:
      mask: Real tokens, the new ones included.
      start: Tokens that were read before.
      t: New tokens.
      window: Tokens that one may see, itself included; so many slots there are.
    """
    now = start + jnp.arange(t)
    # The last token before `start` that belongs into each slot; none below 0.
    old = start - 1 - (start - 1 - jnp.arange(window)) % window
    index = jnp.concatenate([old, now])
    near = (index[None, :] <= now[:, None]) & (index[None, :] > now[:, None] - window)
    real = mask.astype(bool)[:, jnp.maximum(index, 0)] & (index >= 0)[None, :]
    return near[None, None] & real[:, None, None]


def token_positions(mask: Int[Array, "b s"]) -> Int[Array, "b s"]:
    """Positions from 0 that count real tokens only; -1 for padding."""
    return jnp.cumsum(mask, axis=1) * mask - 1


def mask_or_ones(
    input_ids: Int[Array, "b t"], mask: Int[Array, "..."] | None
) -> Int[Array, "b t"]:
    """The attention mask of some tokens; all 1 when None.

    Raises:
      ValueError: If it is not of the shape of `input_ids`.
    """
    if mask is None:
        return jnp.ones(input_ids.shape, jnp.int32)
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` must have the shape of `input_ids`, {input_ids.shape}. "
            f"Got {mask.shape}."
        )
    return mask.astype(jnp.int32)


def check_length(name: str, length: int, limit: int) -> None:
    """Raises ValueError unless from 1 to `limit` tokens are given."""
    if not 1 <= length <= limit:
        raise ValueError(
            f"`{name}` has {length} tokens; between 1 and {limit} fit. Shorten it."
        )
