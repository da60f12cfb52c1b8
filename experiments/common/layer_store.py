"""Finished layers on disk, so that an interrupted run quantizes none of them twice."""

import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Array, Float, Key

from experiments.common.results import atomic_path
from experiments.common.tables import Record
from kashin_jax.methods import Method, QuantizationReport, encode, quantize
from kashin_jax.tensors import QuantizedTensor

__all__ = ["LayerStore", "StoredLayer"]


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
