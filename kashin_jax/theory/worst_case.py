"""A search for the vectors on which a basis does worst: upper bounds of c1."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kashin_jax.bases import Basis
from kashin_jax.decomposition import Frame
from kashin_jax.theory.l1_bound import l1_ratio
from kashin_jax.theory.solution import root_mean_square, unit_block

__all__ = ["WorstCase", "search_worst_case", "structured_starts"]

# In units of the root-mean-square. A first step of .1 leaves a Haar basis of R^256 at
# .42 to .46 after 800 steps, one of 1 at .39 to .41. Lengths fall to this share.
_FIRST_STEP = 1.0
_LAST_SHARE = 1e-3
# Gradients below it are rounding.
_FLAT = 1e-4


class WorstCase(NamedTuple):
    """The vector of smallest l1 ratio that a search found.

    Attributes:
      x: The block of the smallest ratio, of unit root-mean-square.
      ratio: Its l1 ratio, an upper bound of the constant c1 of the basis.
      found: The smallest ratio that was met from each start.
    """

    x: Float[Array, "*shape"]
    ratio: Float[Array, ""]
    found: Float[Array, " s"]


class _Descent(NamedTuple):
    x: Float[Array, "*shape"]
    best: Float[Array, "*shape"]
    ratio: Float[Array, ""]


@partial(jax.jit, static_argnames=("n", "count"))
def structured_starts(basis: Basis, *, n: int, count: int) -> Float[Array, "s {n}"]:
    """Starts of a search that are short in l1 norm on one or both sides.

    `count` pairs e_i + Q e_j, whose ratio tends to 1 / sqrt(pi) = .564 for a Haar
    basis; a unit vector e_i and a column Q e_j; a comb of spacing
    2^round(log2(n) / 2) and an interval of that length, with their images under Q. The
    images have the ratio n^(-1/4) for the Hadamard basis of order n = 4^p, the comb
    nearly so for the DCT. Gaussian starts are worth adding.
    """
    places = jnp.arange(n)
    unit = lambda at: (places[None, :] == at[:, None]).astype(jnp.float32)
    at = (jnp.arange(count) * n) // count
    ours, theirs = unit(at), basis.synthesis(unit((2 * at + 1) % n))
    spacing = 2 ** round((n - 1).bit_length() / 2)
    flat = jnp.stack([places % spacing == 0, places < spacing]).astype(jnp.float32)
    return jnp.concatenate(
        [ours + theirs, ours[:1], theirs[:1], flat, basis.synthesis(flat)]
    )


@partial(jax.jit, static_argnames=("steps",))
def search_worst_case(
    basis: Frame, starts: Float[Array, "s ..."], *, steps: int
) -> WorstCase:
    """Projected subgradient descent of the l1 ratio on the sphere, from every start.

    The ratio is the larger of two l1 norms; where they are close, the directions of
    both count, or the descent would zigzag between them. Steps have a fixed length
    that shrinks geometrically. A local method: the bound is as good as the starts.

    Args:
      basis: Whose constant is bounded.
      starts: Blocks of any scale; those that are zero find NaN and do not count.
      steps: Steps of each descent; with 0 the starts themselves are compared.

    Raises:
      ValueError: If `steps < 0`. Checked while tracing.
    """
    if steps < 0:
        raise ValueError(f"`steps` must be at least 0. Got {steps}.")
    lengths = _FIRST_STEP * _LAST_SHARE ** (jnp.arange(steps) / max(steps - 1, 1))

    def descend(start: Array) -> _Descent:
        x, _ = unit_block(start)
        step = lambda state, length: (_descend(state, length, basis), None)
        return jax.lax.scan(step, _Descent(x, x, l1_ratio(basis, x)), lengths)[0]

    ends = jax.vmap(descend)(starts)
    worst = jnp.nanargmin(ends.ratio)
    return WorstCase(ends.best[worst], ends.ratio[worst], ends.ratio)


def _descend(state: _Descent, length: Array, basis: Frame) -> _Descent:
    x, coefs = state.x, basis.analysis(state.x)
    own, other = jnp.mean(jnp.abs(x)), jnp.mean(jnp.abs(coefs))
    weight = jax.nn.sigmoid((own - other) / (0.1 * length))
    slope = weight * _soft_sign(x, length) + basis.synthesis(
        (1 - weight) * _soft_sign(coefs, length)
    )
    tangent = slope - jnp.mean(slope * x) * x
    # Where the descent is over the tangent is rounding, perhaps along x itself, which
    # a step of full length would send to zero.
    size = jnp.maximum(root_mean_square(tangent), _FLAT)
    moved, _ = unit_block(x - (length / size) * tangent)
    ratio = l1_ratio(basis, moved)
    best = jnp.where(ratio < state.ratio, moved, state.best)
    return _Descent(moved, best, jnp.minimum(ratio, state.ratio))


def _soft_sign(x: Array, width: Array) -> Array:
    # A plain sign makes the entries that are to vanish jump about zero.
    return x * jax.lax.rsqrt(jnp.square(x) + jnp.square(width))
