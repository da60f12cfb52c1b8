"""How Flax holds packed matrices: variables of layers, and state dicts."""

from collections.abc import Hashable, Iterator
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, serialization
from jaxtyping import Array, Float

from kashin_jax.bases import Basis, KroneckerBasis
from kashin_jax.methods.base import is_traced
from kashin_jax.tensors import (
    AffineTensor,
    Bases,
    CodebookTensor,
    KashinTensor,
    KashinVectorTensor,
    PackedArray,
    Prepared,
    QuantizedTensor,
)

__all__ = [
    "DerivedBasis",
    "InputSide",
    "Inputs",
    "OutputSide",
    "Packed",
    "PackedKernel",
    "PackedParam",
    "pack",
]


class PackedKernel(nnx.Variable[Any]):
    """Holds a quantized matrix: what a checkpoint stores of the kernel."""


class PackedParam(PackedKernel):
    """Holds a `PackedArray` in the place of an `nnx.Param`, and is read like one.

    For modules that read their parameter themselves: `param[...]`, `param.T`, an
    operator or a function of JAX decodes the whole of it, anew each time, with bases
    drawn from the seed. Under `jit` no decoded copy outlives the call, but XLA may
    decode all parameters that a program reads before it uses the first: a
    `QuantizedLinear` never holds more than a tile. It cannot be trained, and
    `nnx.to_pure_dict` holds it decoded.
    """

    # Four of 4 MiB took 36 MiB of temporaries on a CPU, four LinearGeneral 0.7 MiB.

    @property
    def array(self) -> PackedArray:
        """What is stored."""
        found: PackedArray = self.get_raw_value()
        return found

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return tuple(self.array.shape)

    @property
    def ndim(self) -> int:
        """The number of its axes."""
        return self.array.ndim

    @property
    def dtype(self) -> np.dtype:
        """The type that it had, and is decoded to."""
        return self.array.dtype

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the parameter."""
        return float(self.array.tensor.bits_per_weight)

    def get_value(self, *, index: Any = ...) -> Any:
        """The decoded parameter, in the type that it had, or a part of it."""
        found = self.get_raw_value()
        whole = found.decode() if isinstance(found, PackedArray) else found
        return whole if index is ... else whole[index]

    def __getattr__(self, name: str) -> Any:
        """Metadata, or an attribute of the decoded parameter."""
        metadata = object.__getattribute__(self, "_var_metadata")
        return metadata[name] if name in metadata else getattr(self.get_value(), name)

    def __nnx_repr__(self) -> Iterator[Any]:
        # Printed as it is stored: to decode a whole model for that takes minutes.
        yield from PackedKernel(self.get_raw_value()).__nnx_repr__()


class DerivedBasis(nnx.Variable[Any]):
    """Holds the bases that the seed gives: kept for speed, never stored."""


class InputSide(NamedTuple):
    """The bases and scale by which a product transforms its input.

    Attributes:
      basis: Q1, or of a control the rotation.
      rotation: The basis in which columns of blocks were coded; None for the standard
        one.
      scale: Scale of the inputs, where several layers have it in common: one array that
        they all read, so that what it gives can be computed once. None where the
        matrix is to use its own.
    """

    basis: Basis
    rotation: Basis | None
    scale: Float[Array, "*m"] | None = None


class OutputSide(NamedTuple):
    """The bases by which a product transforms its output.

    Attributes:
      basis: Q2, or of a control the rotation.
      rotation: The basis in which rows of blocks were coded; None for the standard one.
    """

    basis: Basis
    rotation: Basis | None


class Packed(NamedTuple):
    """Variables of one matrix; layers that share the matrix share them.

    Attributes:
      kernel: The packed matrix.
      inputs: Its `InputSide`, which layers that read the same input may share; None for
        controls without rotation.
      outputs: Its `OutputSide`, in the same way.
    """

    kernel: PackedKernel
    inputs: DerivedBasis | None
    outputs: DerivedBasis | None

    def prepared(self) -> Prepared:
        """The matrix and its bases: what products take."""
        tensor = self.kernel.get_value()
        if self.inputs is None or self.outputs is None:
            return Prepared(tensor, Bases())
        left, right = self.inputs.get_value(), self.outputs.get_value()
        if left.scale is not None:
            tensor = tensor.replace(in_scale=left.scale)
        rotation = None
        if left.rotation is not None:
            rotation = KroneckerBasis(left.rotation, right.rotation)
        basis = KroneckerBasis(left.basis, right.basis)
        return Prepared(tensor, Bases(basis, rotation))


Inputs = dict[Hashable, DerivedBasis]
"""Input sides that were packed, by value."""


def pack(
    tensor: QuantizedTensor | Packed,
    known: Inputs | None = None,
    group: Hashable | None = None,
) -> Packed:
    """Variables of a matrix, the bases derived from its seed.

    Args:
      tensor: From `quantize`; variables are returned as they are.
      known: Input sides of matrices that were packed before; this one is added. What is
        equal to one of them, bit by bit, is shared with it.
      group: Names matrices with equal input sides; inside `jit` and `eval_shape`, where
        no bits are known, those of one group share.
    """
    if isinstance(tensor, Packed):
        return tensor
    sides = _sides(tensor)
    if sides is None:
        return Packed(PackedKernel(tensor), None, None)
    left, right = sides
    if known is None or not isinstance(tensor, KashinTensor):
        inputs = DerivedBasis(left)
    elif (found := known.get(name := _input_name(tensor, group))) is None:
        inputs = known[name] = DerivedBasis(left)
    else:
        inputs = found
        # A copy: who donates a model must not donate one buffer twice.
        scale = None if tensor.in_scale is None else jnp.array(tensor.in_scale)
        inputs.set_value(inputs.get_value()._replace(scale=scale))
    return Packed(PackedKernel(tensor), inputs, DerivedBasis(right))


def _sides(tensor: Any) -> tuple[InputSide, OutputSide] | None:
    seed = getattr(tensor, "seed", None)
    if seed is None:
        return None
    if seed.ndim > 1:
        # One by one: some families cannot be drawn under `vmap` in any sensible time.
        matrices = [jax.tree.map(itemgetter(i), tensor) for i in range(seed.shape[0])]
        stacked: tuple[InputSide, OutputSide] = jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *map(_sides, matrices)
        )
        return stacked
    basis, rotation = tensor.derive_bases()
    if basis is None:
        return None
    return (
        InputSide(basis.left, None if rotation is None else rotation.left),
        OutputSide(basis.right, None if rotation is None else rotation.right),
    )


def _input_name(tensor: KashinTensor, group: Hashable | None) -> Hashable:
    layout, scale = tensor.layout, tensor.in_scale
    if is_traced(tensor.seed):
        return object() if group is None else group
    return (
        (tensor.seed.shape, np.asarray(tensor.seed).tobytes()),
        None if scale is None else (scale.dtype.name, np.asarray(scale).tobytes()),
        (layout.shape[0], layout.block_shape[0]),
        (layout.basis.left, layout.rotation and layout.rotation.left),
    )


def _to_state(tensor: QuantizedTensor) -> dict[str, Any]:
    """The leaves that a tensor stores, by name; its layout is that of the target."""
    leaves = tensor.leaves()
    return {
        name: serialization.to_state_dict(leaf)
        for name, leaf in leaves.items()
        if leaf is not None
    }


def _from_state(target: QuantizedTensor, state: dict[str, Any]) -> QuantizedTensor:
    """The target with other leaves.

    Raises:
      ValueError: If the state has not the leaves of the target.
    """
    leaves = {name: leaf for name, leaf in target.leaves().items() if leaf is not None}
    if leaves.keys() != state.keys():
        odd = min(leaves.keys() ^ state.keys())
        raise ValueError(
            f"The state of a {type(target).__name__} and its target differ in the leaf "
            f"`{odd}`; give a target that was quantized by the same method."
        )
    return target.replace(
        **{
            name: serialization.from_state_dict(leaf, state[name], name=name)
            for name, leaf in leaves.items()
        }
    )


def _array_to_state(array: PackedArray) -> dict[str, Any]:
    return {"tensor": serialization.to_state_dict(array.tensor)}


def _array_from_state(target: PackedArray, state: dict[str, Any]) -> PackedArray:
    tensor = serialization.from_state_dict(target.tensor, state["tensor"])
    return PackedArray(tensor, target.axes)


serialization.register_serialization_state(
    PackedArray, _array_to_state, _array_from_state, override=True
)
for _kind in (KashinTensor, KashinVectorTensor, AffineTensor, CodebookTensor):
    serialization.register_serialization_state(
        _kind, _to_state, _from_state, override=True
    )
