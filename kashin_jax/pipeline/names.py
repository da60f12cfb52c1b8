"""From names in checkpoint files to paths of layers."""

from collections.abc import Iterable, Mapping
from typing import Any

from kashin_jax.models.names import LayerName
from kashin_jax.models.registry import names_of

__all__ = ["LayerName", "layer_names"]

_MATRICES = ("weight", "kernel", "embedding")
# Their Conv1D calls a matrix `weight` and stores it as [in, out].
_UNTRANSPOSED = frozenset({"gpt2", "openai-gpt"})


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
    if model_type in _UNTRANSPOSED:
        return {
            name: layer._replace(is_transposed=False) for name, layer in found.items()
        }
    return found
