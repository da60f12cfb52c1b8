"""`QuantizedDense`: the Linen drop-in for `nn.Dense` whose kernel stays packed."""

import contextlib
import dataclasses
from collections.abc import Callable, Set
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype as default_promote_dtype
from flax.linen.linear import default_kernel_init
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from kashin_jax.errors import UsageError
from kashin_jax.layers.contraction import (
    Contraction,
    contraction_of,
    require_plain_product,
)
from kashin_jax.layers.linear import product_options
from kashin_jax.methods import DEFAULT_CONFIG, Method, encode
from kashin_jax.tensors import KernelAxes, PackedArray, QuantizedTensor

__all__ = ["QuantizedDense", "kernel_readers", "packed_dense"]

# Layers that run on packed kernels, and subclasses with the same `__call__`.
_KINDS: tuple[type[nn.Module], ...] = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv)


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
    """Lets the layers of a Linen model run on packed parameters.

    For models whose source does not ask for `QuantizedDense`:
    `with nn.intercept_methods(packed_dense): model.apply(params, x)`. Runs `nn.Dense`,
    `nn.DenseGeneral` (and with it `nn.MultiHeadDotProductAttention`), `nn.Einsum` and
    `nn.Conv` of kernel size 1, and subclasses that compute what these do. Layers with
    dense parameters run as they do.

    Args:
      next_fun: The call that is intercepted.
      args: Its positional arguments.
      kwargs: Its keyword arguments.
      context: Names the module and its method.

    Raises:
      UsageError: If a layer of another kind has a packed kernel, or one that was packed
        along other axes than it sums over; names it.
    """
    module = context.module
    if isinstance(module, QuantizedDense) or context.method_name != "__call__":
        return next_fun(*args, **kwargs)
    kernel = _own_kernel(module)
    if not isinstance(kernel, QuantizedTensor | PackedArray):
        return next_fun(*args, **kwargs)
    inputs, equation = _arguments(module, args, kwargs)
    found = _contraction(module, kernel, equation)
    path = "/".join(module.path) or type(module).__name__
    if isinstance(found, str):
        require_plain_product(module, path)
        raise UsageError(
            f"`{path}` is a {type(module).__name__} with a packed kernel, which "
            f"`packed_dense` cannot run: it {found}. Leave it out when you quantize, "
            "by `select`, a rule or `call`, or undo it by `dequantize_params`."
        )
    bias = module.get_variable("params", "bias") if module.use_bias else None
    return _packed(module, inputs, kernel, nn.meta.unbox(bias), found)


def kernel_readers(
    call: Callable[[Any], Any], params: Any, paths: Set[str]
) -> dict[str, Contraction | str]:
    """Which layer of a Linen model reads each kernel, and along which axes.

    Args:
      call: Runs the model, as `lambda params: model.apply(params, x)`. It is traced;
        nothing is computed.
      params: Arrays, or their shapes and types.
      paths: Of the layers whose kernels are looked for.

    Returns:
      By path of the layer, without `params` and `kernel`, what it does with its kernel,
      or why that cannot be packed.
    """
    found: dict[str, Contraction | str] = {}

    def noting(
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: Any,
    ) -> Any:
        module = context.module
        if context.method_name == "__call__" and module.scope is not None:
            kernel = _own_kernel(module)
            if hasattr(kernel, "ndim"):
                _, equation = _arguments(module, args, kwargs)
                new = _contraction(module, kernel, equation)
                path = "/".join(module.scope.path) or "kernel"
                if _axes(found.setdefault(path, new)) != _axes(new):
                    found[path] = "is read along different axes"
        return next_fun(*args, **kwargs)

    # JAX does not trace again what it knows: a new function is one that it does not,
    # and without `jit` nor does it know what the model compiles inside.
    for context in (contextlib.nullcontext, jax.disable_jit):
        if not paths <= found.keys():
            with nn.intercept_methods(noting), context():
                jax.eval_shape(lambda params: call(params), params)
    return found


def _axes(found: Contraction | str) -> KernelAxes | str:
    return found if isinstance(found, str) else found.kernel


def _own_kernel(module: nn.Module) -> Any:
    # Only its own: `variables` holds those of submodules by their names.
    return nn.meta.unbox(module.variables.get("params", {}).get("kernel"))


def _arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, str | None]:
    """The input of a layer, and the equation that an `nn.Einsum` may be given."""
    given = dict(zip(("inputs", "einsum_str"), args, strict=False)) | kwargs
    equation = given.get("einsum_str") if isinstance(module, nn.Einsum) else None
    return given.get("inputs"), equation


def _contraction(
    module: nn.Module, kernel: Any, equation: str | None
) -> Contraction | str:
    """What a layer of Linen does with its kernel, or why it cannot be packed."""
    for kind in _KINDS:
        if isinstance(module, kind) and type(module).__call__ is kind.__call__:
            shape = getattr(kernel, "full_shape", kernel.shape)
            return contraction_of(module, shape, equation)
    if isinstance(module, QuantizedDense):
        return Contraction(KernelAxes.of(kernel.shape, (0,)))
    return f"is of a kind of its own, {type(module).__name__}"


def _packed(
    module: Any,
    inputs: Float[Array, "..."],
    kernel: QuantizedTensor | PackedArray,
    bias: Any,
    contraction: Contraction,
) -> Float[Array, "..."]:
    """The outputs of a layer with a packed kernel."""
    path = "/".join(module.path) or type(module).__name__
    require_plain_product(module, path)
    tensor = kernel.tensor if isinstance(kernel, PackedArray) else kernel
    is_transposed = False
    if isinstance(kernel, PackedArray) or not contraction.kernel.is_plain:
        own = kernel.axes if isinstance(kernel, PackedArray) else _as_stored(kernel)
        # A matrix of the tree is packed as it is, whatever its layer does with it.
        is_transposed = own == dataclasses.replace(
            contraction.kernel, inputs=contraction.kernel.outputs
        )
        if own != contraction.kernel and not is_transposed:
            raise UsageError(
                f"`{path}` sums over axes {contraction.kernel.inputs} of a kernel of "
                f"shape {own.shape}, which was packed with inputs along {own.inputs}. "
                "Name its axes by `contract`, or give `call`, and quantize again."
            )
    stand_in = jnp.zeros((0, 0), kernel.dtype)
    x, stand_in, bias = module.promote_dtype(inputs, stand_in, bias, dtype=module.dtype)
    dtype = out_dtype = jnp.result_type(x.dtype, stand_in.dtype)
    if (preferred := getattr(module, "preferred_element_type", None)) is not None:
        out_dtype = jnp.dtype(preferred)
        dtype = jnp.promote_types(dtype, out_dtype)
    y = contraction.product(
        x.astype(dtype),
        tensor,
        precision=product_options(module.precision),
        is_transposed=is_transposed,
        path=path,
    )
    return contraction.with_bias(y.astype(out_dtype), bias)


def _as_stored(tensor: QuantizedTensor) -> KernelAxes:
    return KernelAxes(tensor.shape, (0,))


def _dense(
    module: Any, inputs: Float[Array, "*b m"], kernel: Any, bias: Any
) -> Float[Array, "*b n"]:
    path = "/".join(module.path) or type(module).__name__
    if kernel.shape != (inputs.shape[-1], module.features):
        raise UsageError(
            f"`{path}` needs a kernel of shape "
            f"{(inputs.shape[-1], module.features)} [in, out]. Got {kernel.shape}."
        )
    if isinstance(kernel, QuantizedTensor):
        found = Contraction(KernelAxes.of(kernel.shape, (0,)))
        return _packed(module, inputs, kernel, bias, found)
    x, kernel, bias = module.promote_dtype(inputs, kernel, bias, dtype=module.dtype)
    x = x.astype(jnp.result_type(x.dtype, kernel.dtype))
    dot_general = module.dot_general or jax.lax.dot_general
    if module.dot_general_cls is not None:
        dot_general = module.dot_general_cls()
    axes = (((x.ndim - 1,), (0,)), ((), ()))
    y = dot_general(x, kernel, axes, precision=module.precision)
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))
