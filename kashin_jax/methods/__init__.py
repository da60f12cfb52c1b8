"""Quantization methods, a frozen dataclass each, and `quantize`."""

from kashin_jax.methods.alternating import AlternatingKashin as AlternatingKashin
from kashin_jax.methods.asymmetric import asymmetric_target as asymmetric_target
from kashin_jax.methods.base import Encoded as Encoded
from kashin_jax.methods.base import Method as Method
from kashin_jax.methods.base import add_method as add_method
from kashin_jax.methods.base import config_from_json as config_from_json
from kashin_jax.methods.base import config_to_json as config_to_json
from kashin_jax.methods.base import method_names as method_names
from kashin_jax.methods.base import register as register
from kashin_jax.methods.feedback import output_loss as output_loss
from kashin_jax.methods.hqq import HQQ as HQQ
from kashin_jax.methods.joint.coder import JointKashin as JointKashin
from kashin_jax.methods.kashin import GreedyKashin as GreedyKashin
from kashin_jax.methods.kmeans import ChannelKMeans as ChannelKMeans
from kashin_jax.methods.kmeans import KMeans as KMeans
from kashin_jax.methods.nf4 import NF4 as NF4
from kashin_jax.methods.quantize import DEFAULT_CONFIG as DEFAULT_CONFIG
from kashin_jax.methods.quantize import QuantizationReport as QuantizationReport
from kashin_jax.methods.quantize import distinct_values as distinct_values
from kashin_jax.methods.quantize import encode as encode
from kashin_jax.methods.quantize import encode_few_values as encode_few_values
from kashin_jax.methods.quantize import quantize as quantize
from kashin_jax.methods.quantize import quantize_stack as quantize_stack
from kashin_jax.methods.quantize import require_finite as require_finite
from kashin_jax.methods.quantize import weight_error as weight_error
from kashin_jax.methods.rotated import Rotated as Rotated
from kashin_jax.methods.rtn import RTN as RTN
from kashin_jax.methods.uniform import Uniform as Uniform

__all__ = [
    "DEFAULT_CONFIG",
    "HQQ",
    "NF4",
    "RTN",
    "AlternatingKashin",
    "ChannelKMeans",
    "Encoded",
    "GreedyKashin",
    "JointKashin",
    "KMeans",
    "Method",
    "QuantizationReport",
    "Rotated",
    "Uniform",
    "add_method",
    "asymmetric_target",
    "config_from_json",
    "config_to_json",
    "distinct_values",
    "encode",
    "encode_few_values",
    "method_names",
    "output_loss",
    "quantize",
    "quantize_stack",
    "register",
    "require_finite",
    "weight_error",
]
