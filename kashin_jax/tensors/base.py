"""What every quantized matrix offers, and how its size is counted."""

import math
from typing import Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, PyTree, UInt8

__all__ = ["QuantizedTensor", "bits_per_weight", "stored_bits"]


@runtime_checkable
class QuantizedTensor(Protocol):
    """A matrix stored as packed codes: a PyTree whose leaves are all it stores."""

    @property
    def packed_codes(self) -> UInt8[Array, "*stack q"]:
        """Codes of all weights; with leading axes for a stack of equal matrices."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix, `[in, out]` for a Flax kernel."""
        ...

    @property
    def dtype(self) -> str:
        """Name of the type that the matrix had."""
        ...

    def decode(self) -> Float[Array, "m n"]:
        """The matrix in float32."""
        ...


def stored_bits(tensor: PyTree[Array | jax.ShapeDtypeStruct]) -> int:
    """Bits that the leaves take: codes, centroids, scales, seeds, fill bits.

    Counts array elements times the width of their type; no sub-byte types are stored,
    so that is what a file holds. Takes what `jax.eval_shape` gives, too.
    """
    return sum(8 * leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tensor))


def bits_per_weight(tensor: QuantizedTensor) -> float:
    """`stored_bits` over the number of weights, of a stack under `vmap` too."""
    # The layout knows the shape of one matrix only; codes of one are a single row.
    count = math.prod(tensor.packed_codes.shape[:-1])
    return stored_bits(tensor) / (count * math.prod(tensor.shape))
