"""Blocks of transformers for timing: their matrices, dense or packed, in one chain."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from kashin_jax.methods import Method, encode
from kashin_jax.tensors import KashinTensor, Prepared, QuantizedTensor

__all__ = ["BLOCKS", "chain", "random_layers", "random_tensor", "transposed"]

Shape = tuple[int, int]

BLOCKS: Mapping[str, tuple[Shape, ...]] = MappingProxyType(
    {
        "square-4096": ((4096, 4096),) * 4,
        "opt-1.3b": ((2048, 2048),) * 4 + ((2048, 8192), (8192, 2048)),
        "llama-7b": ((4096, 4096),) * 4 + ((4096, 11008),) * 2 + ((11008, 4096),),
    }
)
"""Shapes [in, out]: attention's q, k, v and output, then those of the other half."""


def chain(
    x: Float[Array, "r m"], layers: list[Any], product: Callable[[Array, Any], Array]
) -> Float[Array, "r m"]:
    """Passes x through a block, each layer waiting for those before it.

    Args:
      x: Activations.
      layers: As in `BLOCKS`: four of attention, then none, two or three.
      product: Of activations and a layer.
    """
    q, k, v, out, *rest = layers
    x = _normed(product(x, q) + product(x, k) + product(x, v))
    x = _normed(product(x, out))
    if rest:
        inner = [product(x, layer) for layer in rest[:-1]]
        x = _normed(product(_normed(math.prod(inner[1:], start=inner[0])), rest[-1]))
    return x


def _normed(x: Float[Array, "r m"]) -> Float[Array, "r m"]:
    return x / (jnp.max(jnp.abs(x)) + 1)


def transposed(x: Float[Array, "r m"], w: Float[Array, "n m"]) -> Float[Array, "r n"]:
    """The product with a weight in PyTorch's layout, `[out, in]`."""
    return jnp.matmul(x, w.T)


def random_layers(shapes: tuple[Shape, ...], config: Method) -> list[Prepared]:
    """Layers of random codes: times do not depend on what is coded."""
    tensors = [random_tensor(s, config, seed) for seed, s in enumerate(shapes)]
    # Haar matrices take minutes; equal shapes may have the same.
    bases = {t.shape: t.derive_bases() for t in reversed(tensors)}
    return [Prepared(tensor, bases[tensor.shape]) for tensor in tensors]


def random_tensor(shape: Shape, config: Method, seed: int) -> QuantizedTensor:
    """What `quantize` would return for a matrix of this shape, with random leaves."""
    tensor = _abstract(shape, config)
    rng = np.random.default_rng(seed)
    leaves: dict[str, Any] = {
        field.name: _random_leaf(rng, field.name, getattr(tensor, field.name))
        for field in dataclasses.fields(tensor)
        if field.name != "layout" and getattr(tensor, field.name) is not None
    }
    v_bits = tensor.layout.v_bits if isinstance(tensor, KashinTensor) else None
    if v_bits is not None:
        grid = np.array(leaves["centroids"]).reshape(-1, 2**v_bits, 2)
        grid[..., 0], grid[..., 1] = grid[:, :1, 0], grid[:1, :, 1]
        leaves["centroids"] = jnp.asarray(grid.reshape(-1, 2))
    return tensor.replace(**leaves)


@functools.lru_cache(maxsize=64)
def _abstract(shape: Shape, config: Method) -> Any:
    weight = jax.ShapeDtypeStruct(shape, jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda w, k: encode(w, k, config)[0], weight, key)


def _random_leaf(rng: np.random.Generator, name: str, spec: Any) -> Array:
    if spec.dtype == jnp.uint8:
        return _bytes(rng, spec.shape)
    if spec.dtype == jnp.uint32:
        return jnp.asarray(rng.integers(0, 2**32, spec.shape, np.uint32))
    if name in ("centroids", "levels"):
        return jnp.asarray(rng.normal(size=spec.shape).astype(spec.dtype))
    return jnp.ones(spec.shape, spec.dtype)


def _bytes(rng: np.random.Generator, shape: tuple[int, ...]) -> UInt8[Array, "..."]:
    size = math.prod(shape)
    return jnp.asarray(np.frombuffer(rng.bytes(size), np.uint8).reshape(shape))
