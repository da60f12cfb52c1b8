"""Codebooks of scalars by k-means: one per matrix, or one per output channel."""

import dataclasses
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8

from kashin_jax.codebooks import assign_scalars, fit_scalars
from kashin_jax.methods.base import Encoded, Method, register, split_key
from kashin_jax.methods.feedback import RowCode, code_rows
from kashin_jax.tensors import CodebookTensor, QuantizedTensor
from kashin_jax.tensors.grouped import GroupLayout

__all__ = [
    "ChannelKMeans",
    "KMeans",
    "ScalarCode",
    "channel_kmeans_code",
    "kmeans_code",
]


@register("k-means")
@dataclasses.dataclass(frozen=True, kw_only=True)
class KMeans(Method):
    """One codebook of `2**bits` float32 levels per tensor (the paper's "k-means").

    Attributes:
      bits: Code width.
      num_restarts: k-means++ starts beside the quantile start.
    """

    bits: int = 4
    num_restarts: int = 4

    takes_feedback: ClassVar[bool] = True

    def encode(self, weight: Float[Array, "m n"], key: Key[Array, ""]) -> Encoded:
        """Encodes a matrix; the key seeds the starts of k-means."""
        _, codebook_key = split_key(key)
        x, restarts = weight.astype(jnp.float32), self.num_restarts
        code = kmeans_code(x, codebook_key, bits=self.bits, num_restarts=restarts)
        layout = GroupLayout.of(weight, None, self.bits)
        codes = layout.pack(code.codes)
        return Encoded(CodebookTensor(codes, code.levels, code.scale, None, layout))

    def with_feedback(
        self,
        weight: Float[Array, "m n"],
        free: QuantizedTensor,
        moments: Float[Array, "m m"],
    ) -> CodebookTensor:
        """Codes a matrix again with the levels of `free`, input after input."""
        assert isinstance(free, CodebookTensor), "a tensor of this method"
        return _fed(weight.astype(jnp.float32), free, moments)


@jax.jit
def _fed(
    x: Float[Array, "m n"], free: CodebookTensor, moments: Float[Array, "m m"]
) -> CodebookTensor:
    levels, scale = free.levels, free.scale.reshape(())
    assert levels is not None, "only those of NF4 are not stored"
    unit = jnp.where(scale > 0, scale, 1.0)

    def code(_: None, row: Float[Array, " n"], __: Int[Array, ""]) -> RowCode:
        codes = assign_scalars(row / unit, levels)
        return RowCode(codes, scale * levels[codes])

    codes = code_rows(x, moments, lambda *_: None, code).codes
    return free.replace(packed_codes=free.layout.pack(codes))


@register("k-means-channel")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelKMeans(Method):
    """A codebook of `2**bits` fp16 levels per output channel, one float32 scale.

    Attributes:
      bits: Code width.
      num_restarts: k-means++ starts beside the two fixed ones.
    """

    bits: int = 4
    num_restarts: int = 4

    def encode(self, weight: Float[Array, "m n"], key: Key[Array, ""]) -> Encoded:
        """Encodes a matrix; the key seeds the starts of k-means."""
        _, codebook_key = split_key(key)
        x, restarts = weight.astype(jnp.float32), self.num_restarts
        code = channel_kmeans_code(
            x, codebook_key, bits=self.bits, num_restarts=restarts
        )
        layout = GroupLayout.of(weight, None, self.bits)
        codes, levels = layout.pack(code.codes), code.levels.astype(jnp.float16)
        return Encoded(CodebookTensor(codes, levels, code.scale, None, layout))


class ScalarCode(NamedTuple):
    """Codes with `w = scale * levels[code]`.

    Attributes:
      codes: Index of a level for every entry.
      levels: Ascending levels; one column for every output channel where each has its
        own.
      scale: Scale of every group; of shape `[1, 1, 1]` per tensor.
    """

    codes: UInt8[Array, "*shape"]
    levels: Float[Array, " k"] | Float[Array, "k n"]
    scale: Float[Array, "g 1 n"]


def kmeans_code(
    x: Float[Array, "m n"],
    key: Key[Array, ""],
    *,
    bits: int,
    num_restarts: int = 4,
    rtol: float | Float[Array, ""] = 1e-5,
    max_steps: int | Int[Array, ""] = 1000,
) -> ScalarCode:
    """One codebook of `2**bits` levels for the whole matrix, by sorted Lloyd steps.

    The 2024 paper's "k-means" baseline. Levels are for unit root-mean-square.
    """
    flat, scale = _unit_rms(x)
    book = fit_scalars(
        key,
        flat,
        2**bits,
        num_restarts=num_restarts,
        rtol=rtol,
        max_steps=max_steps,
    )
    codes = assign_scalars(flat, book.levels).reshape(x.shape)
    return ScalarCode(codes, book.levels, scale)


@partial(jax.jit, static_argnames=("bits", "num_restarts"))
def channel_kmeans_code(
    x: Float[Array, "m n"],
    key: Key[Array, ""],
    *,
    bits: int,
    num_restarts: int = 4,
    rtol: float | Float[Array, ""] = 1e-5,
    max_steps: int | Int[Array, ""] = 1000,
) -> ScalarCode:
    """A codebook of `2**bits` fp16 levels for every output channel, each fitted alone.

    Levels are for a matrix of unit root-mean-square, and rounded before the codes are
    chosen.
    """
    flat, scale = _unit_rms(x)

    def fit(
        column: Float[Array, " m"], column_key: Key[Array, ""]
    ) -> tuple[UInt8[Array, " m"], Float[Array, " k"]]:
        book = fit_scalars(
            column_key,
            column,
            2**bits,
            num_restarts=num_restarts,
            rtol=rtol,
            max_steps=max_steps,
        )
        levels = book.levels.astype(jnp.float16).astype(jnp.float32)
        return assign_scalars(column, levels), levels

    keys = jax.random.split(key, x.shape[1])
    fit_all = jax.vmap(fit, in_axes=(1, 0), out_axes=1)
    codes, levels = fit_all(flat.reshape(x.shape), keys)
    return ScalarCode(codes, levels, scale)


@jax.jit
def _unit_rms(
    x: Float[Array, "m n"],
) -> tuple[Float[Array, " p"], Float[Array, "1 1 1"]]:
    # Flat, so that matrices of equal size share the compiled fit.
    peak = jnp.max(jnp.abs(x))
    unit = x / jnp.where(peak > 0, peak, 1.0)
    rms = jnp.sqrt(jnp.mean(jnp.square(unit)))
    unit = unit / jnp.where(rms > 0, rms, 1.0)
    return unit.reshape(-1), (peak * rms).reshape(1, 1, 1)
