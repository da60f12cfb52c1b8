"""Second moments of what layers read, summed over tokens: the symmetric half alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

__all__ = ["Moments", "half_moments", "half_of", "whole_of"]

_STRIPS = 8


@jax.jit
def half_moments(x: Float[Array, "*b m"]) -> Float[Array, "r c"]:
    """The half of X^T X that `half_of` keeps, for the rows X of an array, in float32.

    Args:
      x: Inputs of a layer, any number of tokens, of any floating type.
    """
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    # In strips, the part below the diagonal left out: 9/16 of the work.
    m = rows.shape[1]
    starts = range(0, m, max(1, -(-m // _STRIPS)))
    strips = [
        jnp.einsum(
            "tm,tn->mn", rows[:, start : start + starts.step], rows[:, start:],
            precision="highest",
        )
        for start in starts
    ]  # fmt: skip
    return half_of(jnp.concatenate([
        jnp.pad(strip, ((0, 0), (start, 0)))
        for start, strip in zip(starts, strips, strict=True)
    ]))  # fmt: skip


def half_of(upper: Float[Array, "m m"]) -> Float[Array, "r c"]:
    """A symmetric matrix as a rectangle of half its entries and `m / 2` more.

    Row i has the upper triangle's row i behind its row m - 1 - i, read from the end. An
    odd m is made even by zeros. Nothing below the diagonal is read.
    """
    m = upper.shape[0]
    even = jnp.pad(upper, ((0, m % 2), (0, m % 2)))
    half = even.shape[0] // 2
    first = jnp.pad(even[:half], ((0, 0), (1, 0)))
    last = jnp.pad(even[::-1, ::-1][:half], ((0, 0), (0, 1)))
    row, column = jnp.arange(half)[:, None], jnp.arange(even.shape[0] + 1)[None, :]
    return jnp.where(column <= row, last, first)


def whole_of(half: Float64[np.ndarray, "r c"], m: int) -> Float64[np.ndarray, "m m"]:
    """Inverts `half_of`."""
    upper = np.triu(half[:, 1:])
    lower = np.tril(half[:, :-1])[::-1, ::-1]
    whole = np.concatenate([upper, lower])
    whole += np.triu(whole, 1).T
    return whole[:m, :m]


class Moments(NamedTuple):
    """A sum of x x^T over tokens x; sums of batches are float32, their sum float64.

    Attributes:
      half: What `half_of` keeps of the sum, 4 bytes for each entry of the whole.
      inputs: Size of x.
      tokens: How many were summed.
    """

    half: Float64[np.ndarray, "r c"]
    inputs: int
    tokens: int

    @classmethod
    def none(cls, inputs: int) -> "Moments":
        """No tokens yet."""
        even = inputs + inputs % 2
        return cls(np.zeros((even // 2, even + 1)), inputs, 0)

    def plus(self, half: Float[Array, "r c"], tokens: int) -> "Moments":
        """With the sum of some more tokens; the array of this one is used again."""
        self.half[...] += np.asarray(half)
        return self._replace(tokens=self.tokens + tokens)

    def mean(self) -> Float64[np.ndarray, "m m"]:
        """E[x x^T]."""
        return whole_of(self.half, self.inputs) / max(self.tokens, 1)
