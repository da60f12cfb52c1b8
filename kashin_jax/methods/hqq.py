"""HQQ: round-to-nearest in groups, the zero point fitted to heavy-tailed errors."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from kashin_jax.methods.base import Encoded, Method, register
from kashin_jax.methods.rtn import AffineCode
from kashin_jax.tensors import AffineTensor
from kashin_jax.tensors.grouped import GroupLayout, group_rows

__all__ = ["HQQ", "hqq_code"]

# What the authors' code takes everywhere.
_P = 0.7
_BETA = 10.0
_KAPPA = 1.01
_MAX_STEPS = 20
# Whole numbers up to here are exact in fp16, so that a zero point of this size is still
# good to half a step.
_MAX_ZERO = 2048.0


@register("hqq")
@dataclasses.dataclass(frozen=True, kw_only=True)
class HQQ(Method):
    """Half-quadratic quantization: fp16 step and fitted fp16 zero point per group.

    Attributes:
      bits: Code width.
      group_size: Weights of one output channel that share step and zero point.
    """

    bits: int = 4
    group_size: int = 64

    def encode(self, weight: Float[Array, "m n"], key: Key[Array, ""]) -> Encoded:
        """Encodes without any randomness."""
        layout = GroupLayout.of(weight, self.group_size, self.bits)
        return Encoded(_encode(weight.astype(jnp.float32), layout))


@partial(jax.jit, static_argnames="layout")
def _encode(x: Float[Array, "m n"], layout: GroupLayout) -> AffineTensor:
    size = layout.group_size or x.shape[0]
    code = hqq_code(x, bits=layout.bits, group_size=size)
    scale, zero = (part.astype(jnp.float16) for part in (code.scale, code.zero))
    return AffineTensor(layout.pack(code.codes), scale, zero, layout)


class _State(NamedTuple):
    zero: Float[Array, "g 1 n"]
    best: Float[Array, "g 1 n"]
    error: Float[Array, ""]  # of the best
    falls: Bool[Array, ""]
    step: Int[Array, ""]


@partial(jax.jit, static_argnames=("bits", "group_size"))
def hqq_code(x: Float[Array, "m n"], *, bits: int, group_size: int) -> AffineCode:
    """Half-quadratic quantization: fp16 step, fp16 zero point that is no whole number.

    Minimises `|x - decoded|_p^p` with p = .7 over the zero points: in turns the
    codes, the errors shrunk towards 0, and the mean zero point that is left. Stops
    after 20 turns, or once the mean absolute error of the whole matrix no longer falls.
    The step is that of the least and the largest entry, widened only where the zero
    point would leave fp16 (groups of nearly equal entries).

    The authors start from rounded zero points at 4 bits, from others elsewhere, and
    take the last ones. Neither start is the better one everywhere (relative squared
    error at 2 bits: Gaussian .193 and .188, Student-t(3) .248 and .368), so both are
    tried here, and the best of all zero points met is taken.

    As in the authors' code, beta is 10 in the units of `x`: errors below .17 are
    shrunk to 0, and on matrices of small entries the turns are those of least squares.

    An overflowing fp16 step shows as infinity.

    Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning
    Models" (2023), and the first ("legacy") solver of their code.
    """
    levels = 2**bits - 1
    groups = group_rows(x, group_size)
    # The filling of a short last group is no entry: it has no part in the means.
    rows = jnp.arange(groups.shape[0] * group_size).reshape(-1, group_size, 1)
    real = jnp.broadcast_to(rows < x.shape[0], groups.shape)
    low = jnp.min(groups, axis=1, keepdims=True)
    scale = _stored_step(groups, low, levels)

    def code(zero: Float[Array, "g 1 n"]) -> Float[Array, "g s n"]:
        return jnp.clip(jnp.round(groups / scale + zero), 0, levels)

    def turn(state: _State) -> _State:
        codes = code(state.zero)
        lost = groups - scale * (codes - state.zero)
        outliers = _shrink(lost, _BETA * _KAPPA ** state.step.astype(jnp.float32))
        zeros = codes - (groups - outliers) / scale
        zero = jnp.mean(zeros, axis=1, keepdims=True, where=real)
        error = jnp.mean(jnp.abs(lost), where=real)
        falls = error < state.error
        best = jnp.where(falls, state.zero, state.best)
        error = jnp.minimum(error, state.error)
        return _State(zero, best, error, falls, state.step + 1)

    def solve(zero: Float[Array, "g 1 n"]) -> _State:
        start = _State(zero, zero, jnp.float32(jnp.inf), jnp.bool_(True), jnp.int32(0))
        return jax.lax.while_loop(
            lambda state: state.falls & (state.step < _MAX_STEPS), turn, start
        )

    exact = -low / scale
    ends = jax.lax.map(solve, jnp.stack([exact, jnp.round(exact)]))
    # Rounded to its stored type first, as the step is.
    zero = ends.best[jnp.argmin(ends.error)].astype(jnp.float16).astype(jnp.float32)
    return AffineCode(code(zero).astype(jnp.uint8), scale, zero)


def _stored_step(
    groups: Float[Array, "g s n"], low: Float[Array, "g 1 n"], levels: int
) -> Float[Array, "g 1 n"]:
    high = jnp.max(groups, axis=1, keepdims=True)
    peak = jnp.max(jnp.abs(groups), axis=1, keepdims=True)
    step = jnp.maximum((high - low) / levels, peak / _MAX_ZERO)
    step = step.astype(jnp.float16).astype(jnp.float32)
    return jnp.maximum(step, float(jnp.finfo(jnp.float16).smallest_subnormal))


def _shrink(x: Float[Array, "g s n"], beta: Float[Array, ""]) -> Float[Array, "g s n"]:
    # The approximate proximal map of |x|^p; the bound keeps x = 0 out of the power.
    size = jnp.maximum(jnp.abs(x), 1e-5)
    return jnp.sign(x) * jnp.maximum(size - size ** (_P - 1) / beta, 0.0)
