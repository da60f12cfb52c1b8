"""Products along one axis of an array of any rank."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

__all__ = ["along", "fibres", "multiply_along", "multiply_kronecker_along"]


def along(
    diagonal: Int8[Array, " n"], x: Float[Array, "*shape"], axis: int
) -> Float[Array, "*ones"]:
    """Shapes a diagonal so that it multiplies `x` along `axis`.

    Raises:
      ValueError: If the diagonal is not as long as `axis`, which would broadcast.
    """
    _check_length(diagonal.shape[0], x, axis)
    shape = [1] * x.ndim
    shape[axis] = diagonal.shape[0]
    return diagonal.astype(x.dtype).reshape(shape)


def fibres(
    x: Float[Array, "*shape"], n: int, axis: int
) -> Float[Array, "before {n} after"]:
    """`x` as [before, n, after], with `axis` in the middle; a reshape alone.

    Raises:
      ValueError: If `axis` is not `n` long.
    """
    _check_length(n, x, axis)
    axis %= x.ndim
    return x.reshape(math.prod(x.shape[:axis]), n, math.prod(x.shape[axis + 1 :]))


def multiply_along(
    matrix: Float[Array, "n n"] | np.ndarray, x: Float[Array, "*shape"], axis: int
) -> Float[Array, "*shape"]:
    """Applies `matrix` to every fibre of `x` along `axis`."""
    return multiply_kronecker_along([matrix], x, axis)


def multiply_kronecker_along(
    factors: Sequence[Float[Array, "_ _"] | np.ndarray],
    x: Float[Array, "*shape"],
    axis: int,
) -> Float[Array, "*shape"]:
    """Applies kron(factors[0], factors[1], ...) along `axis`, one factor at a time.

    One small dense product per factor: on two CPU cores a [1024, 512] array takes
    .7 ms as 16 x 32, 1.7 ms as radix-2 butterflies and 1.7 ms as one dense product;
    on an accelerator it keeps to the matrix units.

    Raises:
      ValueError: If the product of the factor sizes is not the length of `axis`.
    """
    sizes = [f.shape[0] for f in factors]
    _check_length(math.prod(sizes), x, axis)
    axis %= x.ndim
    before, after = math.prod(x.shape[:axis]), math.prod(x.shape[axis + 1 :])
    y = x
    for i, factor in enumerate(factors):
        outer = before * math.prod(sizes[:i])
        inner = math.prod(sizes[i + 1 :]) * after
        y = y.reshape(outer, sizes[i], inner)
        f = jnp.asarray(factor, x.dtype)
        # For the innermost factor one plain product of two matrices: the general
        # contraction would become `outer` products with a single column each.
        if inner == 1:
            y = jnp.matmul(y[:, :, 0], f.T, precision="highest")
        else:
            y = jnp.einsum("ij,ojk->oik", f, y, precision="highest")
    return y.reshape(x.shape)


def _check_length(expected: int, x: Float[Array, "*shape"], axis: int) -> None:
    if expected != x.shape[axis]:
        raise ValueError(
            f"`x` has length {x.shape[axis]} along axis {axis}, but the basis is made "
            f"for {expected}. Make the basis for that length."
        )
