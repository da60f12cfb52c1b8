"""`KashinVectorTensor`: a matrix whose columns, or rows, are Kashin codes alone."""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8, UInt32

from kashin_jax.bases import (
    BasisSpec,
    KroneckerBasis,
    key_from_seed,
    make_pair,
)
from kashin_jax.packing import rows_of_bytes, unpack_matrix
from kashin_jax.tensors.base import Bases, QuantizedTensor
from kashin_jax.tensors.levels import select
from kashin_jax.tensors.partitioning import INPUTS, OUTPUTS, Axes

__all__ = [
    "KashinVectorTensor",
    "VectorLayout",
    "factors_of_codes",
    "vector_bases",
]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class VectorLayout:
    """Shape, widths and axis of a `KashinVectorTensor`.

    Attributes:
      shape: Shape of the matrix, `[in, out]` for a Flax kernel.
      axis: Axis that vectors run along: 0 for a vector of all inputs for each output,
        1 for a vector of all outputs for each input.
      bits: Width of a code: half of it for v, the rest for u.
      basis: Families of the rotation applied before coding; None without rotation.
      dtype: Name of the type that the matrix had.
    """

    shape: tuple[int, int]
    axis: int
    bits: int
    basis: BasisSpec | None = None
    dtype: str

    @property
    def code_axes(self) -> int:
        """Axes of the codes of one matrix: 2 where rows end between bytes, else 1."""
        return 1 if self.shape[1] * self.bits % 8 else 2

    @property
    def v_bits(self) -> int:
        """Low bits of a code, which say what v is."""
        return self.bits // 2

    @property
    def u_bits(self) -> int:
        """High bits of a code, which say what u is."""
        return self.bits - self.v_bits


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class KashinVectorTensor(QuantizedTensor):
    """`w = u + P v` for every column of W, or every row; P is a sign-DCT.

    Entries of u are plus or minus one of a few magnitudes that the vector has, and so
    are those of v. Where the matrix was rotated as a whole it is rotated back. Leaves
    are all that is stored.

    Attributes:
      packed_codes: Codes of all weights, row-major, with an axis of rows where these
        end between bytes. High bits are those of u; of each factor the highest is set
        for plus, the others are the index of a magnitude.
      u_levels: Magnitudes of u, `k` of each of the `c` vectors, ascending.
      v_levels: Magnitudes of v.
      seed: Gives the signs of P, and the rotation.
      layout: Static part.

    Source: Cherniuk et al. (2026), arXiv 2609.11687.
    """

    kind: ClassVar[str] = "kashin-vectors"

    packed_codes: UInt8[Array, " q"] | UInt8[Array, "m q"]
    u_levels: Float[Array, "k c"]
    v_levels: Float[Array, "l c"]
    seed: UInt32[Array, "2"]
    layout: VectorLayout

    @classmethod
    def from_leaves(cls, layout: Any, leaves: Mapping[str, Any]) -> Any:
        """Of codes as streams, too, as files have them; the rest as in the base."""
        (m, n), found = layout.shape, dict(leaves)
        found["packed_codes"] = rows_of_bytes(found["packed_codes"], m, n * layout.bits)
        return super().from_leaves(layout, found)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix, or of the part that a device has, see the base."""
        codes: tuple[int, ...] = getattr(self.packed_codes, "shape", ())
        if len(codes) < 2 or self.layout.code_axes == 1:
            return self.layout.shape
        return codes[-2], codes[-1] * 8 // self.layout.bits

    def leaf_axes(self) -> dict[str, Axes]:
        """Codes lie as the matrix does, magnitudes as the vectors do."""
        layout = self.layout
        own: Axes = (None, INPUTS if layout.axis else OUTPUTS)
        codes: Axes = (INPUTS, OUTPUTS) if layout.code_axes == 2 else (None,)
        return {
            "packed_codes": codes, "u_levels": own, "v_levels": own, "seed": (None,),
        }  # fmt: skip

    def cuts(self) -> tuple[int, int]:
        """Between vectors, where rows of codes fill bytes. One if rotated."""
        layout = self.layout
        (m, n), bits = layout.shape, layout.bits
        if layout.basis is not None or layout.code_axes == 1:
            return 1, 1
        return (m, 1) if layout.axis else (1, n * bits // math.lcm(8, bits))

    def derive_bases(self) -> Bases:
        """P on the side that vectors run along, and the rotation of the matrix."""
        layout = self.layout
        basis = vector_bases(self.seed, self.shape, layout.axis)
        if layout.basis is None:
            return Bases(basis)
        return Bases(
            basis, make_pair(layout.basis, key_from_seed(self.seed), self.shape)
        )

    def decode(self, bases: Bases | None = None) -> Float[Array, "m n"]:
        """The matrix in float32, given its bases where the caller keeps them."""
        bases = self.derive_bases() if bases is None else bases
        return _decoded(self.fitted(), bases)

    def describe(self) -> str:
        """Width of the codes, what vectors are and the rotation."""
        layout = self.layout
        each = "input" if layout.axis else "output"
        rotated = "" if layout.basis is None else f", rotated by {layout.basis}"
        return (
            f"{layout.bits}-bit Kashin codes, a vector for each {each}, basis sign-dct"
            f"{rotated}"
        )


def vector_bases(
    seed: UInt32[Array, "2"], shape: tuple[int, int], axis: int
) -> KroneckerBasis:
    """P on the side of an axis, the identity on the other.

    Its signs are not those of a rotation by the same seed.
    """
    spec = BasisSpec(*(("identity", "sign-dct") if axis else ("sign-dct", "identity")))
    return make_pair(spec, jax.random.fold_in(key_from_seed(seed), 1), shape)


def factors_of_codes(
    codes: UInt8[Array, "r n"],
    u_levels: Float[Array, "k c"],
    v_levels: Float[Array, "l c"],
    layout: VectorLayout,
) -> tuple[Float[Array, "r n"], Float[Array, "r n"]]:
    """U and V of some rows of a matrix.

    Args:
      codes: Of these rows.
      u_levels: Magnitudes of the vectors that the rows are, or all of them where
        vectors are columns.
      v_levels: The same of v.
      layout: Of the matrix.
    """

    def values(levels: Array, codes: Array, bits: int) -> Array:
        table = levels.astype(jnp.float32)
        table = table[:, :, None] if layout.axis else table[:, None, :]
        size = select(list(table), codes & (2 ** (bits - 1) - 1))
        return jnp.where(codes >> (bits - 1) != 0, size, -size)

    high = codes >> layout.v_bits
    low = codes & (2**layout.v_bits - 1)
    return values(u_levels, high, layout.u_bits), values(v_levels, low, layout.v_bits)


# `inline`: one program where it is called as it is, and no trace of it in others.
@partial(jax.jit, inline=True)
def _decoded(tensor: KashinVectorTensor, bases: Bases) -> Float[Array, "m n"]:
    basis, rotation = bases
    assert basis is not None, "a Kashin tensor has one"
    layout = tensor.layout
    codes = unpack_matrix(tensor.packed_codes, layout.bits, layout.shape)
    u, v = factors_of_codes(codes, tensor.u_levels, tensor.v_levels, layout)
    w = u + basis.synthesis(v)
    return w if rotation is None else rotation.synthesis(w)
