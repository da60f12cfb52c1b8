"""Learned angles: a butterfly or Givens basis fitted to given matrices.

A learned basis no longer follows from a seed: its angles have to be stored.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree

from kashin_jax.bases.basis import Basis
from kashin_jax.bases.kronecker import KroneckerBasis

__all__ = [
    "LearnedBasis",
    "angles_of",
    "l1_loss",
    "l1_ratio",
    "learn_angles",
    "scalar_error",
    "with_angles",
]

AnyBasis = TypeVar("AnyBasis", bound=Basis | KroneckerBasis)
Loss = Callable[[Any, Float[Array, "*shape"]], Float[Array, ""]]


class LearnedBasis(NamedTuple):
    """The best basis met, with how it was reached.

    Attributes:
      basis: The one of least finite loss; the given basis itself if no step improved on
        it.
      loss: Its loss.
      losses: Before every step; the first one is the loss of the given basis.
    """

    basis: Any
    loss: Float[Array, ""]
    losses: Float[Array, " steps"]


def l1_ratio(
    basis: Basis | KroneckerBasis, x: Float[Array, "*shape"]
) -> Float[Array, ""]:
    """max(|x|_1, |Q^T x|_1) / (sqrt(N) |x|_2), in (0, 1]; 0 for `x` = 0.

    The larger, the more the next greedy step removes: the share ratio^2 of |x|^2.
    """
    l1 = jnp.maximum(
        jnp.sum(jnp.abs(x)), jnp.sum(jnp.abs(basis.analysis(x)))
    )  # fmt: skip
    return l1 / (math.sqrt(x.size) * _norm(x))


def l1_loss(
    basis: Basis | KroneckerBasis, x: Float[Array, "*shape"]
) -> Float[Array, ""]:
    """-|Q^T x|_1 / (sqrt(N) |x|_2): minus the part of `l1_ratio` that angles move."""
    l1 = jnp.sum(jnp.abs(basis.analysis(x)))
    return -l1 / (math.sqrt(x.size) * _norm(x))


def scalar_error(
    levels: Float[Array, " k"],
    basis: Basis | KroneckerBasis,
    x: Float[Array, "*shape"],
) -> Float[Array, ""]:
    """Relative squared error of `x` with every coefficient rounded to a level.

    A loss once the levels are bound: `jax.tree_util.Partial(scalar_error, levels)`;
    other levels then do not recompile. Differentiable wherever no coefficient lies
    midway between two levels.

    Args:
      levels: Ascending, for coefficients of unit root-mean-square.
      basis: Whose coefficients are rounded.
      x: Not zero.
    """
    y = basis.analysis(x) * (math.sqrt(x.size) / _norm(x))
    middles = (levels[1:] + levels[:-1]) / 2
    rounded = levels[jnp.searchsorted(middles, jax.lax.stop_gradient(y))]
    return jnp.mean(jnp.square(y - rounded))


def angles_of(basis: Basis | KroneckerBasis) -> PyTree[Float[Array, "..."]]:
    """The angles of a basis, or of both sides of a pair; None where there are none."""
    if isinstance(basis, KroneckerBasis):
        return angles_of(basis.left), angles_of(basis.right)
    return getattr(basis, "angles", None)


def with_angles(basis: AnyBasis, angles: PyTree[Float[Array, "..."]]) -> AnyBasis:
    """A copy of a basis with other angles, laid out as `angles_of` returns them."""
    # Neither a protocol nor a type variable can say that bases are NamedTuples.
    changed: Any = basis
    if isinstance(basis, KroneckerBasis):
        sides = zip(basis, angles, strict=True)
        return changed._make(with_angles(side, own) for side, own in sides)
    return basis if angles is None else changed._replace(angles=angles)


def learn_angles(
    basis: AnyBasis,
    matrix: Float[Array, "*shape"],
    loss: Loss,
    optimizer: optax.GradientTransformation,
    steps: int,
) -> LearnedBasis:
    """Minimises `loss(basis, matrix)` over the angles; Q stays orthogonal throughout.

    Args:
      basis: Where to start: a basis with angles, or a pair with one on a side.
      matrix: What the loss is taken on: anything that `basis.analysis` accepts. For
        several matrices of one shape give a stack of them.
      loss: A function, or a `jax.tree_util.Partial` with arrays bound to it.
      optimizer: As of optax; the same object again does not recompile.
      steps: Evaluations of the loss and its gradient.

    Returns:
      The best basis among those before every step, so never one worse than the given
      one. A loss that is NaN counts as worse than any, and shows in `losses`.

    Raises:
      ValueError: If `steps < 1` or the basis has no angles.
    """
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1. Got steps={steps}.")
    if not jax.tree.leaves(angles_of(basis)):
        raise ValueError(
            f"`basis` {type(basis).__name__} has no angles to learn; take a family "
            "such as butterfly, butterfly3 or givens."
        )
    bound = loss if isinstance(loss, Partial) else Partial(loss)
    return _learn(basis, matrix, bound, optimizer, steps)


class _State(NamedTuple):
    angles: PyTree
    optimizer: PyTree
    best: PyTree
    best_loss: Float[Array, ""]


@partial(jax.jit, static_argnames=("optimizer", "steps"))
def _learn(
    basis: Basis | KroneckerBasis,
    matrix: Float[Array, "*shape"],
    loss: Partial,
    optimizer: optax.GradientTransformation,
    steps: int,
) -> LearnedBasis:
    def loss_of(angles: PyTree) -> Float[Array, ""]:
        return loss(with_angles(basis, angles), matrix)

    def step(state: _State, _: None) -> tuple[_State, Float[Array, ""]]:
        value, gradient = jax.value_and_grad(loss_of)(state.angles)
        is_better = value < state.best_loss
        best = jax.tree.map(partial(jnp.where, is_better), state.angles, state.best)
        best_loss = jnp.where(is_better, value, state.best_loss)
        # Optax counts steps in int32 and multiplies them with floats.
        with jax.numpy_dtype_promotion("standard"):
            updates, inner = optimizer.update(gradient, state.optimizer, state.angles)
            angles = optax.apply_updates(state.angles, updates)
        return _State(angles, inner, best, best_loss), value

    start = angles_of(basis)
    infinite = jnp.full((), jnp.inf, matrix.dtype)
    init = _State(start, optimizer.init(start), start, infinite)
    final, losses = jax.lax.scan(step, init, length=steps)
    return LearnedBasis(with_angles(basis, final.best), final.best_loss, losses)


def _norm(x: Float[Array, "*shape"]) -> Float[Array, ""]:
    """The l2 norm, and 1 for zero."""
    norm = jnp.sqrt(jnp.sum(jnp.square(x)))
    return jnp.where(norm > 0, norm, jnp.ones_like(norm))
