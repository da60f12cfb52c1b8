"""Orthogonal bases: `make_basis(family, key, n)` and Kronecker pairs of them."""

from kashin_jax.bases.basis import Basis as Basis
from kashin_jax.bases.basis import dense as dense
from kashin_jax.bases.basis import key_from_seed as key_from_seed
from kashin_jax.bases.basis import seed_from_key as seed_from_key
from kashin_jax.bases.costs import Cost as Cost
from kashin_jax.bases.costs import cost as cost
from kashin_jax.bases.families import FAMILIES as FAMILIES
from kashin_jax.bases.families import BasisSpec as BasisSpec
from kashin_jax.bases.families import make_basis as make_basis
from kashin_jax.bases.families import make_pair as make_pair
from kashin_jax.bases.kronecker import KroneckerBasis as KroneckerBasis

__all__ = [
    "FAMILIES",
    "Basis",
    "BasisSpec",
    "Cost",
    "KroneckerBasis",
    "cost",
    "dense",
    "key_from_seed",
    "make_basis",
    "make_pair",
    "seed_from_key",
]
