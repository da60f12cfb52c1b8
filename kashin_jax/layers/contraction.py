"""What a layer does with its input and a kernel: which axes it sums over."""

import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jaxtyping import Array, Float

from kashin_jax.errors import UsageError
from kashin_jax.tensors import KernelAxes, QuantizedTensor, matmul, prepare
from kashin_jax.tensors.base import Prepared

__all__ = [
    "Contraction",
    "contraction_of",
    "declared_shape",
    "einsum_contraction",
    "require_plain_product",
]

# What layers multiply by where they are not told otherwise.
_PRODUCTS = {
    "dot_general": jax.lax.dot_general,
    "conv_general_dilated": jax.lax.conv_general_dilated,
    "einsum_op": jnp.einsum,
}
_USUAL = {
    "dot_general": "jax.lax.dot_general",
    "conv_general_dilated": "jax.lax.conv_general_dilated",
    "einsum_op": "jax.numpy.einsum",
}


class _Places(NamedTuple):
    # Of the input: axes of the stack and those summed over, in the kernel's order.
    stack: tuple[int, ...]
    summed: tuple[int, ...]
    # Of the output, in the place of stack, rest of the input, outputs of the kernel.
    order: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Contraction:
    """How a kernel of any axes is multiplied by.

    Either `equation` says it, or `axis` and `batch`. A static choice: hashable.

    Attributes:
      kernel: Shape of the kernel, and which of its axes are what.
      leading: Sizes along leading axes of the kernel at each index of which is a
        matrix; `kernel` does not count them.
      axis: Axes of the input that are summed over, as for `nnx.LinearGeneral`.
      batch: Axes of the input that run along those of `leading`.
      equation: As for `jnp.einsum`, of the input and the kernel.
      strides: Along the axes before the last one, every how many positions a
        convolution looks at; empty for all.
    """

    kernel: KernelAxes
    leading: tuple[int, ...] = ()
    axis: tuple[int, ...] = (-1,)
    batch: tuple[int, ...] = ()
    equation: str | None = None
    strides: tuple[int, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether it is `x @ kernel`."""
        return self == Contraction(self.kernel) and self.kernel.is_plain

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        return (*self.leading, *self.kernel.shape)

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes along the axes of the kernel at each index of which is a matrix."""
        sizes = self.kernel.shape
        return (*self.leading, *(sizes[axis] for axis in self.kernel.stack))

    @property
    def inputs(self) -> tuple[int, ...]:
        """Sizes along the axes of the kernel that are summed over."""
        return tuple(self.kernel.shape[axis] for axis in self.kernel.inputs)

    @property
    def outputs(self) -> tuple[int, ...]:
        """Sizes along the axes of the kernel that are in the output alone."""
        return tuple(self.kernel.shape[axis] for axis in self.kernel.outputs)

    def product(
        self,
        x: Float[Array, "..."],
        matrix: QuantizedTensor | Prepared,
        *,
        precision: str | None = None,
        is_transposed: bool = False,
        path: str | None = None,
    ) -> Float[Array, "..."]:
        """The product with a packed kernel, in the type of `x`, as `matmul` has it.

        Matrices of a stack are multiplied by one after the other: the tiles that
        `matmul` decodes stay bounded.

        Args:
          x: Activations.
          matrix: The kernel as `[*stack, in, out]`.
          precision: As for `matmul`.
          is_transposed: Whether the kernel is packed as `[*stack, out, in]`.
          path: Name of the layer in error messages, if it is known.

        Raises:
          UsageError: If `x` does not suit the kernel.
        """
        given = x.shape
        for i, stride in enumerate(reversed(self.strides)):
            x = x[(..., slice(None, None, stride), *[slice(None)] * (i + 1))]
        places = self._places(x.ndim)
        if places is None:
            raise self._unsuited(given, path)
        rest = [i for i in range(x.ndim) if i not in places.stack + places.summed]
        stack = tuple(x.shape[i] for i in places.stack)
        summed = tuple(x.shape[i] for i in places.summed)
        # A convolution at one position has axes of size 1 that its input has not.
        if stack != self.stack or _wide(summed) != _wide(self.inputs):
            raise self._unsuited(given, path)
        free = tuple(x.shape[i] for i in rest)
        x = x.transpose(*places.stack, *rest, *places.summed)
        x = x.reshape(*stack, *free, self.kernel.sizes[0])
        y = _stacked_matmul(x, matrix, len(stack), precision, is_transposed)
        return y.reshape(*stack, *free, *self.outputs).transpose(places.order)

    def with_bias(self, y: Float[Array, "..."], bias: Any) -> Float[Array, "..."]:
        """Adds what a layer has one of for every index of stack and outputs."""
        if bias is None:
            return y
        stack, outputs = len(self.stack), len(self.outputs)
        free = y.ndim - stack - outputs
        shape = (*self.stack, *[1] * free, *self.outputs)
        places = self._places(self._input_ndim(y.ndim))
        assert places is not None, "there was an input"
        return y + bias.reshape([shape[axis] for axis in places.order])

    def _unsuited(self, shape: tuple[int, ...], path: str | None) -> UsageError:
        name = "A layer" if path is None else f"`{path}`"
        how = "" if self.equation is None else f" and the equation {self.equation}"
        return UsageError(
            f"{name} has a kernel of shape {self.shape}{how}, which an input of shape "
            f"{shape} does not suit."
        )

    def _input_ndim(self, ndim: int) -> int:
        summed = len(self.axis) if self.equation is None else len(self.inputs)
        return ndim - len(self.outputs) + summed

    def _places(self, ndim: int) -> _Places | None:
        """None if an input cannot have so many axes."""
        if self.equation is not None:
            return _einsum_places(self.equation, ndim)
        if not all(-ndim <= axis < ndim for axis in (*self.axis, *self.batch)):
            return None
        summed = sorted(axis % ndim for axis in self.axis)
        batch = sorted(axis % ndim for axis in self.batch)
        if len({*summed, *batch}) < len(summed) + len(batch):
            return None
        count = ndim - len(summed) + len(self.outputs)
        return _Places(tuple(batch), tuple(summed), tuple(range(count)))


def _wide(sizes: Sequence[int]) -> list[int]:
    return [size for size in sizes if size != 1]


def _stacked_matmul(
    x: Float[Array, "*s_and_b m"],
    matrix: QuantizedTensor | Prepared,
    stack: int,
    precision: str | None,
    is_transposed: bool,
) -> Float[Array, "*s_and_b n"]:
    leading = x.shape[:stack]

    def one(x: Array, matrix: QuantizedTensor | Prepared) -> Array:
        if not is_transposed:
            return matmul(x, matrix, precision=precision)
        y = prepare(matrix).transposed_product(x.reshape(-1, x.shape[-1]))
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def flat(leaf: Array) -> Array:
        return leaf.reshape(math.prod(leading), *leaf.shape[stack:])

    if stack == 0:
        return one(x, matrix)
    parts = flat(x), jax.tree.map(flat, matrix)
    y = jax.lax.map(lambda each: one(*each), parts)
    return y.reshape(*leading, *y.shape[1:])


def _letters(equation: str) -> tuple[list[str], list[str], list[str]]:
    """Letters of input, kernel and output; `...` is one of them."""
    operands, result = equation.replace(" ", "").replace("...", ".").split("->")
    x, kernel = operands.split(",")
    return list(x), list(kernel), list(result)


def _einsum_places(equation: str, ndim: int) -> _Places | None:
    x, kernel, result = _letters(equation)
    named = len(x) - x.count(".")
    if ndim < named or ("." not in x and ndim > named):
        return None
    rest: list[Hashable] = [("rest", i) for i in range(ndim - named)]

    def whole(letters: Sequence[str]) -> list[Hashable]:
        parts = [rest if each == "." else [each] for each in letters]
        return [axis for part in parts for axis in part]

    ours, theirs = whole(x), whole(result)
    stack = [each for each in kernel if each in ours and each in theirs]
    summed = [each for each in kernel if each in ours and each not in theirs]
    free = [each for each in ours if each not in kernel]
    made = [*stack, *free, *(each for each in kernel if each not in ours)]
    return _Places(
        tuple(map(ours.index, stack)),
        tuple(map(ours.index, summed)),
        tuple(map(made.index, theirs)),
    )


def einsum_contraction(equation: str, shape: Sequence[int]) -> Contraction | str:
    """The contraction that an equation stands for, or why it is none.

    Args:
      equation: As for `jnp.einsum`, of an input and a kernel, with an arrow.
      shape: Shape of the kernel.
    """
    equation = equation.replace(" ", "")
    x, kernel, result = _letters(equation)
    if any(len(set(letters)) < len(letters) for letters in (x, kernel, result)):
        return f"takes a diagonal by its equation {equation}"
    if "." in kernel or len(kernel) != len(shape):
        return f"has a kernel of {len(shape)} axes, which {equation} does not name"
    lost = [each for each in x if each not in kernel and each not in result]
    if lost or any(each not in x and each not in result for each in kernel):
        return f"sums over an axis of one operand alone by its equation {equation}"
    if any(each not in x and each not in kernel for each in result):
        return f"has an output that {equation} does not explain"
    stack = [i for i, each in enumerate(kernel) if each in x and each in result]
    summed = [i for i, each in enumerate(kernel) if each in x and each not in result]
    if not summed:
        return f"multiplies entry by entry by its equation {equation}"
    if len(stack) + len(summed) == len(kernel):
        return f"has a kernel without outputs by its equation {equation}"
    axes = KernelAxes.of(shape, summed, stack)
    leading = tuple(shape[: len(shape) - len(axes.shape)])
    return Contraction(axes, leading, equation=equation)


def contraction_of(
    layer: Any, shape: Sequence[int], equation: str | None = None
) -> Contraction | str:
    """What a layer of Flax, of NNX or Linen, does with its kernel, or why it stays.

    Args:
      layer: Of NNX a `Linear`, `LinearGeneral`, `Einsum` or `Conv`, of Linen a `Dense`,
        `DenseGeneral`, `Einsum` or `Conv`, or what is called like it.
      shape: Shape of its kernel, as one call sees it.
      equation: Given to an `Einsum` when it is called.
    """
    if _own_product(layer) is not None:
        return "multiplies by a function of its own, which packed weights cannot"
    if isinstance(layer, nnx.Einsum | nn.Einsum):
        found = equation or layer.einsum_str
        return "has no equation" if found is None else einsum_contraction(found, shape)
    if isinstance(layer, nnx.Conv | nn.Conv):
        return _convolution(layer, shape)
    if isinstance(layer, nnx.LinearGeneral):
        return _general(shape, layer.axis, tuple(layer.batch_axis))
    if isinstance(layer, nn.DenseGeneral):
        return _general(shape, _tuple(layer.axis), _tuple(layer.batch_dims))
    return Contraction(KernelAxes.of(shape, (0,)))


def declared_shape(layer: Any) -> tuple[int, ...]:
    """Shape of the kernel that a call of an NNX layer sees: of a stack, of one."""
    if isinstance(layer, nnx.LinearGeneral):
        return (*layer.batch_axis.values(), *layer.in_features, *layer.out_features)
    if isinstance(layer, nnx.Einsum | nnx.Conv):
        return tuple(layer.kernel_shape)
    return layer.in_features, layer.out_features


def _general(
    shape: Sequence[int], axis: Sequence[int], batch: Sequence[int]
) -> Contraction:
    leading = len(batch)
    axes = KernelAxes.of(shape[leading:], range(len(axis)))
    return Contraction(axes, tuple(shape[:leading]), tuple(axis), tuple(batch))


def _convolution(layer: Any, shape: Sequence[int]) -> Contraction | str:
    size = _tuple(layer.kernel_size)
    if math.prod(size) != 1:
        return f"convolves over {' x '.join(map(str, size))} positions"
    if layer.feature_group_count != 1:
        return f"convolves in {layer.feature_group_count} groups"
    if layer.mask is not None:
        return "masks its kernel at every call"
    dilation = _per_axis(layer.input_dilation, len(size))
    if not isinstance(layer.padding, str) or set(dilation) != {1}:
        if set(dilation) != {1} or any(map(any, map(_pair, _tuple(layer.padding)))):
            return "pads or dilates its input"
    strides = _per_axis(layer.strides, len(size))
    axes = KernelAxes.of(shape, range(len(size) + 1))
    return Contraction(axes, strides=() if set(strides) == {1} else strides)


def require_plain_product(layer: Any, path: str) -> None:
    """Raises UsageError if a dense layer multiplies by a function of its own."""
    found = _own_product(layer)
    if found is None:
        return
    name, given = found
    if name.endswith("_cls"):
        raise UsageError(
            f"`{path}` has a `{name}`, which packed weights cannot use. Leave the "
            "layer out."
        )
    raise UsageError(
        f"`{path}` has a `{name}` of its own ({getattr(given, '__name__', given)!s}), "
        "which packed weights cannot use. Leave the layer out, or give it "
        f"{_USUAL[name]}."
    )


def _own_product(layer: Any) -> tuple[str, Any] | None:
    """Name and value of what a layer multiplies by in the place of JAX's function."""
    for name, usual in _PRODUCTS.items():
        given = getattr(layer, name, None)
        if given not in (None, usual):
            return name, given
        if (given := getattr(layer, f"{name}_cls", None)) is not None:
            return f"{name}_cls", given
    return None


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,)


def _pair(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value, value)


def _per_axis(value: Any, count: int) -> tuple[int, ...]:
    """One number for each axis of a convolution, as Flax fills them up."""
    value = 1 if value is None else value
    return (value,) * count if isinstance(value, int) else tuple(value)
