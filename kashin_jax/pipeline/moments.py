"""Second moments of what layers read, summed over tokens: the symmetric half alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64

__all__ = ["MeanMoments", "Moments", "half_moments", "half_of", "whole_of"]

_STRIPS = 8
# Rows of a matrix that are mirrored at a time: 256 KB of them.
_TILE = 256


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


def whole_of(half: Float[np.ndarray, "r c"], m: int) -> Float[np.ndarray, "m m"]:
    """Inverts `half_of`; no other array of the size of the whole is held meanwhile."""
    rows, columns = half.shape
    whole = np.empty((m, m), half.dtype)
    for i in range(m):
        if i < rows:
            whole[i, i:] = half[i, i + 1 : m + 1]
        else:
            # Such rows lie behind others, read from the end.
            behind = columns - 2 - i
            whole[i, i:] = half[behind, columns - 1 - m : behind + 1][::-1]
    for start in range(0, m, _TILE):
        end = start + _TILE
        whole[end:, start:end] = whole[start:end, end:].T
        tile = whole[start:end, start:end]
        tile[...] = np.triu(tile) + np.triu(tile, 1).T
    return whole


class MeanMoments(NamedTuple):
    """E[x x^T] over tokens x; 2 bytes for each entry.

    Attributes:
      half: What `half_of` keeps of it.
      inputs: Size of x.
    """

    half: Float32[np.ndarray, "r c"]
    inputs: int

    def whole(self) -> Float[Array, "m m"]:
        """The matrix, 4 bytes for each entry; for as long as it is needed."""
        return jnp.asarray(whole_of(self.half, self.inputs))


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

    def of_unit_size(self) -> "Moments":
        """Over a power of two, so that squares of 1e18 leave float32 room for products.

        No code depends on it. The array of this one is used again.
        """
        # The largest of such a matrix is on its diagonal.
        _, exponent = np.frexp(self.half.max(initial=0.0) / max(self.tokens, 1))
        np.ldexp(self.half, -exponent, out=self.half)
        return self

    def mean(self) -> MeanMoments:
        """E[x x^T], rounded to float32; the array of this one is used up for it."""
        np.divide(self.half, max(self.tokens, 1), out=self.half)
        return MeanMoments(self.half.astype(np.float32), self.inputs)
