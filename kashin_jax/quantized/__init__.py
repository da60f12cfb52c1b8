"""Quantized matrices: `quantize`, `matmul`, `dequantize`, `stored_bits`."""

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kashin_jax.coding.joint import JointConfig as JointConfig
from kashin_jax.coding.kashin import KashinConfig as KashinConfig
from kashin_jax.quantized.config_json import METHOD_NAMES as METHOD_NAMES
from kashin_jax.quantized.config_json import config_from_json as config_from_json
from kashin_jax.quantized.config_json import config_to_json as config_to_json
from kashin_jax.quantized.configs import DEFAULT_CONFIG as DEFAULT_CONFIG
from kashin_jax.quantized.configs import ChannelKMeansConfig as ChannelKMeansConfig
from kashin_jax.quantized.configs import HQQConfig as HQQConfig
from kashin_jax.quantized.configs import KMeansConfig as KMeansConfig
from kashin_jax.quantized.configs import NF4Config as NF4Config
from kashin_jax.quantized.configs import QuantizerConfig as QuantizerConfig
from kashin_jax.quantized.configs import RotatedKMeansConfig as RotatedKMeansConfig
from kashin_jax.quantized.configs import RotatedRTNConfig as RotatedRTNConfig
from kashin_jax.quantized.configs import RTNConfig as RTNConfig
from kashin_jax.quantized.configs import UniformConfig as UniformConfig
from kashin_jax.quantized.controls import AffineTensor as AffineTensor
from kashin_jax.quantized.controls import CodebookTensor as CodebookTensor
from kashin_jax.quantized.layout import Quantized as Quantized
from kashin_jax.quantized.layout import bits_per_weight as bits_per_weight
from kashin_jax.quantized.layout import stored_bits as stored_bits
from kashin_jax.quantized.product import matmul as matmul
from kashin_jax.quantized.quantize import QuantizationReport as QuantizationReport
from kashin_jax.quantized.quantize import encode as encode
from kashin_jax.quantized.quantize import quantize as quantize
from kashin_jax.quantized.quantize import require_finite as require_finite
from kashin_jax.quantized.rules import DEFAULT_SKIPS as DEFAULT_SKIPS
from kashin_jax.quantized.rules import SHARED_INPUTS as SHARED_INPUTS
from kashin_jax.quantized.rules import Rule as Rule
from kashin_jax.quantized.rules import Rules as Rules
from kashin_jax.quantized.rules import rules_from_json as rules_from_json
from kashin_jax.quantized.rules import rules_to_json as rules_to_json
from kashin_jax.quantized.tensor import QuantizedTensor as QuantizedTensor
from kashin_jax.quantized.tensor import derive_basis as derive_basis
from kashin_jax.quantized.tensor import derive_rotation as derive_rotation

__all__ = [
    "DEFAULT_CONFIG",
    "DEFAULT_SKIPS",
    "METHOD_NAMES",
    "SHARED_INPUTS",
    "AffineTensor",
    "ChannelKMeansConfig",
    "CodebookTensor",
    "HQQConfig",
    "JointConfig",
    "KMeansConfig",
    "KashinConfig",
    "NF4Config",
    "QuantizationReport",
    "Quantized",
    "QuantizedTensor",
    "QuantizerConfig",
    "RTNConfig",
    "RotatedKMeansConfig",
    "RotatedRTNConfig",
    "Rule",
    "Rules",
    "UniformConfig",
    "bits_per_weight",
    "config_from_json",
    "config_to_json",
    "dequantize",
    "derive_basis",
    "derive_rotation",
    "encode",
    "matmul",
    "quantize",
    "require_finite",
    "rules_from_json",
    "rules_to_json",
    "stored_bits",
]


def dequantize(
    tensor: Quantized, dtype: DTypeLike | None = None
) -> Float[Array, "m n"]:
    """The whole matrix, in `dtype` or else the type that it had."""
    return tensor.decode().astype(tensor.dtype if dtype is None else dtype)
