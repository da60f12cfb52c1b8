"""Quantization methods: a frozen configuration each, and `quantize`."""

from kashin_jax.methods.base import METHOD_NAMES as METHOD_NAMES
from kashin_jax.methods.base import config_from_json as config_from_json
from kashin_jax.methods.base import config_to_json as config_to_json
from kashin_jax.methods.configs import DEFAULT_CONFIG as DEFAULT_CONFIG
from kashin_jax.methods.configs import HQQ as HQQ
from kashin_jax.methods.configs import NF4 as NF4
from kashin_jax.methods.configs import RTN as RTN
from kashin_jax.methods.configs import ChannelKMeans as ChannelKMeans
from kashin_jax.methods.configs import KMeans as KMeans
from kashin_jax.methods.configs import Method as Method
from kashin_jax.methods.configs import RotatedKMeansConfig as RotatedKMeansConfig
from kashin_jax.methods.configs import RotatedRTNConfig as RotatedRTNConfig
from kashin_jax.methods.configs import Uniform as Uniform
from kashin_jax.methods.joint.coder import JointKashin as JointKashin
from kashin_jax.methods.kashin import GreedyKashin as GreedyKashin
from kashin_jax.methods.quantize import QuantizationReport as QuantizationReport
from kashin_jax.methods.quantize import encode as encode
from kashin_jax.methods.quantize import quantize as quantize
from kashin_jax.methods.quantize import require_finite as require_finite

__all__ = [
    "DEFAULT_CONFIG",
    "HQQ",
    "METHOD_NAMES",
    "NF4",
    "RTN",
    "ChannelKMeans",
    "GreedyKashin",
    "JointKashin",
    "KMeans",
    "Method",
    "QuantizationReport",
    "RotatedKMeansConfig",
    "RotatedRTNConfig",
    "Uniform",
    "config_from_json",
    "config_to_json",
    "encode",
    "quantize",
    "require_finite",
]
