"""Kernels with more axes than a matrix: which axes are inputs, and which outputs."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kashin_jax.tensors.base import QuantizedTensor, dequantize

__all__ = ["KernelAxes", "PackedArray"]


@dataclasses.dataclass(frozen=True)
class KernelAxes:
    """How a kernel is read as a matrix, or as a stack of matrices.

    Axes before those of `shape` are a stack, too; `shape` does not count them, so that
    `vmap` and `scan` may take them away.

    Attributes:
      shape: Shape of the kernel, without leading axes of a stack.
      inputs: Axes that a product sums over.
      stack: Axes along which every index is a matrix of its own.
    """

    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    stack: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, shape: Sequence[int], inputs: Sequence[int], stack: Sequence[int] = ()
    ) -> "KernelAxes":
        """Reads a whole kernel; leading axes of a stack are left out of the result.

        Args:
          shape: Shape of the whole kernel.
          inputs: Axes that a product sums over, in any order; those below 0 count
            from the end.
          stack: Axes along which every index is a matrix of its own.

        Raises:
          ValueError: If an axis does not exist or is named twice, or if none is left
            for outputs.
        """
        ndim = len(shape)
        named = [*inputs, *stack]
        if not all(-ndim <= axis < ndim for axis in named):
            raise ValueError(f"there are {ndim} axes, of shape {tuple(shape)}")
        taken = [axis % ndim for axis in named]
        if len(set(taken)) < len(taken):
            raise ValueError("an axis is named twice")
        if len(taken) == ndim:
            raise ValueError("no axis is left for outputs")
        alone = set(taken[len(inputs) :])
        leading = next(axis for axis in range(ndim) if axis not in alone)
        return cls(
            tuple(shape[leading:]),
            tuple(sorted(axis - leading for axis in taken[: len(inputs)])),
            tuple(sorted(axis - leading for axis in alone if axis > leading)),
        )

    @property
    def outputs(self) -> tuple[int, ...]:
        """The axes that are neither inputs nor a stack."""
        taken = {*self.inputs, *self.stack}
        return tuple(axis for axis in range(len(self.shape)) if axis not in taken)

    @property
    def sizes(self) -> tuple[int, int]:
        """Inputs and outputs of one matrix."""
        return self._size(self.inputs), self._size(self.outputs)

    @property
    def is_plain(self) -> bool:
        """Whether the kernel is `[in, out]` as it is, or leading axes of such."""
        return len(self.shape) == 2 and self.inputs == (0,)

    def matrix_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """`[*stack, in, out]` of a kernel of this shape.

        Raises:
          ValueError: If it is no kernel of these axes.
        """
        leading = len(shape) - len(self.shape)
        if leading < 0 or tuple(shape[leading:]) != self.shape:
            raise ValueError(
                f"A kernel of shape {tuple(shape)} does not end in {self.shape}."
            )
        stack = [self.shape[axis] for axis in self.stack]
        return (*shape[:leading], *stack, *self.sizes)

    def to_matrix(self, kernel: Float[Array, "..."]) -> Float[Array, "*stack m n"]:
        """The kernel as matrices."""
        if self.is_plain:
            return kernel
        shape = self.matrix_shape(kernel.shape)
        return kernel.transpose(self._order(kernel.ndim)).reshape(shape)

    def from_matrix(self, matrix: Float[Array, "*stack m n"]) -> Float[Array, "..."]:
        """Inverts `to_matrix`."""
        if self.is_plain:
            return matrix
        leading = matrix.shape[: matrix.ndim - 2 - len(self.stack)]
        order = self._order(len(leading) + len(self.shape))
        sizes = (*leading, *self.shape)
        kernel = matrix.reshape([sizes[axis] for axis in order])
        return kernel.transpose(np.argsort(order))

    def _order(self, ndim: int) -> list[int]:
        leading = ndim - len(self.shape)
        own = (*self.stack, *self.inputs, *self.outputs)
        return [*range(leading), *(axis + leading for axis in own)]

    def _size(self, axes: Sequence[int]) -> int:
        return math.prod(self.shape[axis] for axis in axes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PackedArray:
    """A kernel of any axes, packed as a matrix: what stands in a tree of parameters.

    Attributes:
      tensor: The matrix, or a stack of them.
      axes: How the kernel is read as one.
    """

    tensor: Any
    axes: KernelAxes = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        tensor: QuantizedTensor = self.tensor
        stack = len(tensor.full_shape) - 2 - len(self.axes.stack)
        return (*tensor.full_shape[:stack], *self.axes.shape)

    @property
    def ndim(self) -> int:
        """The number of its axes."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """The type that it had."""
        dtype: np.dtype = self.tensor.dtype
        return dtype

    def decode(self, dtype: DTypeLike | None = None) -> Float[Array, "..."]:
        """The whole kernel, in `dtype` or else the type that it had."""
        return self.axes.from_matrix(dequantize(self.tensor, dtype))

    def __repr__(self) -> str:
        return f"PackedArray({self.tensor!r}, {self.axes})"
