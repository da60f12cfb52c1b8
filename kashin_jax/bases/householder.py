"""Products of Householder reflections: cheap, and a weak mixer while they are few."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from kashin_jax.bases.axes import fibres
from kashin_jax.bases.rotations import wider

__all__ = ["HouseholderBasis", "make_householder"]


class HouseholderBasis(NamedTuple):
    """Q = H_1 H_2 ... H_k with H = I - 2 y y^T / |y|^2.

    Every vector orthogonal to all k normals stays where it is, so that k = 1 is a
    control that the greedy decomposition gains little from.

    Attributes:
      normals: The vectors y, of any length above 0.
    """

    normals: Float[Array, "k n"]

    def analysis(
        self, x: Float[Array, "*shape"], axis: int = -1
    ) -> Float[Array, "*shape"]:
        y, units = fibres(x, self.normals.shape[-1], axis), _unit(self.normals, x.dtype)
        return jax.lax.scan(_reflect, y, units)[0].reshape(x.shape)

    def synthesis(
        self, y: Float[Array, "*shape"], axis: int = -1
    ) -> Float[Array, "*shape"]:
        x, units = fibres(y, self.normals.shape[-1], axis), _unit(self.normals, y.dtype)
        return jax.lax.scan(_reflect, x, units, reverse=True)[0].reshape(y.shape)


def make_householder(
    key: Key[Array, ""], n: int, *, reflectors: int = 1
) -> HouseholderBasis:
    """Reflections at random hyperplanes: O(n) each per vector.

    Raises:
      ValueError: If `reflectors < 1`.
    """
    if reflectors < 1:
        raise ValueError(
            f"`reflectors` must be at least 1. Got reflectors={reflectors}."
        )
    normals = jax.random.normal(key, (reflectors, n), jnp.float32)
    # A drawn number can be 0, which at n = 1 would be no direction at all.
    return HouseholderBasis(jnp.where(normals == 0, jnp.float32(1e-6), normals))


def _unit(normals: Float[Array, "k n"], dtype: jnp.dtype) -> Float[Array, "k n"]:
    wide = normals.astype(wider(normals.dtype, dtype))
    return (wide / jnp.linalg.norm(wide, axis=-1, keepdims=True)).astype(dtype)


def _reflect(
    x: Float[Array, "b n k"], normal: Float[Array, " n"]
) -> tuple[Float[Array, "b n k"], None]:
    along = jnp.einsum("n,bnk->bk", normal, x, precision="highest")
    return x - 2 * normal[None, :, None] * along[:, None, :], None
