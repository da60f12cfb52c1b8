"""The methods whose products are timed, by name."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from kashin_jax import (
    BasisSpec,
    ChannelKMeansConfig,
    HQQConfig,
    JointConfig,
    KashinConfig,
    KMeansConfig,
    NF4Config,
    RotatedKMeansConfig,
    RotatedRTNConfig,
    RTNConfig,
    UniformConfig,
)
from kashin_jax.quantized import QuantizerConfig

__all__ = ["METHODS", "method_config"]

_LEFT = BasisSpec("hadamard", "identity")
_HAAR = BasisSpec("haar", "haar")

METHODS: Mapping[str, Callable[[Any], QuantizerConfig]] = MappingProxyType(
    {
        "kashin-joint": lambda b: JointConfig(bits=b),
        "kashin-joint-left": lambda b: JointConfig(bits=b, basis=_LEFT),
        "kashin": lambda b: KashinConfig(bits=b),
        "kashin-left": lambda b: KashinConfig(bits=b, basis=_LEFT),
        "kashin-haar": lambda b: KashinConfig(bits=b, basis=_HAAR),
        "rtn-g128": lambda b: RTNConfig(bits=b),
        "hqq-g64": lambda b: HQQConfig(bits=b),
        "nf4-g64": lambda b: NF4Config(bits=b),
        "uniform": lambda b: UniformConfig(bits=b),
        "k-means": lambda b: KMeansConfig(bits=b),
        "k-means-channel": lambda b: ChannelKMeansConfig(bits=b),
        "rotate-k-means": lambda b: RotatedKMeansConfig(bits=b),
        "rotate-rtn-g64": lambda b: RotatedRTNConfig(bits=b),
    }
)
"""`left`: a basis on the side of the inputs alone; else both, Hadamard's or Haar's."""


def method_config(name: str, bits: int | float) -> QuantizerConfig | None:
    """The method at a width; None where it does not exist."""
    if name == "kashin-haar" and bits != 4:
        return None  # one width is enough for a basis that is not held to a target
    try:
        return METHODS[name](bits)
    except ValueError:
        return None
