"""Kashin quantization of neural-network weights in JAX.

Layers of the library, imported downwards only: `bases`, `decomposition`, `theory`,
`codebooks`, `coding`, `packing`, `quantized`, `layers`, `models`. This module has the
public names that need no model.
"""

from kashin_jax.bases import BasisSpec as BasisSpec
from kashin_jax.bases import KroneckerBasis as KroneckerBasis
from kashin_jax.bases import make_basis as make_basis
from kashin_jax.bases import make_pair as make_pair
from kashin_jax.decomposition import KashinDecomposition as KashinDecomposition
from kashin_jax.decomposition import kashin_decompose as kashin_decompose
from kashin_jax.layers import KashinDense as KashinDense
from kashin_jax.layers import KashinEmbed as KashinEmbed
from kashin_jax.layers import KashinLinear as KashinLinear
from kashin_jax.layers import dequantize_params as dequantize_params
from kashin_jax.layers import quantize_model as quantize_model
from kashin_jax.layers import quantize_params as quantize_params
from kashin_jax.quantized import ChannelKMeansConfig as ChannelKMeansConfig
from kashin_jax.quantized import HQQConfig as HQQConfig
from kashin_jax.quantized import JointConfig as JointConfig
from kashin_jax.quantized import KashinConfig as KashinConfig
from kashin_jax.quantized import KMeansConfig as KMeansConfig
from kashin_jax.quantized import NF4Config as NF4Config
from kashin_jax.quantized import QuantizationReport as QuantizationReport
from kashin_jax.quantized import QuantizedTensor as QuantizedTensor
from kashin_jax.quantized import RotatedKMeansConfig as RotatedKMeansConfig
from kashin_jax.quantized import RotatedRTNConfig as RotatedRTNConfig
from kashin_jax.quantized import RTNConfig as RTNConfig
from kashin_jax.quantized import Rule as Rule
from kashin_jax.quantized import Rules as Rules
from kashin_jax.quantized import UniformConfig as UniformConfig
from kashin_jax.quantized import bits_per_weight as bits_per_weight
from kashin_jax.quantized import dequantize as dequantize
from kashin_jax.quantized import encode as encode
from kashin_jax.quantized import matmul as matmul
from kashin_jax.quantized import quantize as quantize
from kashin_jax.quantized import stored_bits as stored_bits

__all__ = [
    "BasisSpec",
    "ChannelKMeansConfig",
    "HQQConfig",
    "JointConfig",
    "KMeansConfig",
    "KashinConfig",
    "KashinDecomposition",
    "KashinDense",
    "KashinEmbed",
    "KashinLinear",
    "KroneckerBasis",
    "NF4Config",
    "QuantizationReport",
    "QuantizedTensor",
    "RTNConfig",
    "RotatedKMeansConfig",
    "RotatedRTNConfig",
    "Rule",
    "Rules",
    "UniformConfig",
    "bits_per_weight",
    "dequantize",
    "dequantize_params",
    "encode",
    "kashin_decompose",
    "make_basis",
    "make_pair",
    "matmul",
    "quantize",
    "quantize_model",
    "quantize_params",
    "stored_bits",
]
