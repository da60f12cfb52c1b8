"""Quantization methods: a frozen configuration each, and `quantize`."""

from kashin_jax.methods.base import METHOD_NAMES as METHOD_NAMES
from kashin_jax.methods.base import config_from_json as config_from_json
from kashin_jax.methods.base import config_to_json as config_to_json
from kashin_jax.methods.configs import DEFAULT_CONFIG as DEFAULT_CONFIG
from kashin_jax.methods.configs import ChannelKMeansConfig as ChannelKMeansConfig
from kashin_jax.methods.configs import HQQConfig as HQQConfig
from kashin_jax.methods.configs import KMeansConfig as KMeansConfig
from kashin_jax.methods.configs import NF4Config as NF4Config
from kashin_jax.methods.configs import QuantizerConfig as QuantizerConfig
from kashin_jax.methods.configs import RotatedKMeansConfig as RotatedKMeansConfig
from kashin_jax.methods.configs import RotatedRTNConfig as RotatedRTNConfig
from kashin_jax.methods.configs import RTNConfig as RTNConfig
from kashin_jax.methods.configs import UniformConfig as UniformConfig
from kashin_jax.methods.joint.coder import JointConfig as JointConfig
from kashin_jax.methods.kashin import KashinConfig as KashinConfig
from kashin_jax.methods.quantize import QuantizationReport as QuantizationReport
from kashin_jax.methods.quantize import encode as encode
from kashin_jax.methods.quantize import quantize as quantize
from kashin_jax.methods.quantize import require_finite as require_finite

__all__ = [
    "DEFAULT_CONFIG",
    "METHOD_NAMES",
    "ChannelKMeansConfig",
    "HQQConfig",
    "JointConfig",
    "KMeansConfig",
    "KashinConfig",
    "NF4Config",
    "QuantizationReport",
    "QuantizerConfig",
    "RTNConfig",
    "RotatedKMeansConfig",
    "RotatedRTNConfig",
    "UniformConfig",
    "config_from_json",
    "config_to_json",
    "encode",
    "quantize",
    "require_finite",
]
