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
from kashin_jax.layers.packed import Packed, pack
from kashin_jax.methods import Method, quantize_stack
from kashin_jax.tensors import QuantizedTensor, bits_per_weight, matmul

__all__ = [
    "QuantizedLinear",
    "product_options",
    "quantized_of_shape",
    "require_plain_product",
]


class QuantizedLinear(nnx.Module):
    """`y = x W + b` with W packed; called like an `nnx.Linear`.

    Holds any quantized matrix. For a `KashinTensor` the product never forms more
    than a bounded tile of W, see `matmul`.

    Attributes:
      kernel: The packed matrix.
      inputs: What the product does to its input, which layers that read the same one
        may share; None for controls without rotation.
      outputs: What it does to its output, in the same way.
      bias: As in the layer that this one replaces, or None.
    """

    def __init__(
        self,
        tensor: QuantizedTensor | Packed,
        bias: nnx.Param[Array] | None = None,
        *,
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
        linear: nnx.Linear,
        tensor: QuantizedTensor | Packed | Method,
        key: Key[Array, ""] | None = None,
        *,
        path: str = "linear",
    ) -> "QuantizedLinear":
        """The packed layer in place of a dense one, with its bias and its options.

        Metadata of the kernel, such as names of sharded axes, describe a matrix that
        is no longer there and stay behind.

        Args:
          linear: Not changed; the bias is shared with it.
          tensor: What its kernel became, or a method to quantize it with.
          key: For the method; `jax.random.key(0)` when None.
          path: Name of the layer in error messages.

        Raises:
          UsageError: If the layer multiplies by a function of its own, which packed
            weights cannot, or its kernel has another shape.
        """
        require_plain_product(linear, path)
        return cls(
            quantized_of_shape(tensor, linear.kernel, key, f"{path}/kernel"),
            linear.bias,
            dtype=linear.dtype,
            precision=linear.precision,
            promote_dtype=linear.promote_dtype,
            preferred_element_type=linear.preferred_element_type,
        )

    @property
    def packed(self) -> Packed:
        """The variables of the matrix, for another layer to share."""
        return Packed(self.kernel, self.inputs, self.outputs)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the kernel, or of the stack of them."""
        return bits_per_weight(self.kernel.get_value())

    def __call__(
        self, x: Float[Array, "*b m"], out_sharding: Any = None
    ) -> Float[Array, "*b n"]:
        """The layer's outputs.

        Args:
          x: Activations, any batch axes.
          out_sharding: As for `nnx.Linear`.
        """
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
        y = matmul(x.astype(dtype), prepared, precision=self.precision)
        y = y.astype(out_dtype)
        if out_sharding is not None:
            y = jax.sharding.reshard(y, out_sharding)
        if bias is not None:
            y = y + bias.reshape((1,) * (y.ndim - 1) + (-1,))
        return y


def require_plain_product(linear: Any, path: str) -> None:
    """Raises UsageError if a dense layer multiplies by a function of its own."""
    given = getattr(linear, "dot_general", None)
    if given not in (None, jax.lax.dot_general):
        raise UsageError(
            f"`{path}` has a `dot_general` of its own "
            f"({getattr(given, '__name__', given)!s}), which packed weights cannot "
            "use. Leave the layer out, or give it jax.lax.dot_general."
        )
    if getattr(linear, "dot_general_cls", None) is not None:
        raise UsageError(
            f"`{path}` has a `dot_general_cls`, which packed weights cannot use. Leave "
            "the layer out."
        )


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
    tensor: Any, dense: nnx.Param[Array], key: Key[Array, ""] | None, path: str
) -> QuantizedTensor | Packed:
    """A packed matrix of the right shape: the one given, or the dense one quantized.

    Raises:
      UsageError: If its shape is not that of the dense matrix.
    """
    if isinstance(tensor, Method):
        root = jax.random.key(0) if key is None else key
        return quantize_stack(dense.get_value(), tensor, root, path=path)[0]
    found = tensor.kernel.get_value() if isinstance(tensor, Packed) else tensor
    if found.full_shape != dense.get_value().shape:
        raise UsageError(
            f"`{path}` has shape {dense.get_value().shape}; the quantized matrix has "
            f"{found.full_shape}."
        )
    return tensor
