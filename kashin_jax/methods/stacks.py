"""Stacks of matrices, as layers under `nnx.vmap` and `nnx.scan` hold them."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, Key

from kashin_jax.methods.configs import Method
from kashin_jax.methods.quantize import QuantizationReport, quantize
from kashin_jax.tensors import QuantizedTensor

__all__ = ["full_shape", "quantize_stack"]


def quantize_stack(
    weight: Float[Array, "*stack m n"],
    config: Method,
    key: Key[Array, ""],
    *,
    path: str,
    in_scale: Float16[Array, "*stack m"] | None = None,
) -> tuple[Any, QuantizationReport]:
    """`quantize`, of every matrix of a stack alone.

    Each has a key folded from its index, and nothing in common with the others. Leaves
    of the results are stacked.

    Raises:
      As `quantize`; matrices are named `path[index]`.
    """
    if weight.ndim == 2:
        return quantize(weight, config, key, path=path, in_scale=in_scale)
    parts = [
        quantize_stack(
            weight[i],
            config,
            jax.random.fold_in(key, i),
            path=f"{path}[{i}]",
            in_scale=None if in_scale is None else in_scale[i],
        )
        for i in range(weight.shape[0])
    ]
    stacked: tuple[Any, QuantizationReport] = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *parts
    )
    return stacked


def full_shape(tensor: QuantizedTensor) -> tuple[int, ...]:
    """The shape of a packed matrix, or of a stack of them with its leading axes."""
    # The layout knows the shape of one matrix only; codes of one are a single row.
    return (*tensor.packed_codes.shape[:-1], *tensor.shape)
