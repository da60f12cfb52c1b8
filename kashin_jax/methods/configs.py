"""Static choices of the controls, one frozen dataclass each.

`GreedyKashin` stands beside its coder in `coding.kashin`.
"""

import dataclasses

import jax

from kashin_jax.bases import BasisSpec
from kashin_jax.methods.joint.coder import JointKashin
from kashin_jax.methods.kashin import GreedyKashin

__all__ = [
    "DEFAULT_CONFIG",
    "HQQ",
    "NF4",
    "RTN",
    "ChannelKMeans",
    "KMeans",
    "Method",
    "RotatedKMeansConfig",
    "RotatedRTNConfig",
    "Uniform",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _BitsConfig:
    bits: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"`bits` must lie in [1, 8]. Got bits={self.bits}.")
        size = getattr(self, "group_size", None)
        if size is not None and size < 1:
            raise ValueError(f"`group_size` must be at least 1. Got {size}.")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform(_BitsConfig):
    """Min-max grid per tensor, float32 step and offset (the 2024 paper's "uniform").

    Attributes:
      bits: Code width.
    """


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class RTN(_BitsConfig):
    """Asymmetric round-to-nearest, fp16 step and whole zero point per group.

    Attributes:
      bits: Code width, of the zero points too.
      group_size: Weights of one output channel that share a step; None for the whole
        channel.
    """

    group_size: int | None = 128


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class RotatedRTNConfig(RTN):
    """`Q1^T W Q2`, then round-to-nearest: what rotations alone bring to plain grids.

    Attributes:
      bits: Code width, of the zero points too.
      group_size: Rotated weights of one column that share a step; None for all.
      basis: The rotation, with the seed of the Kashin row: the same matrices.
    """

    group_size: int | None = 64
    basis: BasisSpec = BasisSpec("hadamard", "hadamard")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class HQQ(_BitsConfig):
    """Half-quadratic quantization: fp16 step and fitted fp16 zero point per group.

    Attributes:
      bits: Code width.
      group_size: Weights of one output channel that share step and zero point.
    """

    group_size: int = 64


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class NF4(_BitsConfig):
    """NF4 with fp16 scales and no double quantization.

    Attributes:
      bits: Always 4.
      group_size: Weights of one output channel that share a scale.
    """

    group_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits != 4:
            raise ValueError(f"NF4 exists at 4 bits only. Got bits={self.bits}.")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class KMeans(_BitsConfig):
    """One codebook of `2**bits` float32 levels per tensor (the paper's "k-means").

    Attributes:
      bits: Code width.
      num_restarts: k-means++ starts beside the quantile start.
    """

    num_restarts: int = 4


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class RotatedKMeansConfig(KMeans):
    """`Q1^T W Q2`, then k-means per tensor: the control no published table has.

    Attributes:
      bits: Code width.
      num_restarts: k-means++ starts beside the quantile start.
      basis: The rotation, with the seed of the Kashin row: the same matrices.
    """

    basis: BasisSpec = BasisSpec("hadamard", "hadamard")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelKMeans(_BitsConfig):
    """A codebook of `2**bits` fp16 levels per output channel, one float32 scale.

    Attributes:
      bits: Code width.
      num_restarts: k-means++ starts beside the two fixed ones.
    """

    num_restarts: int = 4


Method = (
    GreedyKashin
    | JointKashin
    | Uniform
    | RTN
    | RotatedRTNConfig
    | HQQ
    | NF4
    | KMeans
    | RotatedKMeansConfig
    | ChannelKMeans
)

DEFAULT_CONFIG = JointKashin()
"""Joint coding at 4 bits; the 2024 paper's method is `GreedyKashin`."""
