"""The architectures that checkpoints are loaded as: a file and a line for each."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from kashin_jax.errors import CheckpointError
from kashin_jax.models.architecture import Architecture
from kashin_jax.models.bert import BERT, DISTILBERT, ROBERTA
from kashin_jax.models.names import Names
from kashin_jax.models.opt import OPT

__all__ = ["ARCHITECTURES", "find_architecture", "names_of"]

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {entry.model_type: entry for entry in (BERT, DISTILBERT, OPT, ROBERTA)}
)
"""By the `model_type` of their `config.json`."""

# Most language models that are published call their decoder `model`.
_UNKNOWN = Names()


def find_architecture(config: Mapping[str, Any], source: str) -> Architecture:
    """The architecture of a checkpoint.

    Args:
      config: Content of its `config.json`.
      source: Where that came from, for the message.

    Raises:
      CheckpointError: If it is not registered.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise CheckpointError(
            f"{source}: `model_type` is {model_type!r}; models that can be loaded here "
            f"are {', '.join(ARCHITECTURES)}."
        )
    return ARCHITECTURES[model_type]


def names_of(model_type: str) -> Names:
    """Names of an architecture; a guess for one that is not registered."""
    entry = ARCHITECTURES.get(model_type)
    return _UNKNOWN if entry is None else entry.names
