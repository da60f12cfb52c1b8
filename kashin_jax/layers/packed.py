"""The variables in which layers hold a packed matrix."""

from typing import Any, NamedTuple

from flax import nnx

from kashin_jax.quantized import (
    Quantized,
    QuantizedTensor,
    derive_basis,
    derive_rotation,
)

__all__ = ["DerivedBasis", "Packed", "PackedKernel", "pack"]


class PackedKernel(nnx.Variable[Any]):
    """Holds a quantized matrix: what a checkpoint stores of the kernel."""


class DerivedBasis(nnx.Variable[Any]):
    """Holds the bases that the seed gives: kept for speed, never stored."""


class Packed(NamedTuple):
    """Variables of one matrix; layers that share the matrix share them.

    Attributes:
      kernel: The packed matrix.
      basis: Q1 and Q2 of a `QuantizedTensor`; None for the controls.
      rotation: The bases in which its blocks were coded; None for the standard ones.
    """

    kernel: PackedKernel
    basis: DerivedBasis | None
    rotation: DerivedBasis | None


def pack(tensor: Quantized | Packed) -> Packed:
    """Variables of a matrix, the bases derived from its seed."""
    if isinstance(tensor, Packed):
        return tensor
    basis = rotation = None
    if isinstance(tensor, QuantizedTensor):
        basis, rotation = derive_basis(tensor), derive_rotation(tensor)
    return Packed(
        PackedKernel(tensor),
        None if basis is None else DerivedBasis(basis),
        None if rotation is None else DerivedBasis(rotation),
    )
