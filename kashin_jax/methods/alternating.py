"""The follow-up's code: every vector decomposed on a fixed schedule, levels of its own.

Cherniuk, Rudikov, Kashin and Oseledets, "Structured transforms for low-overhead
quantization of language models" (2026), arXiv 2609.11687.
"""

import dataclasses
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8

from kashin_jax.bases import Basis
from kashin_jax.codebooks import assign_scalars, lloyd_sorted
from kashin_jax.methods.base import Encoded, Method, register, split_key
from kashin_jax.methods.feedback import RowCode, code_rows
from kashin_jax.packing import pack_matrix
from kashin_jax.tensors import KashinVectorTensor, QuantizedTensor
from kashin_jax.tensors.kashin_vectors import (
    VectorLayout,
    factors_of_codes,
    vector_bases,
)
from kashin_jax.theory import solve_alternating

__all__ = ["AlternatingKashin", "VectorCode", "vector_code"]

# Numbers of the vectors that are coded at a time: transforms take several copies.
_AT_ONCE = 2**22
# All rounds are taken, except of a zero vector.
_NO_RESIDUAL = 1e-9


@register("kashin-dct")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AlternatingKashin(Method):
    """Kashin-DCT: a sign-DCT basis, steps u, u, v, v, closed-form centres.

    Every column w is coded alone as u + P v, with `bits / 2` bits for an entry of
    either factor (the odd one for u) and as many sign steps of a round for it. Levels
    of a factor start from the sums of its first steps, `+-c1 +-c2`, are refined by
    Lloyd steps that keep them symmetric, and are stored as fp16 magnitudes: at 4 bits
    four for a column, 4 + 64 / N bits per weight.

    Attributes:
      bits: Code width, 2 to 8; the paper has 4, that is 2 + 2.
      axis: What a vector is: 0, a column of `[in, out]`, all inputs of one output; 1, a
        row, all outputs of one input, as error feedback needs it.
      rounds: Rounds of the schedule. On opt-wiki-18m at 4 bits the relative squared
        error is .0196 with 1, .0187 with 2 and .0186 with 4 or 20.
      lloyd_steps: Steps from the closed-form centres; .0195 without any, .0186 with 3
        or 50.

    Source: Cherniuk et al. (2026), arXiv 2609.11687.
    """

    bits: int = 4
    axis: int = 0
    rounds: int = 4
    lloyd_steps: int = 3

    takes_feedback: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._as_python()
        if self.bits not in range(2, 9):
            raise ValueError(
                "Kashin-DCT exists at 2 to 8 whole bits, one for each factor at least. "
                f"Got bits={self.bits}."
            )
        if self.axis not in (0, 1):
            raise ValueError(f"`axis` must be 0 or 1. Got {self.axis}.")
        if self.rounds < 1:
            raise ValueError(f"`rounds` must be at least 1. Got {self.rounds}.")
        if self.lloyd_steps < 0:
            raise ValueError(
                f"`lloyd_steps` must be at least 0. Got {self.lloyd_steps}."
            )

    def encode(self, weight: Float[Array, "m n"], key: Key[Array, ""]) -> Encoded:
        """Encodes a matrix; the key seeds the signs of P."""
        seed, _ = split_key(key)
        m, n = weight.shape
        layout = VectorLayout(
            shape=(m, n), axis=self.axis, bits=self.bits, dtype=weight.dtype.name
        )
        pair = vector_bases(seed, layout.shape, self.axis)
        code = _encode(weight, pair[self.axis], self, layout)
        packed = pack_matrix(code.codes, self.bits)
        return Encoded(
            KashinVectorTensor(packed, code.u_levels, code.v_levels, seed, layout)
        )

    def for_feedback(self) -> "AlternatingKashin":
        """With vectors along outputs: errors go from input to input."""
        return dataclasses.replace(self, axis=1)

    def with_feedback(
        self,
        weight: Float[Array, "m n"],
        free: QuantizedTensor,
        moments: Float[Array, "m m"],
    ) -> KashinVectorTensor:
        """Codes a matrix again, input after input, each with magnitudes of its own.

        Raises:
          ValueError: If vectors run along inputs, which are then coded together.
        """
        assert isinstance(free, KashinVectorTensor), "a tensor of this method"
        if not free.layout.axis:
            raise ValueError(
                "Error feedback goes from input to input, which a vector along inputs "
                "has all of; take `axis=1`."
            )
        return _fed(weight, free, moments, self)


class VectorCode(NamedTuple):
    """Codes and magnitudes of vectors.

    Attributes:
      codes: As in a `KashinVectorTensor`; for vectors of a matrix, those of the matrix.
      u_levels: Magnitudes of u, ascending, in the units of the vector.
      v_levels: Magnitudes of v.
    """

    codes: UInt8[Array, "*shape"]
    u_levels: Float[Array, "k ..."]
    v_levels: Float[Array, "l ..."]


def vector_code(
    x: Float[Array, " n"], basis: Basis, config: AlternatingKashin
) -> VectorCode:
    """Codes one vector of any scale.

    Args:
      x: Must be finite.
      basis: P.
      config: Static choices.
    """
    v_bits = config.bits // 2
    schedule = config.bits - v_bits, v_bits
    found = solve_alternating(
        x, basis, rtol=_NO_RESIDUAL, max_steps=config.rounds * sum(schedule),
        schedule=schedule,
    )  # fmt: skip
    scale = found.solution.scale

    def coded(
        factor: Float[Array, " n"], centres: Float[Array, " k"]
    ) -> tuple[UInt8[Array, " n"], Float[Array, " l"]]:
        half = len(centres) // 2
        sizes = jnp.abs(factor)
        levels = lloyd_sorted(
            jnp.sort(sizes), centres[half:], rtol=_NO_RESIDUAL,
            max_steps=config.lloyd_steps,
        ).levels  # fmt: skip
        # Rounded first, so that the codes fit the levels they decode by.
        stored = (scale * levels).astype(jnp.float16)
        size = assign_scalars(scale * sizes, stored.astype(jnp.float32))
        return jnp.where(factor >= 0, size + jnp.uint8(half), size), stored

    u_codes, u_levels = coded(found.solution.u, found.u_centres)
    v_codes, v_levels = coded(found.solution.v, found.v_centres)
    return VectorCode((u_codes << v_bits) | v_codes, u_levels, v_levels)


@partial(jax.jit, static_argnames=("config", "layout"))
def _encode(
    weight: Float[Array, "m n"],
    basis: Basis,
    config: AlternatingKashin,
    layout: VectorLayout,
) -> VectorCode:
    x = weight.astype(jnp.float32)
    vectors = x if layout.axis else x.T
    found = jax.lax.map(
        lambda vector: vector_code(vector, basis, config), vectors,
        batch_size=min(len(vectors), max(1, _AT_ONCE // vectors.shape[1])),
    )  # fmt: skip
    codes = found.codes if layout.axis else found.codes.T
    return VectorCode(codes, found.u_levels.T, found.v_levels.T)


@partial(jax.jit, static_argnames="config")
def _fed(
    weight: Float[Array, "m n"],
    free: KashinVectorTensor,
    moments: Float[Array, "m m"],
    config: AlternatingKashin,
) -> KashinVectorTensor:
    layout = free.layout
    basis = vector_bases(free.seed, layout.shape, 1).right

    def code(_: None, row: Float[Array, " n"], __: Int[Array, ""]) -> RowCode:
        found = vector_code(row, basis, config)
        levels = found.u_levels[:, None], found.v_levels[:, None]
        u, v = factors_of_codes(found.codes[None], *levels, layout)
        values = (u + basis.synthesis(v))[0]
        return RowCode(found.codes, values, (found.u_levels, found.v_levels))

    found = code_rows(weight.astype(jnp.float32), moments, lambda *_: None, code)
    u_levels, v_levels = found.stored
    return free.replace(
        packed_codes=pack_matrix(found.codes, layout.bits),
        u_levels=u_levels.T,
        v_levels=v_levels.T,
    )
