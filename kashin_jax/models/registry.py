"""The architectures that checkpoints are loaded as: a file or a row for each."""

import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from kashin_jax.errors import CheckpointError
from kashin_jax.models.architecture import Architecture
from kashin_jax.models.bert import BERT, DISTILBERT, ROBERTA
from kashin_jax.models.decoder import DECODERS
from kashin_jax.models.gpt import GPTS
from kashin_jax.models.names import LayerName, Names
from kashin_jax.models.opt import OPT

__all__ = [
    "ARCHITECTURES",
    "TiedCopy",
    "expert_layer",
    "find_architecture",
    "layer_names",
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

# What holds a matrix, by its last name: PyTorch's, Flax's, Flax's of embeddings.
_MATRICES = ("weight", "kernel", "embedding")
# Their Conv1D, under these names, calls a matrix `weight` and stores it as [in, out].
_CONV1D = frozenset({"gpt2", "openai-gpt", "decision_transformer", "imagegpt"})
_UNTRANSPOSED = re.compile(r"(^|/)(c_attn|c_proj|c_fc|q_attn)$")
# Experts in one array, an axis for them in front: `experts.gate_up_proj` and Granite's
# `block_sparse_moe.input_linear.weight`.
_EXPERTS = re.compile(r"(^|[./])(experts|block_sparse_moe)[./]")
_OUTPUT = re.compile(r"(^|[./])(down_proj|w2|wo|output_linear)([./]|$)")
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


def expert_layer(
    name: str, shape: Sequence[int], config: Mapping[str, Any]
) -> LayerName | None:
    """The layer of a stack of experts' matrices; None for other arrays.

    Libraries store them as `[experts, in, out]` or `[experts, out, in]`, which the
    number of hidden features tells apart. Where it does not, PyTorch's linears are
    taken to be transposed and bare parameters not to be: of no consequence but for
    which side has the scales of inputs.

    Args:
      name: As stored.
      shape: Of the array.
      config: The checkpoint's `config.json`; may be empty.
    """
    if len(shape) != 3 or _EXPERTS.search(name) is None:
        return None
    last = name.replace("/", ".").rsplit(".", 1)[-1]
    path, _ = names_of(str(config.get("model_type", ""))).layer(
        name if last in _MATRICES else f"{name}.weight"
    )
    hidden = _hidden_size(config)
    # Of the last two axes the one that is the hidden features.
    sides = [axis for axis in (1, 2) if shape[axis] == hidden]
    if len(sides) != 1:
        return LayerName(path, last == "weight")
    inputs = 2 if _OUTPUT.search(name) is None else 1
    return LayerName(path, sides[0] == inputs)


def _hidden_size(config: Mapping[str, Any]) -> int | None:
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        if isinstance(part.get("hidden_size"), int):
            return int(part["hidden_size"])
    return None


def _has_conv1d(config: Mapping[str, Any]) -> bool:
    """Whether a model, or one that it is made of, has their Conv1D."""
    parts = [part for part in config.values() if isinstance(part, Mapping)]
    return any(str(part.get("model_type")) in _CONV1D for part in (config, *parts))
