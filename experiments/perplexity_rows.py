"""Rows of the perplexity table: quantize, score, count bits, for one method each."""

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key
from tqdm import tqdm

from experiments.layer_store import LayerStore, StoredLayer
from experiments.methods import FULL_PRECISION, Method
from experiments.partial import PartialScores, score_resumably
from experiments.tables import Record
from experiments.text import EvaluationText
from kashin_jax import BasisSpec, KashinConfig, stored_bits
from kashin_jax.errors import NonFiniteError
from kashin_jax.evaluation import perplexity, window_nll
from kashin_jax.layers import (
    path_key,
    quantize_model,
    replace_kernels,
    selected_kernels,
)
from kashin_jax.models.loading import LoadedModel
from kashin_jax.quantized import QuantizerConfig

__all__ = ["Bench", "checkpoint_sha256", "full_precision_row", "quantized_row"]


# Every record has every field, so that a reader of the file needs no special cases.
_ABSENT = dict.fromkeys((
    "stored_bits_per_weight", "model_bits_per_weight", "perplexity", "increase",
    "relative_error", "converged_share", "quantize_seconds", "seed", "basis",
))  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """What all rows of one table share.

    Attributes:
      loaded: The model in full precision.
      text: What is scored.
      work: Directory for unfinished work; it must exist.
      identity: Fields that every row records: model, data, versions, device.
      weights_sha256: Of the checkpoint.
      batch_size: Windows per call.
    """

    loaded: LoadedModel
    text: EvaluationText
    work: Path
    identity: Record
    weights_sha256: str
    batch_size: int

    @property
    def store(self) -> LayerStore:
        """Finished layers."""
        fields = ("kashin_jax_version", "jax_version", "device")
        return LayerStore(self.work, {name: self.identity[name] for name in fields})

    def score(self, model: nnx.Module, computation: Record) -> float:
        """Perplexity of the model that `computation` describes; resumes."""
        graphdef, state = nnx.split(model)
        fingerprint = {
            **self.identity, **computation, "weights_sha256": self.weights_sha256
        }  # fmt: skip
        windows = self.text.windows()
        nlls = score_resumably(
            partial(_nll, graphdef, state),
            windows,
            PartialScores.in_directory(self.work, fingerprint),
            batch_size=min(self.batch_size, windows.tokens.shape[0]),
        )
        return perplexity(nlls, windows, weigh=self.text.weigh)


# One compilation for all models of equal structure: parameters are arguments.
@partial(jax.jit, static_argnums=0)
def _nll(
    graphdef: Any, state: Any, tokens: Int[Array, "b t"], scored: Bool[Array, "b t"]
) -> Float[Array, " b"]:
    return window_nll(nnx.merge(graphdef, state)(tokens), tokens, scored)


_decode = jax.jit(lambda tensor: tensor.decode())


def full_precision_row(bench: Bench) -> dict[str, Any]:
    """The row that all others are compared with."""
    bits = float(_stored_width(bench.loaded))
    return {
        "method": FULL_PRECISION,
        "bits": int(bits),
        **_ABSENT,
        "stored_bits_per_weight": bits,
        "model_bits_per_weight": bits,
        "perplexity": bench.score(bench.loaded.model, {"config": None}),
        "note": f"{bench.loaded.stored_dtype} checkpoint, computed in float32.",
        **bench.identity,
    }


def quantized_row(
    bench: Bench,
    name: str,
    method: Method,
    *,
    bits: int,
    basis: BasisSpec,
    seed: int,
    rtol: float,
    max_steps: int,
) -> dict[str, Any]:
    """One row; a method that does not exist at this width gives dashes and the reason.

    Raises:
      ValueError: If a layer cannot be quantized; the message names its path.
    """
    row = {
        "method": name,
        "bits": bits,
        **_ABSENT,
        "basis": str(basis) if method.has_basis else None,
        "seed": seed if method.is_random else None,
        **bench.identity,
    }
    try:
        config = method.make(bits, basis, rtol, max_steps)
    except ValueError as reason:
        return {**row, "note": str(reason)}
    key = jax.random.key(seed)
    try:
        layers = _quantize_layers(bench, config, key, f"{name}, {bits} bits")
    except NonFiniteError as reason:
        # The checkpoint is finite, so it is this method whose scales overflow.
        return {**row, "note": str(reason)}
    kept = _failures(layers) if method.keeps_failures else frozenset()
    model = _quantized_model(bench, config, key, layers, kept)
    computation = {"config": repr(config), "seed": seed, "kept": sorted(kept)}
    return {
        **row,
        **_size_fields(bench.loaded, layers, kept),
        "perplexity": bench.score(model, computation),
        "relative_error": float(np.mean([
            0.0 if path in kept else float(layer.report.relative_squared_error)
            for path, layer in layers.items()
        ])),
        "converged_share": _converged_share(config, layers),
        "quantize_seconds": sum(layer.seconds for layer in layers.values()),
        "note": method.note,
    }  # fmt: skip


def _quantize_layers(
    bench: Bench, config: QuantizerConfig, key: Key[Array, ""], label: str
) -> dict[str, StoredLayer]:
    kernels = selected_kernels(bench.loaded.model)
    progress = tqdm(kernels.items(), desc=label, unit="layer", disable=None)
    return {
        path: bench.store.quantize(path, kernel, config, path_key(key, path))
        for path, kernel in progress
    }


def _quantized_model(
    bench: Bench,
    config: QuantizerConfig,
    key: Key[Array, ""],
    layers: Mapping[str, StoredLayer],
    kept: frozenset[str],
) -> nnx.Module:
    """Packed layers for Kashin; decoded kernels in the dense model for the controls."""
    model = bench.loaded.model
    if not isinstance(config, KashinConfig):
        return replace_kernels(
            model, {path: _decode(layer.tensor) for path, layer in layers.items()}
        )
    if len(kept) == len(layers):
        return model
    return quantize_model(
        model,
        config,
        key,
        select=lambda path: path in layers and path not in kept,
        quantize_layer=lambda path, _: (layers[path].tensor, layers[path].report),
    ).model


def _failures(layers: Mapping[str, StoredLayer]) -> frozenset[str]:
    return frozenset(
        path for path, layer in layers.items() if not _has_converged(layer)
    )


def _has_converged(layer: StoredLayer) -> bool:
    verdict = layer.report.decomposition
    return verdict is None or bool(jnp.all(verdict["converged"]))


def _converged_share(
    config: QuantizerConfig, layers: Mapping[str, StoredLayer]
) -> float | None:
    if not isinstance(config, KashinConfig):
        return None
    return 1 - len(_failures(layers)) / len(layers)


def _size_fields(
    loaded: LoadedModel, layers: Mapping[str, StoredLayer], kept: frozenset[str]
) -> dict[str, float]:
    width = _stored_width(loaded)
    weights = sum(math.prod(layer.tensor.shape) for layer in layers.values())
    bits = sum(
        width * math.prod(layer.tensor.shape)
        if path in kept
        else stored_bits(layer.tensor)
        for path, layer in layers.items()
    )
    parameters = sum(
        leaf.size for leaf in jax.tree.leaves(nnx.state(loaded.model, nnx.Param))
    )
    rest = width * (parameters - weights)
    return {
        "stored_bits_per_weight": bits / weights,
        "model_bits_per_weight": (bits + rest) / parameters,
    }


def _stored_width(loaded: LoadedModel) -> int:
    return 8 * jnp.dtype(loaded.stored_dtype).itemsize


def checkpoint_sha256(directory: Path) -> str:
    """Hash of the configuration, tokenizer and weight files of a checkpoint."""
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix in {".json", ".safetensors", ".msgpack", ".bin", ".txt"}:
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
