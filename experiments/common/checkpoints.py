"""Checkpoints that programs are given: which they are, and the kernels in them."""

import hashlib
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from jaxtyping import Array, Float

from experiments.common.text import ASSETS
from kashin_jax.errors import UsageError
from kashin_jax.io import checkpoint_directory, read_json
from kashin_jax.models import head_names, load_classifier, load_language_model
from kashin_jax.models.registry import find_architecture
from kashin_jax.pipeline import selected_kernels

__all__ = [
    "EMBEDDED",
    "Kernels",
    "checkpoint_sha256",
    "dense_directory",
    "is_quantized",
    "model_kernels",
]

Kernels = MappingProxyType[str, Float[Array, "_ _"]]

EMBEDDED = MappingProxyType(
    {"opt": ASSETS / "opt-wiki-18m", "minilm": ASSETS / "minilm-glue"}
)
"""Checkpoints that need no network, by a short name."""


@lru_cache(maxsize=2)
def model_kernels(path_or_id: str | Path) -> Kernels:
    """Every linear layer but the heads, `[in, out]` in float32, by path.

    Args:
      path_or_id: Directory or hub id of a language model or of a classifier; of a
        classifier with several heads the first one is loaded, and left out here.

    Raises:
      CheckpointError: If the checkpoint is missing, damaged, or of another kind.
    """
    directory = checkpoint_directory(path_or_id)
    path = directory / "config.json"
    if find_architecture(read_json(path), str(path)).head is None:
        return MappingProxyType(selected_kernels(load_language_model(directory).model))
    heads = head_names(directory)
    classifier = load_classifier(directory, head=heads[0] if heads else None)
    return MappingProxyType(selected_kernels(classifier.model))


def is_quantized(path_or_id: str | Path) -> bool:
    """Whether the `config.json` of a checkpoint says so, whatever the method.

    Raises:
      CheckpointError: If it cannot be found or read.
    """
    config = read_json(checkpoint_directory(path_or_id) / "config.json")
    return config.get("quantization_config") is not None


def dense_directory(path_or_id: str | Path, *, instead: str) -> Path:
    """The directory of a checkpoint that is not quantized.

    Args:
      path_or_id: The value of `--model`.
      instead: What takes a quantized one, for the message.

    Raises:
      UsageError: If it is quantized.
      CheckpointError: If it cannot be found.
    """
    directory = checkpoint_directory(path_or_id)
    if (directory / "config.json").exists() and is_quantized(directory):
        raise UsageError(
            f"`--model={path_or_id}` is quantized already; name the original "
            f"checkpoint, or undo it with `kashin dequantize`. {instead}"
        )
    return directory


def checkpoint_sha256(directory: Path) -> str:
    """Hash of the configuration, tokenizer and weight files of a checkpoint."""
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        # That of a GGUF file is in the configuration; its hidden table has its place.
        if path.name.startswith("."):
            continue
        if path.suffix in {".json", ".safetensors", ".msgpack", ".bin", ".txt"}:
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
