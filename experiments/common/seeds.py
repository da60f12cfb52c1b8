"""Several seeds at once: their bases as one PyTree, their values in a record."""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from kashin_jax import BasisSpec, KroneckerBasis, make_pair

__all__ = ["spread_fields", "stack_bases"]


def spread_fields(name: str, values: Iterable[float]) -> dict[str, Any]:
    """`NAME`, a list, with `NAME_mean` and `NAME_spread`, a standard deviation.

    Values that are not finite do not count; without any other both are None.
    """
    listed = [float(value) for value in values]
    finite = [value for value in listed if math.isfinite(value)]
    return {
        name: listed,
        f"{name}_mean": float(np.mean(finite)) if finite else None,
        f"{name}_spread": float(np.std(finite)) if finite else None,
    }


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
