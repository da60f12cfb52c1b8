"""Flax layers that hold packed kernels."""

from kashin_jax.deprecated import LAYERS, forwarding
from kashin_jax.layers.contraction import Contraction as Contraction
from kashin_jax.layers.embed import QuantizedEmbed as QuantizedEmbed
from kashin_jax.layers.linear import QuantizedEinsum as QuantizedEinsum
from kashin_jax.layers.linear import QuantizedLinear as QuantizedLinear
from kashin_jax.layers.linen import QuantizedDense as QuantizedDense
from kashin_jax.layers.linen import packed_dense as packed_dense
from kashin_jax.layers.packed import DerivedBasis as DerivedBasis
from kashin_jax.layers.packed import PackedKernel as PackedKernel
from kashin_jax.layers.packed import PackedParam as PackedParam

__all__ = [
    "Contraction",
    "DerivedBasis",
    "PackedKernel",
    "PackedParam",
    "QuantizedDense",
    "QuantizedEinsum",
    "QuantizedEmbed",
    "QuantizedLinear",
    "packed_dense",
]

__getattr__ = forwarding(__name__, LAYERS)
