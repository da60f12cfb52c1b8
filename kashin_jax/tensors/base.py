"""What every packed matrix offers, whatever its codes mean."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from kashin_jax.bases import KroneckerBasis
from kashin_jax.errors import UsageError
from kashin_jax.tensors.partitioning import INPUTS, OUTPUTS, Axes, Names, specs_of
from kashin_jax.tensors.products import matmul, transposed_matmul

__all__ = [
    "Bases",
    "Prepared",
    "QuantizedTensor",
    "bits_per_weight",
    "dequantize",
    "prepare",
    "stored_bits",
]


T = TypeVar("T", bound="QuantizedTensor")


class Bases(NamedTuple):
    """Orthogonal matrices that a seed stands for: derived, never stored.

    Attributes:
      basis: Q1 and Q2 of the Kashin factors, or the rotation of a whole matrix; None
        where a tensor has none.
      rotation: The bases in which blocks were coded; None for the standard ones.
    """

    basis: KroneckerBasis | None = None
    rotation: KroneckerBasis | None = None


class QuantizedTensor:
    """A matrix stored as packed codes: a frozen PyTree whose leaves are all it stores.

    Subclasses are frozen dataclasses with a leaf `packed_codes`, further leaves, and a
    static `layout` with `shape` (`[in, out]` for a Flax kernel) and `dtype`. They have
    to say how they are decoded; all else follows. With one more leading axis on every
    leaf a tensor is a stack of equal matrices, for `vmap`, `scan` and `lax.map`.

    Attributes:
      kind: What error messages and `repr` call it.
    """

    kind: ClassVar[str] = "packed"
    # Of the subclasses, which are dataclasses.
    packed_codes: Any
    layout: Any

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        jax.tree_util.register_pytree_with_keys(
            cls, _flatten_with_keys, partial(_unflatten, cls), _flatten
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix, `[in, out]` for a Flax kernel.

        Inside `jax.shard_map` it is that of the part that a device has.
        """
        shape: tuple[int, int] = self.layout.shape
        return shape

    def fitted(self: T) -> T:
        """The tensor with the layout of its leaves, where they are a part of a matrix.

        Layouts are static: inside `jax.shard_map` they are still those of the whole.
        """
        if self.shape == self.layout.shape:
            return self
        return self.replace(layout=dataclasses.replace(self.layout, shape=self.shape))

    def leaf_axes(self) -> dict[str, Axes]:
        """What the axes of every leaf run along, for matrices cut over devices."""
        return {}

    def cuts(self) -> tuple[int, int]:
        """Into how many parts inputs and outputs can be cut, of whole blocks each."""
        return 1, 1

    def partition_specs(self: T, inputs: Names = None, outputs: Names = None) -> T:
        """How the leaves lie where the matrix is cut over devices.

        A tree of `PartitionSpec`, for `jax.shard_map` and for `jax.NamedSharding`:

            specs = q.partition_specs(outputs="model")
            q = jax.device_put(q, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))

        A product with what lies so is partitioned without any packed leaf being sent:
        cut over outputs nothing is, over inputs the results are added up.

        Args:
          inputs: Mesh axes that inputs are cut over; None for none. As many parts as
            they make must divide `cuts()[0]`.
          outputs: Mesh axes that outputs are cut over, with `cuts()[1]`.

        Raises:
          UsageError: If the matrix cannot be cut so.
        """
        for name, names, most in zip(
            (INPUTS, OUTPUTS), (inputs, outputs), self.cuts(), strict=True
        ):
            if names is not None and most == 1:
                raise UsageError(
                    f"This matrix of {self.describe()} cannot be cut over its {name}: "
                    "it is one block along them, was rotated as a whole, or rows of "
                    "codes end within bytes."
                )
        axes, stack = self.leaf_axes(), len(self.full_shape) - 2
        specs = {
            name: None if leaf is None else specs_of(axes[name], inputs, outputs, stack)
            for name, leaf in self.leaves().items()
        }
        return self.replace(**specs)

    @property
    def full_shape(self) -> tuple[int, ...]:
        """The shape of the matrix, or of a stack of them with its leading axes."""
        # The layout knows the shape of one matrix only.
        axes = self.layout.code_axes
        return (*self.packed_codes.shape[:-axes], *self.shape)

    @property
    def dtype(self) -> np.dtype:
        """The type that the matrix had."""
        return jnp.dtype(self.layout.dtype)

    def leaves(self) -> dict[str, Any]:
        """The stored arrays by name; None for those that a tensor does not have."""
        return {k: v for k, v in _fields(self).items() if k != "layout"}

    @property
    def stored_bits(self) -> int:
        """Bits that all leaves take, see `stored_bits`."""
        return stored_bits(self)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over the number of weights, of a stack too."""
        return stored_bits(self) / math.prod(self.full_shape)

    def replace(self: T, **changes: Any) -> T:
        """A copy with other leaves or another layout."""
        changed: T = _unflatten_fields(type(self), {**_fields(self), **changes})
        return changed

    @classmethod
    def from_leaves(cls: type[T], layout: Any, leaves: Mapping[str, Any]) -> T:
        """A tensor, or a stack of them, of leaves by name; none that it does not have.

        Their shapes are not checked.
        """
        absent = {field.name: None for field in _declared(cls)}
        found: T = _unflatten_fields(cls, absent | dict(leaves) | {"layout": layout})
        return found

    def derive_bases(self) -> Bases:
        """The bases that the seed stands for; products and `decode` take them."""
        return Bases()

    def prepare(self) -> "Prepared":
        """The tensor with its bases at hand, for products that come again and again."""
        return Prepared(self, self.derive_bases())

    def decode(self, bases: Bases | None = None) -> Float[Array, "m n"]:
        """The matrix in float32.

        Args:
          bases: From `derive_bases`, where the caller keeps them.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how to decode.")

    def rows(
        self, index: Int[Array, " t"], bases: Bases | None = None
    ) -> Float[Array, "t n"]:
        """Rows of the matrix in float32, decoding no more than they need.

        Args:
          index: In [0, m); not checked.
          bases: From `derive_bases`, where the caller keeps them.
        """
        return self.decode(bases)[index]

    def transposed_product(
        self, x: Float[Array, "r n"], bases: Bases | None = None
    ) -> Float[Array, "r m"]:
        """`x @ W.T` in the type of `x`, accumulated in float32: logits of a tied head.

        Args:
          x: Rows.
          bases: From `derive_bases`, where the caller keeps them.
        """
        bases = self.derive_bases() if bases is None else bases
        return transposed_matmul(x, self.fitted(), bases)

    def in_bands(self: T, most: int) -> tuple[int, T] | None:
        """Number of equal bands of rows of at most `most` weights, and a stack of them.

        None where codes or blocks do not allow it. All bands have the bases of the
        whole.
        """
        return None

    def describe(self) -> str:
        """Codes and scales in a few words, such as `4-bit codes, groups of 64`."""
        return f"{self.kind} codes"

    def __rmatmul__(self, x: Float[Array | np.ndarray, "*b m"]) -> Float[Array, "*b n"]:
        return matmul(x, self)

    # NumPy's arrays would take a tensor for a scalar object, and not ask it.
    __array_ufunc__ = None

    def __repr__(self) -> str:
        name = type(self).__name__
        leaves = jax.tree.leaves(self)
        if not all(
            isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) for leaf in leaves
        ):
            # Inside `tree.map` leaves may be anything.
            return f"{name}({_fields(self)})"
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        shape = " x ".join(map(str, self.full_shape))
        return (
            f"{name}({shape}, {8 * size / math.prod(self.full_shape):.3f} bits per "
            f"weight, {self.describe()}, {size:,} bytes)"
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """A packed matrix and its derived bases: what products take.

    Attributes:
      tensor: What is stored.
      bases: What its seed stands for.
    """

    tensor: Any
    bases: Bases

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix."""
        shape: tuple[int, int] = self.tensor.shape
        return shape

    @property
    def dtype(self) -> np.dtype:
        """The type that the matrix had."""
        dtype: np.dtype = self.tensor.dtype
        return dtype

    def prepare(self) -> "Prepared":
        """The prepared matrix itself: there is nothing left to prepare."""
        return self

    def decode(self) -> Float[Array, "m n"]:
        """The matrix in float32."""
        return self.tensor.decode(self.bases)

    def rows(self, index: Int[Array, " t"]) -> Float[Array, "t n"]:
        """Rows of the matrix in float32."""
        return self.tensor.rows(index, self.bases)

    def transposed_product(self, x: Float[Array, "r n"]) -> Float[Array, "r m"]:
        """`x @ W.T` in the type of `x`, accumulated in float32."""
        return self.tensor.transposed_product(x, self.bases)

    def __rmatmul__(self, x: Float[Array | np.ndarray, "*b m"]) -> Float[Array, "*b n"]:
        return matmul(x, self)

    __array_ufunc__ = None


def prepare(tensor: QuantizedTensor | Prepared) -> Prepared:
    """The tensor with its bases at hand; what is prepared stays as it is."""
    return tensor.prepare()


def dequantize(
    tensor: QuantizedTensor, dtype: DTypeLike | None = None
) -> Float[Array, "*stack m n"]:
    """The whole matrix, in `dtype` or else the type that it had; of a stack, all."""
    kind = jnp.dtype(tensor.dtype if dtype is None else dtype)
    if len(tensor.full_shape) > 2:
        return _decoded_stack(tensor, kind)
    return tensor.decode().astype(kind)


@partial(jax.jit, static_argnames="dtype")
def _decoded_stack(tensor: Any, dtype: np.dtype) -> Float[Array, "*stack m n"]:
    # One at a time: in float32 they are twice as large as what is made of them.
    return jax.lax.map(lambda each: dequantize(each, dtype), tensor)


def stored_bits(tensor: PyTree[Array | jax.ShapeDtypeStruct]) -> int:
    """Bits that the leaves take: codes, centroids, scales, seeds, fill bits.

    Counts array elements times the width of their type; no sub-byte types are stored,
    so that is what a file holds. Takes what `jax.eval_shape` gives, too.
    """
    return sum(8 * leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tensor))


def bits_per_weight(tensor: QuantizedTensor) -> float:
    """`stored_bits` over the number of weights, of a stack under `vmap` too."""
    return tensor.bits_per_weight


def _fields(tensor: Any) -> dict[str, Any]:
    return {field.name: getattr(tensor, field.name) for field in _declared(tensor)}


def _declared(tensor: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(tensor)


def _flatten(tensor: Any) -> tuple[Sequence[Any], Any]:
    names = [field.name for field in _declared(tensor) if field.name != "layout"]
    return [getattr(tensor, name) for name in names], tensor.layout


def _flatten_with_keys(tensor: Any) -> tuple[Sequence[Any], Any]:
    names = [field.name for field in _declared(tensor) if field.name != "layout"]
    keys = map(jax.tree_util.GetAttrKey, names)
    leaves, layout = _flatten(tensor)
    return list(zip(keys, leaves, strict=True)), layout


def _unflatten(cls: Any, layout: Any, leaves: Sequence[Any]) -> Any:
    names = [field.name for field in _declared(cls) if field.name != "layout"]
    return _unflatten_fields(
        cls, {**dict(zip(names, leaves, strict=True)), "layout": layout}
    )


def _unflatten_fields(cls: Any, fields: dict[str, Any]) -> Any:
    # Around `__init__`: leaves are shapes, axes or stacks at times, and no checker of
    # types is to refuse them.
    if unknown := fields.keys() - {field.name for field in _declared(cls)}:
        raise TypeError(f"{cls.__name__} has no field `{min(unknown)}`.")
    tensor = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(tensor, name, value)
    return tensor
