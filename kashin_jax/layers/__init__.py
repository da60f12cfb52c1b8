"""Flax layers that hold packed kernels."""

from kashin_jax.layers.embed import KashinEmbed as KashinEmbed
from kashin_jax.layers.linear import KashinLinear as KashinLinear
from kashin_jax.layers.linen import KashinDense as KashinDense
from kashin_jax.layers.linen import packed_dense as packed_dense
from kashin_jax.layers.packed import DerivedBasis as DerivedBasis
from kashin_jax.layers.packed import PackedKernel as PackedKernel

__all__ = [
    "DerivedBasis",
    "KashinDense",
    "KashinEmbed",
    "KashinLinear",
    "PackedKernel",
    "packed_dense",
]
