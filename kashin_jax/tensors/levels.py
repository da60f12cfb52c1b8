"""What codes stand for, found by selects: tables, and how a code splits between two."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

__all__ = [
    "MOST_SELECTED",
    "factor_codes",
    "factor_levels",
    "product_bits",
    "select",
    "select_levels",
]

# More are read from a table: a tree has as many selects as levels.
MOST_SELECTED = 32


def select_levels(
    levels: Float[Array, " k"], codes: UInt8[Array, "*b"]
) -> Float[Array, "*b"]:
    """The levels that codes stand for; codes must be below `k`: it is not checked."""
    if levels.shape[0] > MOST_SELECTED:
        # mode="clip" drops the bounds check; codes have exactly as many values as rows.
        return levels.at[codes].get(mode="clip")
    return select(list(levels), codes)


def select(
    leaves: Sequence[Float[Array, "..."]], codes: UInt8[Array, "*b"]
) -> Float[Array, "*b"]:
    """`leaves[code]`, a tree of selects: loads of single numbers are not vectorized.

    Args:
      leaves: Broadcast against the codes: numbers, or a column with one for every row.
      codes: Indices.
    """
    depth = (len(leaves) - 1).bit_length()
    tree = [*leaves, *[leaves[-1]] * (2**depth - len(leaves))]
    for bit in range(depth):
        is_set = (codes >> bit) & 1 != 0
        pairs = zip(tree[::2], tree[1::2], strict=True)
        tree = [low if low is high else jnp.where(is_set, high, low)
                for low, high in pairs]  # fmt: skip
    return jnp.broadcast_to(tree[0], codes.shape)


def factor_levels(
    centroids: Float[Array, "k 2"], v_bits: int | None
) -> tuple[Float[Array, " a"], Float[Array, " b"]]:
    """Levels of u and of v for the codes of `factor_codes`.

    Args:
      centroids: Pairs (u, v).
      v_bits: As in `KashinLayout`.
    """
    if v_bits is None:
        return centroids[:, 0], centroids[:, 1]
    grid = centroids.reshape(-1, 2**v_bits, 2)
    # All are equal along the axis. The maximum is exact, and its gradient reaches all
    # alike, so that fitted levels stay a product.
    return jnp.max(grid[..., 0], axis=1), jnp.max(grid[..., 1], axis=0)


def factor_codes(
    codes: UInt8[Array, "*b"], v_bits: int | None
) -> tuple[UInt8[Array, "*b"], UInt8[Array, "*b"]]:
    """Indices of the levels of u and of v."""
    if v_bits is None:
        return codes, codes
    return codes >> v_bits, codes & (2**v_bits - 1)


def product_bits(
    centroids: Float[Array | np.ndarray, "*stack k 2"], fine_bits: int
) -> int | None:
    """The number of low bits that alone decide v, the others deciding u, if any is so.

    Looks at values, which files do not describe: codebooks of the joint coder are
    products, those fitted to pairs are not.

    Args:
      centroids: One codebook, or a stack of which all must be products.
      fine_bits: Width of the widest codes.
    """
    table = np.asarray(centroids)
    for v_bits in range(1, fine_bits):
        if table.shape[-2] % 2**v_bits:
            continue
        grid = table.reshape(*table.shape[:-2], -1, 2**v_bits, 2)
        u, v = grid[..., 0], grid[..., 1]
        if (u == u[..., :1]).all() and (v == v[..., :1, :]).all():
            return v_bits
    return None
