"""What every orthogonal basis offers, and how a seed becomes one.

A basis of R^n is an orthogonal matrix Q that is never multiplied out: `analysis` is
Q^T and `synthesis` is Q, both along one axis. A basis is a PyTree whose leaves are
arrays (signs, angles, a matrix), so bases of one family stack and `vmap`.
"""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int32, Key, UInt32

__all__ = [
    "Basis",
    "dense",
    "draw_permutation",
    "draw_signs",
    "key_from_seed",
    "seed_from_key",
]

# Stored seeds must never follow a global default. (One that JAX reads when it lowers a
# program cannot be pinned here: seeds mean what they mean under
# `jax_threefry_partitionable=True`, the default.)
SEED_IMPL = "threefry2x32"


@runtime_checkable
class Basis(Protocol):
    """Orthogonal change of coordinates along one axis.

    `synthesis(analysis(x)) == x`, and both keep the l2 norm, up to rounding.
    """

    def analysis(
        self, x: Float[Array, "*shape"], axis: int = -1
    ) -> Float[Array, "*shape"]: ...

    def synthesis(
        self, y: Float[Array, "*shape"], axis: int = -1
    ) -> Float[Array, "*shape"]: ...


def dense(basis: Basis, n: int) -> Float[Array, "{n} {n}"]:
    """Q itself, in float32: for tests and figures, as it takes O(n^2) memory.

    Raises:
      ValueError: If `n < 1`, or the basis is made for another length.
    """
    if n < 1:
        raise ValueError(f"A basis needs `n` of at least 1. Got n={n}.")
    return basis.synthesis(jnp.eye(n, dtype=jnp.float32), axis=0)


def seed_from_key(key: Key[Array, ""]) -> UInt32[Array, "2"]:
    """Draws the 64 stored bits from a key of any PRNG implementation."""
    return jax.random.bits(key, (2,), jnp.uint32)


def key_from_seed(seed: UInt32[Array, "2"]) -> Key[Array, ""]:
    """The key that a stored seed stands for, whatever `jax_default_prng_impl` says."""
    return jax.random.wrap_key_data(seed, impl=SEED_IMPL)


def draw_signs(key: Key[Array, ""], n: int) -> Int8[Array, " n"]:
    """Random signs that are the same with and without `jax_enable_x64`.

    `jax.random.rademacher` draws at the default width of a float, so under x64 a stored
    seed would give other signs.
    """
    is_plus = jax.random.bernoulli(key, jnp.float32(0.5), (n,))
    return jnp.where(is_plus, 1, -1).astype(jnp.int8)


def draw_permutation(key: Key[Array, ""], n: int) -> Int32[Array, " {n}"]:
    """A random order of 0..n-1, the same with and without `jax_enable_x64`.

    Sorts 32 random bits each; equal ones, n^2 / 2^33 pairs, keep their order.
    """
    bits = jax.random.bits(key, (n,), jnp.uint32)
    return jnp.argsort(bits, stable=True).astype(jnp.int32)
