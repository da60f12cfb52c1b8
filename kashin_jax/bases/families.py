"""The families of bases by name, and specs that rebuild a pair from a seed.

Adding a family takes one file with a NamedTuple and a `make_...(key, n)`, and one line
each in `FAMILIES` and in `costs.FLOPS`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import jax
from jaxtyping import Array, Key

from kashin_jax.bases.basis import Basis
from kashin_jax.bases.butterfly import make_butterfly, make_butterfly3
from kashin_jax.bases.dct import make_dct, make_sign_dct
from kashin_jax.bases.givens import make_givens
from kashin_jax.bases.haar import make_haar
from kashin_jax.bases.hadamard import make_hadamard
from kashin_jax.bases.householder import make_householder
from kashin_jax.bases.identity import make_identity
from kashin_jax.bases.kronecker import KroneckerBasis

__all__ = ["FAMILIES", "REFLECTORS", "BasisSpec", "make_basis", "make_pair"]

REFLECTORS = 8
"""How many reflections a basis of the family `householder8` is made of."""

FAMILIES: Mapping[str, Callable[[Key[Array, ""], int], Basis]] = MappingProxyType(
    {
        "identity": make_identity,
        "dct": make_dct,
        "sign-dct": make_sign_dct,
        "hadamard": make_hadamard,
        "haar": make_haar,
        "householder": make_householder,
        "householder8": partial(make_householder, reflectors=REFLECTORS),
        "givens": make_givens,
        "butterfly": make_butterfly,
        "butterfly3": make_butterfly3,
    }
)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class BasisSpec:
    """Names of the families on the two sides of a matrix; with a seed, the basis.

    Attributes:
      left: Family of Q1, on the input side of a kernel `[in, out]`.
      right: Family of Q2, on the output side.
    """

    left: str
    right: str

    def __post_init__(self) -> None:
        for name in (self.left, self.right):
            if name not in FAMILIES:
                raise ValueError(
                    f"Unknown basis `{name}`. Choose from {', '.join(FAMILIES)}."
                )

    @classmethod
    def parse(cls, text: str) -> "BasisSpec":
        """Reads `hadamard` (both sides) or `hadamard:identity` (left:right).

        Raises:
          ValueError: If a name is unknown.
        """
        left, _, right = text.partition(":")
        return cls(left, right or left)

    def __str__(self) -> str:
        return self.left if self.left == self.right else f"{self.left}:{self.right}"


# `inline`: one program where it is called as it is, and no trace of it in the programs
# of others.
@partial(jax.jit, static_argnames=("family", "n"), inline=True)
def make_basis(family: str, key: Key[Array, ""], n: int) -> Basis:
    """A basis of R^n of the named family.

    Raises:
      ValueError: If the family is unknown or `n < 1`.
    """
    if n < 1:
        raise ValueError(f"A basis needs `n` of at least 1. Got n={n}.")
    return FAMILIES[BasisSpec(family, family).left](key, n)


@partial(jax.jit, static_argnames=("spec", "shape"), inline=True)
def make_pair(
    spec: BasisSpec, key: Key[Array, ""], shape: tuple[int, int]
) -> KroneckerBasis:
    """The pair (Q1, Q2) for `[m, n]` blocks; each side has a key of its own."""
    left_key, right_key = jax.random.split(key)
    return KroneckerBasis(
        make_basis(spec.left, left_key, shape[0]),
        make_basis(spec.right, right_key, shape[1]),
    )
