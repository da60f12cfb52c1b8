"""Kernels of a checkpoint of any architecture that the library knows."""

from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from jaxtyping import Array, Float

from experiments.common.text import ASSETS
from kashin_jax.io import checkpoint_directory, read_json
from kashin_jax.models.classifier_loading import head_names, load_classifier
from kashin_jax.models.loading import load_opt
from kashin_jax.pipeline import selected_kernels

__all__ = ["EMBEDDED", "Kernels", "model_kernels"]

Kernels = MappingProxyType[str, Float[Array, "_ _"]]

EMBEDDED = MappingProxyType(
    {"opt": ASSETS / "opt-wiki-18m", "minilm": ASSETS / "minilm-glue"}
)
"""Checkpoints that need no network, by a short name."""


@lru_cache(maxsize=2)
def model_kernels(path_or_id: str | Path) -> Kernels:
    """Every linear layer but the heads, `[in, out]` in float32, by path.

    Args:
      path_or_id: Directory or hub id of an OPT model or of a classifier; of a
        classifier with several heads the first one is loaded, and left out here.

    Raises:
      CheckpointError: If the checkpoint is missing, damaged, or of another kind.
    """
    directory = checkpoint_directory(path_or_id)
    if read_json(directory / "config.json").get("model_type") == "opt":
        return MappingProxyType(selected_kernels(load_opt(directory).model))
    heads = head_names(directory)
    classifier = load_classifier(directory, head=heads[0] if heads else None)
    return MappingProxyType(selected_kernels(classifier.model))
