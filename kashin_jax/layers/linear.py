"""`KashinLinear`: the drop-in for `nnx.Linear` whose kernel stays packed."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kashin_jax.quantized import (
    Quantized,
    QuantizedTensor,
    derive_basis,
    derive_rotation,
    matmul,
)

__all__ = ["DerivedBasis", "KashinLinear", "PackedKernel"]


class PackedKernel(nnx.Variable[Any]):
    """Holds a quantized matrix: what a checkpoint stores of the kernel."""


class DerivedBasis(nnx.Variable[Any]):
    """Holds the bases that the seed gives: kept for speed, never stored."""


class KashinLinear(nnx.Module):
    """`y = x W + b` with W packed; called like an `nnx.Linear`.

    Holds any quantized matrix. For a `QuantizedTensor` the product never forms more
    than a bounded tile of W, see `matmul`.

    Attributes:
      kernel: The packed matrix.
      basis: Q1 and Q2 of a `QuantizedTensor`; None for the controls.
      rotation: The bases in which its blocks were coded; None for the standard ones.
      bias: As in the layer that this one replaces, or None.
    """

    def __init__(
        self,
        tensor: Quantized,
        bias: nnx.Param[Array] | None = None,
        *,
        dtype: DTypeLike | None = None,
        precision: Any = None,
    ):
        """Wraps a packed matrix.

        Args:
          tensor: From `quantize`.
          bias: Shared with the layer that this one replaces, not copied.
          dtype: Of the computation; None infers it from input, kernel and bias.
          precision: Of the products, as for `jnp.matmul`.
        """
        self.in_features, self.out_features = tensor.shape
        self.dtype = dtype
        self.precision = precision
        self.kernel = PackedKernel(tensor)
        basis = rotation = None
        if isinstance(tensor, QuantizedTensor):
            basis, rotation = derive_basis(tensor), derive_rotation(tensor)
        self.basis = nnx.data(None if basis is None else DerivedBasis(basis))
        self.rotation = nnx.data(None if rotation is None else DerivedBasis(rotation))
        self.bias = nnx.data(bias)

    def __call__(self, x: Float[Array, "*b m"]) -> Float[Array, "*b n"]:
        tensor = self.kernel.get_value()
        bias = None if self.bias is None else self.bias.get_value()
        basis = None if self.basis is None else self.basis.get_value()
        rotation = None if self.rotation is None else self.rotation.get_value()
        dtype = self.dtype
        if dtype is None:
            others = () if bias is None else (bias.dtype,)
            dtype = jnp.result_type(x.dtype, tensor.dtype, *others)
        y = matmul(
            x.astype(dtype),
            tensor,
            basis=basis,
            rotation=rotation,
            precision=self.precision,
        )
        if bias is not None:
            y = y + bias.astype(dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y
