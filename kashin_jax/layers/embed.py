"""`QuantizedEmbed`: the drop-in for `nnx.Embed` whose table stays packed."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype as default_promote_dtype
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer, Key

from kashin_jax.layers.linear import quantized_of_shape
from kashin_jax.layers.packed import Packed, pack
from kashin_jax.methods import Method
from kashin_jax.tensors import Prepared, QuantizedTensor, bits_per_weight, dequantize

__all__ = ["QuantizedEmbed"]


class QuantizedEmbed(nnx.Module):
    """Rows of a packed table; called like an `nnx.Embed`.

    A look-up decodes the bands of blocks that its rows lie in, a token at a time beyond
    a bounded tile, and `attend` the table in bands. Methods that code or rotate the
    matrix as a whole (`GreedyKashin` without `block_shape`, `Rotated`) need all of it
    for every look-up: choose `JointKashin`, or blocks. Groups of `RTN` and its like run
    along a feature, over many tokens.

    Attributes:
      table: The packed matrix, a row for every token.
      inputs: Bases of the rows; None for controls without rotation.
      outputs: What a product does to the features, in the same way.
    """

    def __init__(
        self,
        tensor: QuantizedTensor | Packed,
        *,
        dtype: DTypeLike | None = None,
        promote_dtype: Callable[..., Any] = default_promote_dtype,
    ):
        """Wraps a packed table.

        Args:
          tensor: From `quantize`, of shape [num_embeddings, features]; or the variables
            of another layer's matrix, which the two then share.
          dtype: Type of the embedding vectors; None takes the type that the table had.
          promote_dtype: Called as by `nnx.Embed`: with the rows in place of the table
            on a look-up, and with an empty array of its type by `attend`.
        """
        packed = pack(tensor)
        self.table = packed.kernel
        self.inputs = nnx.data(packed.inputs)
        self.outputs = nnx.data(packed.outputs)
        found = packed.kernel.get_value()
        self.num_embeddings, self.features = found.shape
        self.dtype = jnp.dtype(dtype or found.dtype)
        self.promote_dtype = promote_dtype

    @classmethod
    def from_embed(
        cls,
        embed: nnx.Embed,
        tensor: QuantizedTensor | Packed | Method,
        key: Key[Array, ""] | None = None,
        *,
        path: str = "embed",
    ) -> "QuantizedEmbed":
        """The packed layer in place of a dense one, with its options.

        Args:
          embed: Not changed.
          tensor: What its table became, or a method to quantize it with.
          key: For the method; `jax.random.key(0)` when None.
          path: Name of the layer in error messages.

        Raises:
          UsageError: If the table has another shape.
        """
        found = quantized_of_shape(tensor, embed.embedding, key, f"{path}/embedding")
        return cls(found, dtype=embed.dtype, promote_dtype=embed.promote_dtype)

    @property
    def packed(self) -> Packed:
        """The variables of the table, for another layer to share."""
        return Packed(self.table, self.inputs, self.outputs)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the table, or of the stack of them."""
        return bits_per_weight(self.table.get_value())

    @property
    def embedding(self) -> Float[Array, "v d"]:
        """The whole table, decoded anew each time; for models that read it themselves.

        An array: `embedding[...]` is what it is for an `nnx.Embed`.
        """
        return dequantize(self.table.get_value())

    def __call__(
        self, inputs: Integer[Array, "*b"], out_sharding: Any = None
    ) -> Float[Array, "*b d"]:
        """The rows of some tokens, NaN where there is no such row.

        Args:
          inputs: Indices; those below 0 count from the end.
          out_sharding: As for `nnx.Embed`.

        Raises:
          ValueError: If `inputs` are no whole numbers.
        """
        if not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise ValueError(
                f"`inputs` has type {inputs.dtype}; an embedding takes whole numbers."
            )
        rows = _looked_up(self.packed.prepared(), inputs.reshape(-1))
        (rows,) = self.promote_dtype((rows,), dtype=self.dtype, inexact=False)
        return _placed(rows.reshape(*inputs.shape, self.features), out_sharding)

    def attend(
        self, query: Float[Array, "*b d"], out_sharding: Any = None
    ) -> Float[Array, "*b v"]:
        """Products of queries with every row: the logits of a tied head.

        Args:
          query: Any batch axes.
          out_sharding: As for `nnx.Embed`.
        """
        prepared = self.packed.prepared()
        query, table = self.promote_dtype(
            (query, jnp.zeros((0, 0), prepared.dtype)), dtype=self.dtype
        )
        query = query.astype(jnp.result_type(query.dtype, table.dtype))
        flat = query.reshape(-1, self.features)
        y = prepared.transposed_product(flat)
        return _placed(y.reshape(*query.shape[:-1], y.shape[-1]), out_sharding)


@partial(jax.jit, inline=True)
def _looked_up(prepared: Prepared, inputs: Integer[Array, " t"]) -> Float[Array, "t d"]:
    """Rows in the type that the table had, NaN where there is none."""
    count = prepared.shape[0]
    index = inputs.astype(jnp.int32)
    # As nnx.Embed: a table of one row is that row for everything.
    index = jnp.zeros_like(index) if count == 1 else index
    index = jnp.where(index < 0, index + count, index)
    is_known = (index >= 0) & (index < count)
    rows = prepared.rows(jnp.clip(index, 0, count - 1))
    return jnp.where(is_known[:, None], rows, jnp.nan).astype(prepared.dtype)


def _placed(y: Float[Array, "*b"], out_sharding: Any) -> Float[Array, "*b"]:
    return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)
