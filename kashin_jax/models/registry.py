"""The architectures that checkpoints are loaded as: a file or a row for each."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from kashin_jax.errors import CheckpointError
from kashin_jax.models.architecture import Architecture
from kashin_jax.models.bert import BERT, DISTILBERT, ROBERTA
from kashin_jax.models.decoder import DECODERS
from kashin_jax.models.gpt import GPTS
from kashin_jax.models.names import Names
from kashin_jax.models.opt import OPT

__all__ = [
    "ARCHITECTURES",
    "TiedCopy",
    "find_architecture",
    "names_of",
    "tied_copy",
]

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        entry.model_type: entry
        for entry in (BERT, DISTILBERT, OPT, ROBERTA, *DECODERS, *GPTS)
    }
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
            f"{source}: `model_type` is {model_type!r}; models that run here are "
            f"{', '.join(ARCHITECTURES)}. {_instead(config)}"
        )
    return ARCHITECTURES[model_type]


def _instead(config: Mapping[str, Any]) -> str:
    """What can be done with a checkpoint that does not run here."""
    quantization = config.get("quantization_config")
    method = quantization and quantization.get("quant_method")
    if method == "kashin":
        return (
            "`kashin_jax.pipeline.packed_layers` returns its packed matrices for a "
            "model of your own; `kashin dequantize` writes a checkpoint for other "
            "libraries."
        )
    return "`kashin quantize` takes others all the same; run them elsewhere."


def names_of(model_type: str) -> Names:
    """Names of an architecture; a guess for one that is not registered."""
    entry = ARCHITECTURES.get(model_type)
    return _UNKNOWN if entry is None else entry.names


class TiedCopy(NamedTuple):
    """An output matrix that a checkpoint holds beside the embedding it is tied to.

    Attributes:
      head: Its stored name.
      embedding: The stored name of the embedding.
    """

    head: str
    embedding: str


def tied_copy(stored: Iterable[str], config: Mapping[str, Any]) -> TiedCopy | None:
    """The needless copy of a tied embedding; None where there is none.

    Args:
      stored: Names of all tensors of the checkpoint.
      config: Content of its `config.json`; may be empty.
    """
    entry = ARCHITECTURES.get(str(config.get("model_type")))
    if entry is None or entry.tied is None:
        return None
    if not config.get("tie_word_embeddings", entry.tied_by_default):
        return None
    parsed = {name: entry.names.parse(name) for name in stored}
    by_stem = {found.name: name for name, found in parsed.items() if found is not None}
    head, embedding = (by_stem.get(entry.names.stem(path)) for path in entry.tied)
    return TiedCopy(head, embedding) if head and embedding else None
