"""Codebooks by Lloyd's algorithm: pairs in the plane, scalars on the line."""

from kashin_jax.codebooks.line import ScalarCodebook as ScalarCodebook
from kashin_jax.codebooks.line import assign_scalars as assign_scalars
from kashin_jax.codebooks.line import fit_scalars as fit_scalars
from kashin_jax.codebooks.line import lloyd_sorted as lloyd_sorted
from kashin_jax.codebooks.plane import PairCodebook as PairCodebook
from kashin_jax.codebooks.plane import assign_pairs as assign_pairs
from kashin_jax.codebooks.plane import fit_pairs as fit_pairs
from kashin_jax.codebooks.plane import lloyd_pairs as lloyd_pairs
from kashin_jax.codebooks.starts import kmeans_plus_plus as kmeans_plus_plus

__all__ = [
    "PairCodebook",
    "ScalarCodebook",
    "assign_pairs",
    "assign_scalars",
    "fit_pairs",
    "fit_scalars",
    "kmeans_plus_plus",
    "lloyd_pairs",
    "lloyd_sorted",
]
