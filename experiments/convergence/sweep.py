"""Many decompositions in one compiled call: a stack of bases by a stack of matrices."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from kashin_jax import BasisSpec, KroneckerBasis, kashin_decompose, make_pair
from kashin_jax.decomposition import Frame

__all__ = ["Convergence", "convergence_of", "stack_bases", "sweep"]


class Convergence(NamedTuple):
    """How decompositions went; in a sweep every leaf has the axes seed and matrix.

    Attributes:
      steps: Greedy steps taken.
      residual: Relative to the matrix, of the returned factors.
      converged: Whether the residual is within the tolerance.
      u_level: `sqrt(N) |u|_inf / |x|_2`.
      v_level: `sqrt(N) |v|_inf / |x|_2`; v in the coordinates of the basis.
      rate: Geometric mean of the factors by which steps multiply the residual.
      tail_rate: The same over the later half of the steps allowed; NaN for a
        decomposition that was done before.
    """

    steps: Int[Array, "*b"]
    residual: Float[Array, "*b"]
    converged: Bool[Array, "*b"]
    u_level: Float[Array, "*b"]
    v_level: Float[Array, "*b"]
    rate: Float[Array, "*b"]
    tail_rate: Float[Array, "*b"]


def stack_bases(family: str, keys: Key[Array, " s"], shape: tuple[int, int]) -> Any:
    """Pairs of bases of one family as one PyTree, its leaves stacked over the keys.

    A family without arrays, such as the DCT, is a tree without leaves.
    """
    # One by one: XLA's QR of a batch deadlocked on two cores (jax 0.10.2, 3 x 384).
    pairs = [_pair(key, family, shape) for key in keys]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *pairs)


@partial(jax.jit, static_argnames=("family", "shape"))
def _pair(key: Key[Array, ""], family: str, shape: tuple[int, int]) -> KroneckerBasis:
    return make_pair(BasisSpec(family, family), key, shape)


def convergence_of(
    x: Float[Array, "m n"], basis: Frame, *, rtol: float, max_steps: int
) -> Convergence:
    """One matrix in one pair of bases, by `kashin_decompose`.

    The tail is seen by a second, shorter run: the algorithm is deterministic, so it is
    the first half of the long one.

    Raises:
      ValueError: If `rtol <= 0` or `max_steps < 2`. Checked while tracing.
    """
    if max_steps < 2:
        raise ValueError(f"`max_steps` must be at least 2. Got {max_steps}.")
    end = kashin_decompose(x, basis, rtol=rtol, max_steps=max_steps)
    half = kashin_decompose(x, basis, rtol=rtol, max_steps=max_steps // 2)
    tail = _rate(end.residual / half.residual, end.num_steps - half.num_steps)
    return Convergence(
        steps=end.num_steps,
        residual=end.residual,
        converged=end.converged,
        u_level=jnp.max(jnp.abs(end.u)),
        v_level=jnp.max(jnp.abs(end.v)),
        rate=_rate(end.residual, end.num_steps),
        tail_rate=jnp.where(half.converged, jnp.float32(jnp.nan), tail),
    )


def _rate(factor: Float[Array, ""], steps: Int[Array, ""]) -> Float[Array, ""]:
    return factor ** (1 / jnp.maximum(steps, 1).astype(jnp.float32))


@partial(jax.jit, static_argnames=("rtol", "max_steps"))
def sweep(
    bases: Any, matrices: Float[Array, "s f m n"], *, rtol: float, max_steps: int
) -> Convergence:
    """Every matrix of a seed in the bases of that seed: one program for a family.

    Seeds are a `vmap`, matrices a `map` around it: one slow matrix family then holds up
    its own seeds alone, and the buffers stay in the cache. With 18 x 8 matrices of
    128 x 128 that took 4 s where a `vmap` over both took 14 s (haar), 24 s where it
    took 41 s (butterfly3).

    Args:
      bases: As made by `stack_bases`, one pair for each seed.
      matrices: By seed and matrix family.
      rtol: Relative tolerance.
      max_steps: Greedy steps allowed. The slowest seed decides how many are computed.

    Raises:
      ValueError: If `rtol <= 0` or `max_steps < 2`. Checked while tracing.
    """
    run = partial(convergence_of, rtol=rtol, max_steps=max_steps)
    over_seeds = jax.vmap(run)
    by_matrix = jax.lax.map(
        lambda x: over_seeds(x, bases), jnp.swapaxes(matrices, 0, 1)
    )
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), by_matrix)
