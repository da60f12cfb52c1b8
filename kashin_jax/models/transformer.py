"""What all transformers here are made of: layers with one set of choices, attention.

Every matrix product is an `nnx.Linear` that is only ever called, so that anything with
the same call can take its place.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

__all__ = ["ACTIVATIONS", "LayerFactory", "LayerNorm", "attend", "split_heads"]

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
      dtype: Of activations and products.
      param_dtype: Of parameters.
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
