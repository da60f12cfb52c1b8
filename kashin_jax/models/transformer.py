"""What all transformers here are made of: layers, attention, and its memory.

Every matrix product is an `nnx.Linear` that is only ever called, so that anything with
the same call can take its place.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
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
    "attend",
    "check_length",
    "empty_cache",
    "mask_or_ones",
    "remember",
    "split_heads",
    "token_positions",
]

# Names are Hugging Face's: its "gelu" is exact, its "gelu_new" the tanh form.
ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}


class LayerNorm(nnx.LayerNorm):
    """Layer norm computed in float32, whatever the dtype of the stream."""

    def __call__(
        self, x: Float[Array, "*b d"], *, mask: Array | None = None
    ) -> Float[Array, "*b d"]:
        return super().__call__(x.astype(jnp.float32), mask=mask).astype(x.dtype)


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
    keys: Float[Array, "b s heads head_dim"],
    values: Float[Array, "b s heads head_dim"],
    visible: Bool[Array, "b 1 #t s"],
    drop: Callable[[Float[Array, "b heads t s"]], Float[Array, "b heads t s"]],
) -> Float[Array, "b t d"]:
    """Multi-head attention with scores and softmax in float32, heads joined again.

    Args:
      queries: One per position that looks.
      keys: One per position that is looked at.
      values: What is seen there.
      visible: Whether position `s` may be seen from `t`.
      drop: Dropout of the attention probabilities.
    """
    scores = jnp.einsum(
        "bthd,bshd->bhts", queries, keys, preferred_element_type=jnp.float32
    )
    # A finite floor: rows of padding see nothing, and must not become NaN.
    floor = jnp.finfo(jnp.float32).min
    scores = jnp.where(visible, scores * queries.shape[-1] ** -0.5, floor)
    weights = drop(jax.nn.softmax(scores, axis=-1).astype(values.dtype))
    mixed = jnp.einsum("bhts,bshd->bthd", weights, values)
    return mixed.reshape(*mixed.shape[:2], -1)


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
      layers: One entry per block.
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


def empty_cache(
    shape: tuple[int, int, int, int], num_layers: int, dtype: DTypeLike
) -> KVCache:
    """A cache that holds nothing.

    Args:
      shape: Rows, slots, heads of keys and values, and their width.
      num_layers: Number of blocks.
      dtype: Type of keys and values.
    """

    def zeros() -> Float[Array, "b s heads head_dim"]:
        return jnp.zeros(shape, dtype)

    # No array twice, so that a cache can be donated.
    return KVCache(
        layers=tuple(
            LayerCache(keys=zeros(), values=zeros()) for _ in range(num_layers)
        ),
        mask=jnp.zeros(shape[:2], jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


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
