"""What rows of all tables need: quantized layers, their size, what they lost."""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key
from tqdm import tqdm

from experiments.common.layer_store import LayerStore, StoredLayer
from kashin_jax import GreedyKashin, stored_bits
from kashin_jax.methods import Method
from kashin_jax.pipeline import path_key

__all__ = [
    "checkpoint_sha256",
    "decode",
    "decoded_kernels",
    "loss_fields",
    "quantize_each",
    "quantize_layers",
    "size_fields",
    "stored_width",
    "unconverged",
]

Layers = Mapping[str, StoredLayer]

decode = jax.jit(lambda tensor: tensor.decode())
"""The matrix of a packed tensor; compiled, it rounds otherwise than step by step."""


def quantize_layers(
    store: LayerStore,
    kernels: Mapping[str, Float[Array, "m n"]],
    config: Method,
    key: Key[Array, ""],
    label: str,
) -> dict[str, StoredLayer]:
    """Quantizes every kernel, each with a key of its path, or reads what is finished.

    Args:
      store: Keeps finished layers.
      kernels: By path.
      config: The method, the same for all.
      key: Root key.
      label: What the progress bar says.

    Raises:
      NonFiniteError: If scales of the method overflow; names the path.
    """
    return quantize_each(store, kernels, dict.fromkeys(kernels, config), key, label)


def quantize_each(
    store: LayerStore,
    kernels: Mapping[str, Float[Array, "m n"]],
    configs: Mapping[str, Method],
    key: Key[Array, ""],
    label: str,
) -> dict[str, StoredLayer]:
    """As `quantize_layers`, with a method for each path."""
    progress = tqdm(kernels.items(), desc=label, unit="layer", disable=None)
    return {
        path: store.quantize(path, kernel, configs[path], path_key(key, path))
        for path, kernel in progress
    }


def decoded_kernels(layers: Layers) -> dict[str, Float[Array, "m n"]]:
    """The matrices that the packed layers stand for."""
    return {path: decode(layer.tensor) for path, layer in layers.items()}


def unconverged(layers: Layers) -> frozenset[str]:
    """Paths of the layers whose decomposition missed its tolerance."""
    return frozenset(
        path
        for path, layer in layers.items()
        if (verdict := layer.report.decomposition) is not None
        and not bool(jnp.all(verdict["converged"]))
    )


def loss_fields(
    config: Method, layers: Layers, kept: frozenset[str] = frozenset()
) -> dict[str, float | None]:
    """Fields of a record: mean relative squared error, share converged, seconds.

    Args:
      config: The method; only Kashin's can converge.
      layers: All layers.
      kept: Paths of those that stay in full precision, and so lose nothing.
    """
    errors = [
        0.0 if path in kept else float(layer.report.relative_squared_error)
        for path, layer in layers.items()
    ]
    converges = isinstance(config, GreedyKashin)
    failed = len(unconverged(layers))
    return {
        "relative_error": float(np.mean(errors)),
        "converged_share": 1 - failed / len(layers) if converges else None,
        "quantize_seconds": sum(layer.seconds for layer in layers.values()),
    }


def size_fields(
    model: nnx.Module,
    width: int,
    layers: Layers,
    kept: frozenset[str] = frozenset(),
) -> dict[str, float]:
    """Fields of a record: stored bits per quantized weight, and of the whole model.

    Args:
      model: In full precision.
      width: Bits of a parameter that is not quantized, see `stored_width`.
      layers: All layers.
      kept: Paths of those that stay in full precision.
    """
    weights = sum(math.prod(layer.tensor.shape) for layer in layers.values())
    bits = sum(
        width * math.prod(layer.tensor.shape)
        if path in kept
        else stored_bits(layer.tensor)
        for path, layer in layers.items()
    )
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    rest = width * (parameters - weights)
    return {
        "stored_bits_per_weight": bits / weights,
        "model_bits_per_weight": (bits + rest) / parameters,
    }


def stored_width(stored_dtype: str) -> int:
    """Bits of a stored parameter."""
    return 8 * jnp.dtype(stored_dtype).itemsize


def checkpoint_sha256(directory: Path) -> str:
    """Hash of the configuration, tokenizer and weight files of a checkpoint."""
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix in {".json", ".safetensors", ".msgpack", ".bin", ".txt"}:
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
