"""`QuantizedDense`: the Linen drop-in for `nn.Dense` whose kernel stays packed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype as default_promote_dtype
from flax.linen.linear import default_kernel_init
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from kashin_jax.errors import UsageError
from kashin_jax.layers.linear import product_options, require_plain_product
from kashin_jax.methods import DEFAULT_CONFIG, Method, encode
from kashin_jax.tensors import QuantizedTensor, matmul

__all__ = ["QuantizedDense", "packed_dense"]


class QuantizedDense(nn.Module):
    """`y = x W + b` with W packed; has the fields and parameters of `nn.Dense`.

    The parameter `kernel` is whatever it is given: a packed matrix of any method, as
    `quantize_params` leaves it, or a dense one. `init` quantizes a fresh kernel by
    `config`; under `jax.eval_shape` it costs nothing and gives the structure that a
    checkpoint is read into. Bases follow from the seed in every call.

    Attributes:
      features: Outputs.
      use_bias: Whether to add a bias.
      dtype: Type of the computation; None infers it from input and parameters.
      param_dtype: Type of the parameters that `init` makes.
      precision: Precision of the products, as for `jnp.matmul`.
      kernel_init: Gives the dense kernel that `init` quantizes.
      bias_init: Gives the bias.
      promote_dtype: Called as by `nn.Dense`, with an empty array of the kernel's type
        in its place.
      dot_general: As in `nn.Dense`; packed weights take None only.
      dot_general_cls: As in `nn.Dense`; packed weights take None only.
      config: The method by which `init` quantizes.
    """

    features: int
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Any = None
    kernel_init: Callable[..., Any] = default_kernel_init
    bias_init: Callable[..., Any] = nn.initializers.zeros_init()
    promote_dtype: Callable[..., Any] = default_promote_dtype
    dot_general: Any = None
    dot_general_cls: Any = None
    config: Method = DEFAULT_CONFIG

    @nn.compact
    def __call__(self, inputs: Float[Array, "*b m"]) -> Float[Array, "*b n"]:
        """The layer's outputs, for any batch axes.

        Raises:
          UsageError: If the kernel does not suit, or the layer multiplies by a function
            of its own.
        """

        def fresh(key: Key[Array, ""]) -> Any:
            kernel_key, code_key = jax.random.split(key)
            shape = (inputs.shape[-1], self.features)
            kernel = self.kernel_init(kernel_key, shape, self.param_dtype)
            return encode(kernel, code_key, self.config)[0]

        # `param` would compare what is there with what `config` makes: layers of one
        # model may have been quantized by different methods.
        if self.has_variable("params", "kernel"):
            kernel = nn.meta.unbox(self.get_variable("params", "kernel"))
        else:
            kernel = self.param("kernel", fresh)
        bias = None
        if self.use_bias:
            bias = self.param(
                "bias", self.bias_init, (self.features,), self.param_dtype
            )
        return _dense(self, inputs, kernel, bias)


def packed_dense(
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: Any,
) -> Any:
    """Lets every `nn.Dense` of a Linen model run on packed parameters.

    For models whose source does not ask for `QuantizedDense`:
    `with nn.intercept_methods(packed_dense): model.apply(params, x)`. Subclasses that
    compute what `nn.Dense` does are run, too. Layers with dense parameters run as they
    do.

    Args:
      next_fun: The call that is intercepted.
      args: Its positional arguments.
      kwargs: Its keyword arguments.
      context: Names the module and its method.

    Raises:
      UsageError: If a layer of another kind has a packed kernel; names it.
    """
    module = context.module
    if isinstance(module, QuantizedDense) or context.method_name != "__call__":
        return next_fun(*args, **kwargs)
    # Only its own: `variables` holds those of submodules by their names.
    kernel = nn.meta.unbox(module.variables.get("params", {}).get("kernel"))
    if not isinstance(kernel, QuantizedTensor):
        return next_fun(*args, **kwargs)
    if not isinstance(module, nn.Dense) or (
        type(module).__call__ is not nn.Dense.__call__
    ):
        kind = type(module).__name__
        raise UsageError(
            f"`{'/'.join(module.path) or kind}` is an {kind} with a packed kernel, and "
            "`packed_dense` runs nn.Dense alone. Leave it out when you quantize, by "
            "`select` or a rule, or undo it by `dequantize_params`."
        )
    bias = module.get_variable("params", "bias") if module.use_bias else None
    (inputs,) = (*args, *kwargs.values())
    return _dense(module, inputs, kernel, nn.meta.unbox(bias))


def _dense(
    module: Any, inputs: Float[Array, "*b m"], kernel: Any, bias: Any
) -> Float[Array, "*b n"]:
    path = "/".join(module.path) or type(module).__name__
    packed = isinstance(kernel, QuantizedTensor)
    if kernel.shape != (inputs.shape[-1], module.features):
        raise UsageError(
            f"`{path}` needs a kernel of shape "
            f"{(inputs.shape[-1], module.features)} [in, out]. Got {kernel.shape}."
        )
    stand_in = jnp.zeros((0, 0), kernel.dtype) if packed else kernel
    x, stand_in, bias = module.promote_dtype(inputs, stand_in, bias, dtype=module.dtype)
    x = x.astype(jnp.result_type(x.dtype, stand_in.dtype))
    if packed:
        require_plain_product(module, path)
        y = matmul(x, kernel, precision=product_options(module.precision))
    else:
        dot_general = module.dot_general or jax.lax.dot_general
        if module.dot_general_cls is not None:
            dot_general = module.dot_general_cls()
        axes = (((x.ndim - 1,), (0,)), ((), ()))
        y = dot_general(x, stand_in, axes, precision=module.precision)
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))
