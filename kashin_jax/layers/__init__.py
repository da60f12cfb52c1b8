"""Flax layers that hold packed kernels, and models made of them."""

from kashin_jax.layers.allocation import allocate_widths as allocate_widths
from kashin_jax.layers.linear import DerivedBasis as DerivedBasis
from kashin_jax.layers.linear import KashinLinear as KashinLinear
from kashin_jax.layers.linear import PackedKernel as PackedKernel
from kashin_jax.layers.model import QuantizedModel as QuantizedModel
from kashin_jax.layers.model import default_select as default_select
from kashin_jax.layers.model import path_key as path_key
from kashin_jax.layers.model import quantize_model as quantize_model
from kashin_jax.layers.model import replace_kernels as replace_kernels
from kashin_jax.layers.model import selected_kernels as selected_kernels

__all__ = [
    "DerivedBasis",
    "KashinLinear",
    "PackedKernel",
    "QuantizedModel",
    "allocate_widths",
    "default_select",
    "path_key",
    "quantize_model",
    "replace_kernels",
    "selected_kernels",
]
