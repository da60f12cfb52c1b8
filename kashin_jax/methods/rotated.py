"""`Rotated(inner)`: a matrix rotated as a whole, then coded by another method.

What rotations alone bring to plain grids and codebooks: the control beside Kashin's
decomposition, which published tables lack; and the incoherence of the follow-up, which
rotates before it decomposes.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from kashin_jax.bases import BasisSpec, KroneckerBasis, key_from_seed, make_pair
from kashin_jax.methods.alternating import AlternatingKashin
from kashin_jax.methods.base import Encoded, Method, add_method, split_key
from kashin_jax.methods.kmeans import KMeans
from kashin_jax.methods.rtn import RTN
from kashin_jax.tensors import KashinVectorTensor, QuantizedTensor
from kashin_jax.tensors.grouped import GroupedTensor

__all__ = ["Rotated"]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Rotated(Method):
    """Rotates a matrix, `Q1^T W Q2`, and codes the result by another method.

    Attributes:
      inner: What codes the rotated matrix: a method of grids, of scalar codebooks or of
        vectors.
      basis: The rotation, with the seed of the Kashin row: the same matrices.
    """

    inner: Method
    basis: BasisSpec = BasisSpec("hadamard", "hadamard")

    def __post_init__(self) -> None:
        """Leaves checks to the inner method."""

    @property
    def name(self) -> str:
        """`rotate-` and the name of the inner method."""
        return f"rotate-{self.inner.name}"

    @property
    def bits(self) -> int | float:
        """Code width of the inner method."""
        return self.inner.bits

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError if the inner method cannot code such a matrix."""
        self.inner.check(shape)

    def encode(self, weight: Float[Array, "m n"], key: Key[Array, ""]) -> Encoded:
        """Encodes the rotated matrix; the seed of the rotation is stored.

        Raises:
          TypeError: If the inner method gives a tensor that is not rotated back.
        """
        seed, _ = split_key(key)
        shape = weight.shape[0], weight.shape[1]
        pair = make_pair(self.basis, key_from_seed(seed), shape)
        tensor = self.inner.encode(_rotate(weight.astype(jnp.float32), pair), key)[0]
        is_rotatable = isinstance(tensor, GroupedTensor | KashinVectorTensor)
        if not is_rotatable or tensor.layout.basis is not None:
            raise TypeError(
                "`Rotated` takes methods that give grids, scalar codebooks or vectors, "
                f"which {type(self.inner).__name__} does not; rotate nothing, or take "
                "RTN."
            )
        layout = dataclasses.replace(
            tensor.layout, basis=self.basis, dtype=weight.dtype.name
        )
        # Vectors have the same seed already, of the same key.
        return Encoded(tensor.replace(seed=seed, layout=layout))

    @property
    def takes_feedback(self) -> bool:  # type: ignore[override]
        """Whether the inner method does."""
        return self.inner.takes_feedback

    def for_feedback(self) -> "Rotated":
        """With the choices of the inner method that suit it."""
        return dataclasses.replace(self, inner=self.inner.for_feedback())

    def with_feedback(
        self,
        weight: Float[Array, "m n"],
        free: QuantizedTensor,
        moments: Float[Array, "m m"],
    ) -> QuantizedTensor:
        """The inner method's, of rotated weights and moments."""
        seed = free.leaves()["seed"]
        pair = make_pair(self.basis, key_from_seed(seed), free.layout.shape)
        x = _rotate(weight.astype(jnp.float32), pair)
        both = KroneckerBasis(pair.left, pair.left)
        inner = free.replace(layout=dataclasses.replace(free.layout, basis=None))
        found = self.inner.with_feedback(x, inner, _rotate(moments, both))
        return found.replace(layout=free.layout)

    def to_fields(self, also: Collection[str] = ()) -> dict[str, Any]:
        """The choices of the inner method, then the basis."""
        return {**self.inner.to_fields(also), "basis": str(self.basis)}

    def with_fields(self, content: Mapping[str, Any]) -> "Rotated":
        """A copy with other choices, given as JSON."""
        own = {k: v for k, v in content.items() if k == "basis"}
        rest = {k: v for k, v in content.items() if k != "basis"}
        changed: Any = super().with_fields(own)
        rotated: Rotated = dataclasses.replace(
            changed, inner=self.inner.with_fields(rest)
        )
        return rotated


@jax.jit
def _rotate(x: Float[Array, "m n"], pair: KroneckerBasis) -> Float[Array, "m n"]:
    return pair.analysis(x)


# Small groups: a rotation spreads outliers over the whole matrix.
add_method(Rotated(RTN(group_size=64)))
add_method(Rotated(KMeans()))
# The follow-up's incoherence before its method, "Kashin-DCT+H".
add_method(Rotated(AlternatingKashin()))
