"""Scales of inputs and outputs, as they are stored: in half precision."""

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, Int

__all__ = [
    "as_half",
    "common_input_scale",
    "expansion",
    "input_scale",
    "relative_quarter",
    "relative_rms",
    "weighted_scale",
]


def input_scale(
    x: Float[Array, "m n"],
    balance: float,
    importance: Float[Array, " m"] | None,
    distortion: float,
    height: int,
) -> Float[Array, " m"] | None:
    """The scale of every input, by which its weights are divided before coding.

    A block's error is spread evenly over its inputs, whatever their variances r^2, so
    the weighted error is about (sum d s^2) (sum r^2 / s^2) for importances d and scales
    s; least, by Cauchy and Schwarz, at s^4 = r^2 / d. Without importances `balance`
    chooses the power of r; 1/2 is the one of equal importances. `distortion` is the
    share of its variance that a block of this height loses.
    """
    if importance is not None:
        root = relative_rms(x, axis=1, power=0.5)
        quarter = relative_quarter(importance)
        return weighted_scale(root, quarter, distortion, height)
    return relative_rms(x, axis=1, power=balance) if balance else None


def relative_quarter(importance: Float[Array, " m"]) -> Float[Array, " m"]:
    """Fourth roots of importances, over their mean."""
    quarter = jnp.sqrt(jnp.sqrt(importance.astype(jnp.float32)))
    mean = jnp.mean(quarter)
    return quarter / jnp.where(mean > 0, mean, 1.0)


def weighted_scale(
    root: Float[Array, " m"],
    quarter: Float[Array, " m"],
    distortion: float,
    height: int,
) -> Float[Array, " m"]:
    """The scale of least weighted error, as it is stored; see `input_scale`.

    Args:
      root: Square roots of the root-mean-square of every input's weights, relative.
      quarter: Of `relative_quarter`.
      distortion: As for `input_scale`.
      height: Rows of a block.
    """
    return as_half(root / _bounded(quarter, root, distortion, height))


def _bounded(
    relative: Float[Array, " m"],
    root: Float[Array, " m"],
    distortion: float,
    height: int,
) -> Float[Array, " m"]:
    """Relative fourth roots of importances, none so small that a row is lost.

    With scales root / q a row loses distortion * mean(r q^2) / (r q^2) of itself, the
    mean being that of its block and r the squares of the roots: by the bound below a
    fifth of it on Gaussian blocks, where zeros in its place would lose all. Blocks of a
    few strong rows lose up to four times as much. Inputs that a calibration never met,
    of importance 0, would else lose 176 times themselves at 4 bits.
    """
    relative = relative.reshape(-1, height)
    weights = jnp.square(root).reshape(-1, height)
    least = 5 * distortion

    def raised(_: Int[Array, ""], whole: Float[Array, "r 1"]) -> Float[Array, "r 1"]:
        # What is raised adds to the whole, `least` of it at most, so that this ends.
        of_rows = jnp.maximum(weights * jnp.square(relative), least * whole)
        return jnp.mean(of_rows, axis=1, keepdims=True)

    start = jnp.zeros((relative.shape[0], 1), jnp.float32)
    whole = jax.lax.fori_loop(0, 16, raised, start)
    bounded = jnp.maximum(relative, jnp.sqrt(least * whole / weights))
    # A block of nothing but importances of 0 is coded as if all were alike.
    return jnp.where(whole > 0, bounded, 1.0).reshape(-1)


def common_input_scale(
    weights: Iterable[Float[Array, "*stack m _"]], balance: float
) -> Float16[Array, "*stack m"]:
    """One scale of inputs for matrices that read the same ones.

    The geometric mean of those that each would have alone. In trained attention an
    input may weigh 4 times the mean in k and .08 of it in v, which then is an input of
    large values: by the root-mean-square over the columns of all matrices v would be
    coded at the cost of k (a perplexity of 39 at 2 bits, where apart it is 31 and by
    the geometric mean 32).

    Args:
      weights: Must be finite. Taken one at a time, so that an iterator need not hold
        more than one. Matrices of a stack have a scale each.
      balance: As in `JointKashin`.
    """
    logs = [jnp.log(scale) for scale in map(partial(_own_scale, balance), weights)]
    return as_half(jnp.exp(sum(logs) / len(logs))).astype(jnp.float16)


@partial(jax.jit, static_argnums=0)
def _own_scale(
    balance: float, weight: Float[Array, "*stack m n"]
) -> Float[Array, "*stack m"]:
    if weight.ndim > 2:
        return jax.lax.map(partial(_own_scale, balance), weight)
    # As in `joint_code`, in units of the largest entry.
    peak = jnp.max(jnp.abs(weight)).astype(jnp.float32)
    x = weight.astype(jnp.float32) / jnp.where(peak > 0, peak, 1.0)
    x = x / relative_rms(x, axis=0, power=1.0)[None, :]
    return relative_rms(x, axis=1, power=balance)


def relative_rms(
    x: Float[Array, "m n"], *, axis: int, power: float
) -> Float[Array, " k"]:
    """Root-mean-square along an axis to a power, over its mean; 1 for zero lines.

    Rounded to half precision, as it will be stored.
    """
    rms = jnp.sqrt(jnp.mean(jnp.square(x), axis=axis)) ** power
    mean = jnp.mean(rms)
    relative = rms / jnp.where(mean > 0, mean, 1.0)
    return as_half(jnp.where(rms > 0, relative, 1.0))


def as_half(scale: Float[Array, "*stack k"]) -> Float[Array, "*stack k"]:
    # What half precision cannot hold as a normal number is left to the block's scale.
    return jnp.clip(scale, 1e-4, 6e4).astype(jnp.float16).astype(jnp.float32)


def expansion(
    x: Float[Array, "m n"],
    coded: Float[Array, "m n"],
    in_scale: Float[Array, " m"] | None,
) -> Float[Array, " n"]:
    """`<w, w> / <w, w_q>` of every output; 1 where it is not from 1/2 to 2."""
    rows = jnp.ones(x.shape[0]) if in_scale is None else jnp.square(in_scale)
    whole = jnp.einsum("m,mn,mn->n", rows, x, x, precision="highest")
    kept = jnp.einsum("m,mn,mn->n", rows, x, coded, precision="highest")
    ratio = whole / jnp.where(kept > 0, kept, 1.0)
    return jnp.where((kept > 0) & (ratio > 0.5) & (ratio < 2), ratio, 1.0)
