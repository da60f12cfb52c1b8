"""Kashin quantization of neural-network weights in JAX.

Packages, imported downwards only: `bases`, `decomposition`, `theory`, `codebooks`,
`packing`, `tensors`, `methods`, `layers`, `io`, `models`, `pipeline`. This module has
the public names that need no model.

Nothing is imported before it is asked for: `kashin --help` need not wait for JAX.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kashin_jax.bases import BasisSpec as BasisSpec
    from kashin_jax.bases import KroneckerBasis as KroneckerBasis
    from kashin_jax.bases import make_basis as make_basis
    from kashin_jax.bases import make_pair as make_pair
    from kashin_jax.decomposition import KashinDecomposition as KashinDecomposition
    from kashin_jax.decomposition import kashin_decompose as kashin_decompose
    from kashin_jax.layers import QuantizedDense as QuantizedDense
    from kashin_jax.layers import QuantizedEmbed as QuantizedEmbed
    from kashin_jax.layers import QuantizedLinear as QuantizedLinear
    from kashin_jax.methods import HQQ as HQQ
    from kashin_jax.methods import NF4 as NF4
    from kashin_jax.methods import RTN as RTN
    from kashin_jax.methods import AlternatingKashin as AlternatingKashin
    from kashin_jax.methods import ChannelKMeans as ChannelKMeans
    from kashin_jax.methods import GreedyKashin as GreedyKashin
    from kashin_jax.methods import JointKashin as JointKashin
    from kashin_jax.methods import KMeans as KMeans
    from kashin_jax.methods import Method as Method
    from kashin_jax.methods import QuantizationReport as QuantizationReport
    from kashin_jax.methods import Rotated as Rotated
    from kashin_jax.methods import Uniform as Uniform
    from kashin_jax.methods import encode as encode
    from kashin_jax.methods import quantize as quantize
    from kashin_jax.methods import register as register
    from kashin_jax.pipeline import Rule as Rule
    from kashin_jax.pipeline import Rules as Rules
    from kashin_jax.pipeline import dequantize_params as dequantize_params
    from kashin_jax.pipeline import quantize_model as quantize_model
    from kashin_jax.pipeline import quantize_params as quantize_params
    from kashin_jax.tensors import AffineTensor as AffineTensor
    from kashin_jax.tensors import CodebookTensor as CodebookTensor
    from kashin_jax.tensors import KashinTensor as KashinTensor
    from kashin_jax.tensors import KashinVectorTensor as KashinVectorTensor
    from kashin_jax.tensors import QuantizedTensor as QuantizedTensor
    from kashin_jax.tensors import bits_per_weight as bits_per_weight
    from kashin_jax.tensors import dequantize as dequantize
    from kashin_jax.tensors import matmul as matmul
    from kashin_jax.tensors import prepare as prepare
    from kashin_jax.tensors import stored_bits as stored_bits

    __version__: str

__all__ = [
    "HQQ",
    "NF4",
    "RTN",
    "AffineTensor",
    "AlternatingKashin",
    "BasisSpec",
    "ChannelKMeans",
    "CodebookTensor",
    "GreedyKashin",
    "JointKashin",
    "KMeans",
    "KashinDecomposition",
    "KashinTensor",
    "KashinVectorTensor",
    "KroneckerBasis",
    "Method",
    "QuantizationReport",
    "QuantizedDense",
    "QuantizedEmbed",
    "QuantizedLinear",
    "QuantizedTensor",
    "Rotated",
    "Rule",
    "Rules",
    "Uniform",
    "bits_per_weight",
    "dequantize",
    "dequantize_params",
    "encode",
    "kashin_decompose",
    "make_basis",
    "make_pair",
    "matmul",
    "prepare",
    "quantize",
    "quantize_model",
    "quantize_params",
    "register",
    "stored_bits",
]

# Where the public names are, the parts that import least first.
_PARTS = ("bases", "decomposition", "tensors", "methods", "layers", "pipeline")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for part in map(_part, _PARTS):
            if name in part.__all__:
                return getattr(part, name)
    if name in _PARTS:
        return _part(name)
    if name == "__version__":
        from kashin_jax.version import library_version

        return library_version()
    deprecated = _part("deprecated")
    return deprecated.forwarding(__name__, deprecated.TOP)(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def _part(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
