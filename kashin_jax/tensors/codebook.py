"""`CodebookTensor`: a matrix of scalar levels, learned or those of NF4."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8, UInt32

from kashin_jax.tensors.grouped import GroupedTensor, GroupLayout

__all__ = ["NF4_LEVELS", "CodebookTensor"]

# Quantiles of a normal variable, -1, 0 and 1 among them: Dettmers et al., "QLoRA"
# (2023), arXiv 2305.14314, appendix E.
NF4_LEVELS = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CodebookTensor(GroupedTensor):
    """`W = Q1 (scale * levels[code]) Q2^T`, the rotation optional.

    Attributes:
      packed_codes: Codes of all weights, row-major, with an axis of rows where these
        end between bytes.
      levels: Learned levels: float32 for the whole matrix, or fp16 with a column for
        every output channel. None for NF4, whose 16 are fixed and not stored.
      scale: fp16 per group and output channel, or one float32.
      seed: Gives Q1 and Q2; None without rotation.
      layout: Static part.
    """

    kind: ClassVar[str] = "codebook"

    packed_codes: UInt8[Array, " q"] | UInt8[Array, "m q"]
    levels: Float[Array, " k"] | Float[Array, "k n"] | None
    scale: Float[Array, "g 1 c"]
    seed: UInt32[Array, "2"] | None
    layout: GroupLayout

    def float_levels(self) -> Float[Array, " k"] | Float[Array, "k n"]:
        """Levels in float32, those of NF4 included."""
        if self.levels is None:
            return jnp.asarray(NF4_LEVELS)
        return self.levels.astype(jnp.float32)
