"""From names in checkpoint files to paths of layers."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from kashin_jax.models.names import LayerName
from kashin_jax.models.registry import names_of

__all__ = ["LayerName", "layer_names"]

_MATRICES = ("weight", "kernel", "embedding")
# Their Conv1D, under these names, calls a matrix `weight` and stores it as [in, out].
_CONV1D = frozenset({"gpt2", "openai-gpt", "decision_transformer", "imagegpt"})
_UNTRANSPOSED = re.compile(r"(^|/)(c_attn|c_proj|c_fc|q_attn)$")


def layer_names(
    names: Iterable[str], config: Mapping[str, Any]
) -> dict[str, LayerName]:
    """The layers of the tensors that could be a matrix or an embedding, by stored name.

    Args:
      names: Names of all tensors.
      config: The checkpoint's `config.json`; may be empty.
    """
    model_type = str(config.get("model_type", ""))
    table = names_of(model_type)
    found = {
        name: table.layer(name)
        for name in names
        if name.replace("/", ".").rsplit(".", 1)[-1] in _MATRICES
    }
    if not _has_conv1d(config):
        return found
    return {
        name: layer._replace(
            is_transposed=layer.is_transposed and not _UNTRANSPOSED.search(layer.path)
        )
        for name, layer in found.items()
    }


def _has_conv1d(config: Mapping[str, Any]) -> bool:
    """Whether a model, or one that it is made of, has their Conv1D."""
    parts = [part for part in config.values() if isinstance(part, Mapping)]
    return any(str(part.get("model_type")) in _CONV1D for part in (config, *parts))
