"""Matrix families that try a decomposition: plain, heavy-tailed, degenerate, real.

A family is a function of a key and a size and of nothing else: same key, same bytes.
All matrices have entries of unit root-mean-square. The one matrix that is hard for
every pair of bases depends on the pair: `kashin_jax.theory.rank_one_counter_example`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from experiments.common.kernels import EMBEDDED, model_kernels
from kashin_jax.decomposition import at_unit_rms, peak_and_rms
from kashin_jax.pipeline import path_key

__all__ = ["MATRICES", "MAX_SIZE", "draw_matrices", "draw_matrix", "low_rank"]

MAX_SIZE = 384
"""The shorter side of the smallest layer of the embedded models."""

OUTLIER_COLUMNS, COLUMN_FACTOR = 4, 30.0
OUTLIER_ENTRIES, ENTRY_FACTOR = 1 / 200, 100.0
NONZERO_ENTRIES = 0.02

Draw = Callable[[Key[Array, ""], int], Float[Array, "n n"]]


def _gaussian(key: Key[Array, ""], n: int) -> Float[Array, "n n"]:
    return jax.random.normal(key, (n, n), jnp.float32)


def _student_t3(key: Key[Array, ""], n: int) -> Float[Array, "n n"]:
    return jax.random.t(key, jnp.float32(3), (n, n), jnp.float32)


def _outlier_columns(key: Key[Array, ""], n: int) -> Float[Array, "n n"]:
    body_key, place_key = jax.random.split(key)
    is_outlier = jax.random.permutation(place_key, n) < OUTLIER_COLUMNS
    gain = jnp.where(is_outlier, COLUMN_FACTOR, 1.0).astype(jnp.float32)
    return _gaussian(body_key, n) * gain[None, :]


def _scattered_outliers(key: Key[Array, ""], n: int) -> Float[Array, "n n"]:
    body_key, place_key = jax.random.split(key)
    gain = jnp.where(_places(place_key, n, OUTLIER_ENTRIES), ENTRY_FACTOR, 1.0)
    return _gaussian(body_key, n) * gain.astype(jnp.float32)


def _diagonal(key: Key[Array, ""], n: int) -> Float[Array, "n n"]:
    return jnp.diag(jax.random.normal(key, (n,), jnp.float32))


def _sparse(key: Key[Array, ""], n: int) -> Float[Array, "n n"]:
    body_key, place_key = jax.random.split(key)
    x = _gaussian(body_key, n)
    return jnp.where(_places(place_key, n, NONZERO_ENTRIES), x, jnp.zeros_like(x))


def _places(key: Key[Array, ""], n: int, share: float) -> Array:
    """Exactly so large a share of the entries, at least one."""
    order = jax.random.permutation(key, n * n).reshape(n, n)
    return order < max(1, round(share * n * n))


def low_rank(key: Key[Array, ""], n: int, rank: int) -> Float[Array, "n n"]:
    """A product of two Gaussian matrices."""
    left_key, right_key = jax.random.split(key)
    left = jax.random.normal(left_key, (n, rank), jnp.float32)
    right = jax.random.normal(right_key, (rank, n), jnp.float32)
    return jnp.matmul(left, right, precision="highest")


def _sixteenth_rank(key: Key[Array, ""], n: int) -> Float[Array, "n n"]:
    return low_rank(key, n, max(1, n // 16))


@partial(jax.jit, static_argnames=("n", "condition"))
def _conditioned(key: Key[Array, ""], n: int, condition: float) -> Float[Array, "n n"]:
    """Haar singular vectors, singular values evenly spaced in their logarithms.

    Singular values below 1e-7 of the largest drown in the rounding of float32.
    """
    left_key, right_key = jax.random.split(key)
    values = jnp.asarray(np.geomspace(1, 1 / condition, n), jnp.float32)
    left = jax.random.orthogonal(left_key, n, dtype=jnp.float32)
    right = jax.random.orthogonal(right_key, n, dtype=jnp.float32)
    return jnp.matmul(left * values[None, :], right, precision="highest")


def _constant(key: Key[Array, ""], n: int) -> Float[Array, "n n"]:
    return jnp.ones((n, n), jnp.float32)


def _constant_rows(key: Key[Array, ""], n: int) -> Float[Array, "n n"]:
    """A Gaussian number for every row."""
    return jnp.repeat(jax.random.normal(key, (n, 1), jnp.float32), n, axis=1)


def _hadamard(key: Key[Array, ""], n: int) -> Float[Array, "n n"]:
    """Rows of Sylvester's matrix in random order, cut to size; all entries +-1."""
    return jax.random.permutation(key, _sylvester(n), axis=0)[:n, :n]


def _hadamard_row(key: Key[Array, ""], n: int) -> Float[Array, "n n"]:
    """A Gaussian column times a row of Sylvester's matrix other than the first."""
    column_key, row_key = jax.random.split(key)
    row = _sylvester(n)[jax.random.randint(row_key, (), min(1, n - 1), n), :n]
    return jnp.outer(jax.random.normal(column_key, (n,), jnp.float32), row)


def _comb(key: Key[Array, ""], n: int) -> Float[Array, "n n"]:
    """An outer product of two combs with teeth about sqrt(n) apart.

    Sylvester's matrix turns combs into combs: as sparse on both sides as can be.
    """
    period = 2 ** ((n - 1).bit_length() // 2)
    phases = jax.random.randint(key, (2,), 0, period)
    teeth = (jnp.arange(n)[None, :] % period == phases[:, None]).astype(jnp.float32)
    return jnp.outer(teeth[0], teeth[1])


def _sylvester(n: int) -> Float[Array, "p p"]:
    return jax.scipy.linalg.hadamard(2 ** (n - 1).bit_length(), dtype=jnp.float32)


def _layer_block(key: Key[Array, ""], n: int, model: str) -> Float[Array, "n n"]:
    """A block of any place of any layer of an embedded model; not for `jit`."""
    kernels = [k for k in model_kernels(EMBEDDED[model]).values() if min(k.shape) >= n]
    layer_key, row_key, column_key = jax.random.split(key, 3)
    kernel = kernels[int(jax.random.randint(layer_key, (), 0, len(kernels)))]
    row = jax.random.randint(row_key, (), 0, kernel.shape[0] - n + 1)
    column = jax.random.randint(column_key, (), 0, kernel.shape[1] - n + 1)
    return jax.lax.dynamic_slice(kernel, (row, column), (n, n))


MATRICES: Mapping[str, Draw] = MappingProxyType(
    {
        "gaussian": _gaussian,
        "student-t3": _student_t3,
        "outlier-columns": _outlier_columns,
        "scattered-outliers": _scattered_outliers,
        "diagonal": _diagonal,
        "sparse": _sparse,
        "low-rank": _sixteenth_rank,
        "rank-one": partial(low_rank, rank=1),
        "condition-1e2": partial(_conditioned, condition=1e2),
        "condition-1e4": partial(_conditioned, condition=1e4),
        "condition-1e8": partial(_conditioned, condition=1e8),
        "constant": _constant,
        "constant-rows": _constant_rows,
        "hadamard": _hadamard,
        "hadamard-row": _hadamard_row,
        "comb": _comb,
        "opt-layer": partial(_layer_block, model="opt"),
        "minilm-layer": partial(_layer_block, model="minilm"),
    }
)
"""To add a family, write a function of key and size and one line here."""


def draw_matrix(family: str, key: Key[Array, ""], n: int) -> Float[Array, "n n"]:
    """One matrix of a family, at unit root-mean-square.

    Args:
      family: A name of `MATRICES`.
      key: Root key; each family has a key of its own, folded from its name.
      n: Side, `MAX_SIZE` at the most for blocks of layers.

    Raises:
      ValueError: If the family is unknown or the side cannot be had.
    """
    if family not in MATRICES:
        raise ValueError(
            f"Unknown matrix family `{family}`. Choose from {', '.join(MATRICES)}."
        )
    if not 1 <= n <= MAX_SIZE:
        raise ValueError(f"`n` must lie in [1, {MAX_SIZE}]. Got n={n}.")
    x = MATRICES[family](path_key(key, family), n)
    return at_unit_rms(x, *peak_and_rms(x))


def draw_matrices(
    families: tuple[str, ...], keys: Key[Array, " s"], n: int
) -> Float[Array, "s f n n"]:
    """A matrix of every family for every key."""
    drawn = [[draw_matrix(family, key, n) for family in families] for key in keys]
    return jnp.stack([jnp.stack(row) for row in drawn])
