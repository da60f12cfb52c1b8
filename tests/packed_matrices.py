"""Packed matrices of any method and shape, without the coder that would fill them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kashin_jax import encode


def random_tensor(config, shape, seed=0, dtype=jnp.float32):
    """What `config` would store of a matrix, filled with random codes and scales."""
    weight = jax.ShapeDtypeStruct(shape, dtype)
    tensor, _ = jax.eval_shape(
        partial(encode, config=config), weight, jax.random.key(0)
    )
    rng = np.random.default_rng(seed)

    def filled(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            highest = np.iinfo(leaf.dtype).max
            return jnp.asarray(rng.integers(0, highest, leaf.shape, leaf.dtype))
        return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)

    return jax.tree.map(filled, tensor)


def random_words(config, shape):
    """The same for joint codes, whose codebook is one of products."""
    tensor = random_tensor(config, shape)
    split, rng = config.split, np.random.default_rng(1)
    halves = range(2 if split.half else 1)
    tables = [rng.normal(size=2 ** (split.u - half)) for half in halves]
    levels_v = rng.normal(size=2**split.v)
    pairs = [(u, v) for table in tables for u in table for v in levels_v]
    return tensor.replace(centroids=jnp.asarray(pairs, jnp.float32))
