"""`QuantizedLinear`: the drop-in for `nnx.Linear` whose kernel stays packed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype as default_promote_dtype
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from kashin_jax.errors import UsageError
from kashin_jax.layers.contraction import (
    Contraction,
    contraction_of,
    declared_shape,
    einsum_contraction,
    require_plain_product,
)
from kashin_jax.layers.packed import Packed, pack
from kashin_jax.methods import Method, quantize_stack
from kashin_jax.tensors import KernelAxes, QuantizedTensor, bits_per_weight, matmul

__all__ = [
    "QuantizedEinsum",
    "QuantizedLinear",
    "product_options",
    "quantized_of_shape",
]


class QuantizedLinear(nnx.Module):
    """`y = x W + b` with W packed; called like an `nnx.Linear`.

    Holds any quantized matrix. For a `KashinTensor` the product never forms more
    than a bounded tile of W, see `matmul`. It stands in the place of an
    `nnx.LinearGeneral` and of an `nnx.Conv` of kernel size 1, too: `contraction` says
    which axes of the input are summed over, and what shape the outputs have.

    Attributes:
      kernel: The packed matrix.
      inputs: What the product does to its input, which layers that read the same one
        may share; None for controls without rotation.
      outputs: What it does to its output, in the same way.
      bias: As in the layer that this one replaces, or None.
      contraction: What is done with a kernel of more axes; None for `x @ W`.
    """

    # Of layers that were pickled before there was one.
    contraction: Contraction | None = None

    def __init__(
        self,
        tensor: QuantizedTensor | Packed,
        bias: nnx.Param[Array] | None = None,
        *,
        contraction: Contraction | None = None,
        dtype: DTypeLike | None = None,
        precision: Any = None,
        promote_dtype: Callable[..., Any] = default_promote_dtype,
        preferred_element_type: DTypeLike | None = None,
    ):
        """Wraps a packed matrix.

        Args:
          tensor: From `quantize`; or the variables of another layer's matrix, which
            the two then share.
          bias: Shared with the layer that this one replaces, not copied.
          contraction: Which axes of kernel and input are summed over; None multiplies
            by `W` along the last axis.
          dtype: Type of the computation; None infers it from input, kernel and bias.
          precision: Precision of the products, as for `jnp.matmul`.
          promote_dtype: Called as by `nnx.Linear`, with an empty array of the kernel's
            type in its place.
          preferred_element_type: Type of the product before the bias is added; None
            takes the type of the computation.

        Raises:
          UsageError: If `precision` differs between the operands of the product.
        """
        packed = pack(tensor)
        self.in_features, self.out_features = packed.kernel.get_value().shape
        self.use_bias = bias is not None
        self.contraction = contraction
        self.dtype = dtype
        self.precision = product_options(precision)
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type
        self.kernel = packed.kernel
        self.inputs = nnx.data(packed.inputs)
        self.outputs = nnx.data(packed.outputs)
        self.bias = nnx.data(bias)

    @classmethod
    def from_linear(
        cls,
        linear: nnx.Linear | nnx.LinearGeneral | nnx.Einsum | nnx.Conv,
        tensor: QuantizedTensor | Packed | Method,
        key: Key[Array, ""] | None = None,
        *,
        path: str = "linear",
    ) -> "QuantizedLinear":
        """The packed layer in place of a dense one, with its bias and its options.

        Metadata of the kernel, such as names of sharded axes, describe a matrix that
        is no longer there and stay behind.

        Args:
          linear: Not changed; the bias is shared with it. For an `nnx.Einsum` a
            `QuantizedEinsum` is returned.
          tensor: What its kernel became, as `[*stack, in, out]`, or a method to
            quantize it with.
          key: For the method; `jax.random.key(0)` when None.
          path: Name of the layer in error messages.

        Raises:
          UsageError: If the layer multiplies by a function of its own or is no plain
            product, which packed weights cannot, or its kernel has another shape.
        """
        require_plain_product(linear, path)
        found = contraction_of(linear, declared_shape(linear))
        if isinstance(found, str):
            raise UsageError(
                f"`{path}` {found}, which packed weights cannot. Leave the layer out."
            )
        kind = QuantizedEinsum if isinstance(linear, nnx.Einsum) else cls
        axes = None if found.is_plain else found.kernel
        layer = kind(
            quantized_of_shape(tensor, linear.kernel, key, f"{path}/kernel", axes),
            linear.bias,
            contraction=None if found.is_plain else found,
            dtype=linear.dtype,
            precision=linear.precision,
            promote_dtype=linear.promote_dtype,
            preferred_element_type=linear.preferred_element_type,
        )
        if not isinstance(linear, nnx.Einsum):
            layer.in_features = linear.in_features
            layer.out_features = linear.out_features
        return layer

    @property
    def packed(self) -> Packed:
        """The variables of the matrix, for another layer to share."""
        return Packed(self.kernel, self.inputs, self.outputs)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the kernel, or of the stack of them."""
        return bits_per_weight(self.kernel.get_value())

    def __call__(
        self, x: Float[Array, "..."], out_sharding: Any = None
    ) -> Float[Array, "..."]:
        """The layer's outputs, `[*b, n]` for an input `[*b, m]` and no `contraction`.

        Args:
          x: Activations, any batch axes.
          out_sharding: As for `nnx.Linear`.
        """
        return self._called(x, self.contraction, out_sharding)

    def _called(
        self, x: Array, contraction: Contraction | None, out_sharding: Any
    ) -> Array:
        prepared = self.packed.prepared()
        bias = None if self.bias is None else self.bias.get_value()
        x, kernel, bias = self.promote_dtype(
            (x, jnp.zeros((0, 0), prepared.dtype), bias), dtype=self.dtype
        )
        dtype = jnp.result_type(x.dtype, kernel.dtype)
        out_dtype = dtype
        if self.preferred_element_type is not None:
            out_dtype = jnp.dtype(self.preferred_element_type)
            # Products are accumulated in float32, and returned in the type of `x`.
            dtype = jnp.promote_types(dtype, out_dtype)
        x = x.astype(dtype)
        if contraction is None:
            y = matmul(x, prepared, precision=self.precision)
        else:
            y = contraction.product(x, prepared, precision=self.precision)
        y = y.astype(out_dtype)
        if out_sharding is not None:
            y = jax.sharding.reshard(y, out_sharding)
        if contraction is not None:
            return contraction.with_bias(y, bias)
        if bias is not None:
            y = y + bias.reshape((1,) * (y.ndim - 1) + (-1,))
        return y


class QuantizedEinsum(QuantizedLinear):
    """A `QuantizedLinear` that is called like an `nnx.Einsum`."""

    def __call__(  # type: ignore[override]
        self,
        x: Float[Array, "..."],
        einsum_str: str | None = None,
        out_sharding: Any = None,
    ) -> Float[Array, "..."]:
        """The layer's outputs.

        Args:
          x: Activations, as the equation names their axes.
          einsum_str: In the place of the layer's own equation.
          out_sharding: As for `nnx.Einsum`.

        Raises:
          UsageError: If the equation sums over other axes of the kernel than those
            that the kernel was packed for.
        """
        own = self.contraction
        if einsum_str is None or own is None:
            return self._called(x, own, out_sharding)
        found = einsum_contraction(einsum_str, own.shape)
        if isinstance(found, str) or found.kernel != own.kernel:
            raise UsageError(
                f"`einsum_str`={einsum_str!r} reads the kernel otherwise than "
                f"{own.equation!r}, for which it was packed. Leave the layer out."
            )
        return self._called(x, found, out_sharding)


def product_options(precision: Any) -> Any:
    """The precision of a product as one name, or None.

    Raises:
      UsageError: If it differs between the operands.
    """
    if isinstance(precision, tuple):
        if len(set(precision)) != 1:
            raise UsageError(
                f"`precision`={precision} differs between the operands; packed weights "
                "take one for both."
            )
        precision = precision[0]
    if isinstance(precision, jax.lax.Precision):
        return precision.name.lower()
    if isinstance(precision, jax.lax.DotAlgorithmPreset):
        return precision.name
    return precision


def quantized_of_shape(
    tensor: Any,
    dense: nnx.Param[Array],
    key: Key[Array, ""] | None,
    path: str,
    axes: KernelAxes | None = None,
) -> QuantizedTensor | Packed:
    """A packed matrix of the right shape: the one given, or the dense one quantized.

    Raises:
      UsageError: If its shape is not that of the dense matrix.
    """
    value = dense.get_value()
    shape = value.shape if axes is None else axes.matrix_shape(value.shape)
    if isinstance(tensor, Method):
        root = jax.random.key(0) if key is None else key
        kernel = value if axes is None else axes.to_matrix(value)
        return quantize_stack(kernel, tensor, root, path=path)[0]
    found = tensor.kernel.get_value() if isinstance(tensor, Packed) else tensor
    if found.full_shape != shape:
        raise UsageError(
            f"`{path}` has shape {shape}; the quantized matrix has {found.full_shape}."
        )
    return tensor
