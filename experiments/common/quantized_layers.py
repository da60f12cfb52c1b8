"""Quantized layers of a row: kept on disk, their size, what they lost."""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jaxtyping import Array, Float, Key
from tqdm import tqdm

from experiments.common.tables import Record
from kashin_jax import GreedyKashin, stored_bits
from kashin_jax.io import atomic_path
from kashin_jax.methods import Method, QuantizationReport, encode, quantize
from kashin_jax.pipeline import path_key
from kashin_jax.tensors import QuantizedTensor

__all__ = [
    "LayerStore",
    "StoredLayer",
    "decode",
    "decoded_kernels",
    "loss_fields",
    "quantize_each",
    "quantize_layers",
    "size_fields",
    "stored_width",
    "unconverged",
]


class StoredLayer(NamedTuple):
    """One finished layer.

    Attributes:
      tensor: The packed matrix.
      report: What was lost.
      seconds: What it took when it was computed, compilation included.
    """

    tensor: QuantizedTensor
    report: QuantizationReport
    seconds: float


@dataclasses.dataclass(frozen=True)
class LayerStore:
    """A directory with one safetensors file per finished layer.

    A file is named after everything the layer depends on: kernel, configuration, key,
    versions and device. So runs never meet, and whoever deletes a file only costs time.

    Attributes:
      directory: Where the files are; it must exist.
      environment: Versions and device.
    """

    directory: Path
    environment: dict[str, str]

    @classmethod
    def of_run(cls, directory: Path, identity: Record) -> "LayerStore":
        """The store of a run, whose identity has `environment_fields` among others."""
        fields = ("kashin_jax_version", "jax_version", "device")
        return cls(directory, {name: identity[name] for name in fields})

    def quantize(
        self,
        path: str,
        kernel: Float[Array, "m n"],
        config: Method,
        key: Key[Array, ""],
    ) -> StoredLayer:
        """Reads the layer if it is finished; else quantizes and keeps it.

        Raises:
          ValueError: As `kashin_jax.quantize` does.
        """
        file = self.directory / f"{self._digest(kernel, config, key)}.safetensors"
        stored = _read(file, kernel, config, key)
        if stored is not None:
            return stored
        start = time.perf_counter()
        tensor, report = quantize(kernel, config, key, path=path)
        jax.block_until_ready((tensor, report))
        layer = StoredLayer(tensor, report, time.perf_counter() - start)
        leaves = jax.tree.leaves((tensor, report))
        with atomic_path(file) as temporary:
            safetensors.numpy.save_file(
                {str(i): np.asarray(leaf) for i, leaf in enumerate(leaves)},
                temporary,
                metadata={"path": path, "seconds": repr(layer.seconds)},
            )
        return layer

    def _digest(
        self, kernel: Float[Array, "m n"], config: Method, key: Key[Array, ""]
    ) -> str:
        key_data = np.asarray(jax.random.key_data(key)).tolist()
        fields = [repr(config), key_data, kernel.shape, kernel.dtype.name]
        digest = hashlib.sha256(json.dumps([fields, self.environment]).encode())
        digest.update(np.asarray(kernel).tobytes())
        return digest.hexdigest()[:32]


def _read(
    file: Path,
    kernel: Float[Array, "m n"],
    config: Method,
    key: Key[Array, ""],
) -> StoredLayer | None:
    if not file.exists():
        return None
    shapes: Any = jax.eval_shape(lambda k, s: encode(k, s, config), kernel, key)
    expected, structure = jax.tree.flatten(shapes)
    try:
        with safetensors.safe_open(file, framework="numpy") as reader:
            leaves = [reader.get_tensor(str(i)) for i in range(len(expected))]
            seconds = float(reader.metadata()["seconds"])
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError):
        # Damaged, by a full disk say: the layer is computed again and replaces it.
        return None
    kinds = [[(leaf.shape, leaf.dtype) for leaf in tree] for tree in (leaves, expected)]
    if kinds[0] != kinds[1]:
        return None
    tensor, report = jax.tree.unflatten(structure, jax.device_put(leaves))
    return StoredLayer(tensor, report, seconds)


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
    """Quantizes every kernel by the method of its path, or reads what is finished."""
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
