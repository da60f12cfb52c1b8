"""Layers of Givens rotations in random coordinate planes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Key

from kashin_jax.bases.axes import fibres
from kashin_jax.bases.basis import draw_permutation
from kashin_jax.bases.rotations import Turn, permute, turn_of, turn_pairs

__all__ = ["GivensBasis", "default_layers", "make_givens"]


class GivensBasis(NamedTuple):
    """Q = G_1 G_2 ... G_L; a layer turns floor(n / 2) disjoint pairs of coordinates.

    Pair p of a layer is (order[p], order[p + floor(n / 2)]); with an odd n the last one
    of the order rests.

    Attributes:
      angles: In radians, one per pair.
      order: A permutation per layer.
      inverse: Their inverses.
    """

    angles: Float[Array, "l p"]
    order: Int32[Array, "l n"]
    inverse: Int32[Array, "l n"]

    def analysis(
        self, x: Float[Array, "*shape"], axis: int = -1
    ) -> Float[Array, "*shape"]:
        return self._turned(turn_of(self.angles, x.dtype).inverse(), x, axis)

    def synthesis(
        self, y: Float[Array, "*shape"], axis: int = -1
    ) -> Float[Array, "*shape"]:
        turn = turn_of(self.angles, y.dtype)
        return self._turned(turn, y, axis, is_last_first=True)

    def _turned(
        self, turn: Turn, x: Float[Array, "*s"], axis: int, is_last_first: bool = False
    ) -> Float[Array, "*s"]:
        z = fibres(x, self.order.shape[-1], axis)
        layers = (turn, self.order, self.inverse)
        # A scan: the time to compile does not grow with the layers.
        z, _ = jax.lax.scan(_turn_layer, z, layers, reverse=is_last_first)
        return z.reshape(x.shape)


def _turn_layer(
    x: Float[Array, "b n k"],
    layer: tuple[Turn, Int32[Array, " n"], Int32[Array, " n"]],
) -> tuple[Float[Array, "b n k"], None]:
    turn, order, inverse = layer
    pairs, z = turn.cos.shape[0], permute(x, order)
    turned = turn_pairs(turn, z[:, :pairs], z[:, pairs : 2 * pairs])
    z = jnp.concatenate([*turned, z[:, 2 * pairs :]], axis=1)
    return permute(z, inverse), None


def make_givens(
    key: Key[Array, ""], n: int, *, layers: int | None = None
) -> GivensBasis:
    """Random pairings and uniform angles: O(n) per layer and vector.

    The 2024 paper means one rotation in one plane; its code drops even that one, so
    that its "givens" is the identity.

    Args:
      key: Draws the pairings and the angles.
      n: Length.
      layers: Twice log2(n), rounded up, when None. The fewest that can reach every
        coordinate from every other one, log2(n), mix unit vectors poorly: at n = 512 a
        column of Q has |q|_1 / sqrt(n) = .35 on average with 9 layers, .73 with 18, .79
        with 27, and .80 if it is Gaussian.

    Raises:
      ValueError: If `layers < 1`.
    """
    count = default_layers(n) if layers is None else layers
    if count < 1:
        raise ValueError(f"`layers` must be at least 1. Got layers={layers}.")
    angles_key, order_key = jax.random.split(key)
    angles = jax.random.uniform(
        angles_key, (count, n // 2), jnp.float32, -np.float32(np.pi), np.float32(np.pi)
    )
    keys = jax.random.split(order_key, count)
    order = jax.vmap(lambda layer_key: draw_permutation(layer_key, n))(keys)
    return GivensBasis(angles, order, jnp.argsort(order, axis=-1).astype(jnp.int32))


def default_layers(n: int) -> int:
    """Twice log2(n), rounded up, and at least 1."""
    return max(1, 2 * (n - 1).bit_length())
