"""Flax layers that hold packed kernels, and models made of them."""

from kashin_jax.layers.allocation import allocate_widths as allocate_widths
from kashin_jax.layers.embed import KashinEmbed as KashinEmbed
from kashin_jax.layers.linear import KashinLinear as KashinLinear
from kashin_jax.layers.linen import KashinDense as KashinDense
from kashin_jax.layers.linen import packed_dense as packed_dense
from kashin_jax.layers.model import QuantizedModel as QuantizedModel
from kashin_jax.layers.model import plan_model as plan_model
from kashin_jax.layers.model import quantize_model as quantize_model
from kashin_jax.layers.model import replace_kernels as replace_kernels
from kashin_jax.layers.model import selected_kernels as selected_kernels
from kashin_jax.layers.packed import DerivedBasis as DerivedBasis
from kashin_jax.layers.packed import PackedKernel as PackedKernel
from kashin_jax.layers.params import QuantizedParams as QuantizedParams
from kashin_jax.layers.params import dequantize_params as dequantize_params
from kashin_jax.layers.params import plan_params as plan_params
from kashin_jax.layers.params import quantize_params as quantize_params
from kashin_jax.layers.paths import path_key as path_key
from kashin_jax.layers.plan import LayerPlan as LayerPlan
from kashin_jax.layers.plan import Plan as Plan
from kashin_jax.layers.policy import default_select as default_select
from kashin_jax.layers.report import LayerReport as LayerReport
from kashin_jax.layers.report import outliers as outliers
from kashin_jax.layers.report import report_table as report_table

__all__ = [
    "DerivedBasis",
    "KashinDense",
    "KashinEmbed",
    "KashinLinear",
    "LayerPlan",
    "LayerReport",
    "PackedKernel",
    "Plan",
    "QuantizedModel",
    "QuantizedParams",
    "allocate_widths",
    "default_select",
    "dequantize_params",
    "outliers",
    "packed_dense",
    "path_key",
    "plan_model",
    "plan_params",
    "quantize_model",
    "quantize_params",
    "replace_kernels",
    "report_table",
    "selected_kernels",
]
