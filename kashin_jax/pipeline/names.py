"""From names in checkpoint files to paths of layers."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from flax import nnx

from kashin_jax.models.bert import ClassifierConfig, SequenceClassifier
from kashin_jax.models.classifier_names import classifier_name
from kashin_jax.models.names import parse_stored_name

__all__ = ["LayerName", "layer_names"]

_MATRICES = ("weight", "kernel", "embedding")
# A row for every token, there and here.
_EMBEDDING = re.compile(r"(^|[/_])(embed|embeddings?|embed_\w+|wte|wpe|shared)$")
# Their Conv1D calls a matrix `weight` and stores it as [in, out].
_UNTRANSPOSED = frozenset({"gpt2", "openai-gpt"})
_CLASSIFIERS = frozenset({"bert", "roberta", "distilbert"})


class LayerName(NamedTuple):
    """The layer that a stored matrix belongs to.

    Attributes:
      path: As `quantize_model` calls it where the library has the architecture, such as
        `decoder/layers/0/fc1`; else the stored name with slashes, its leaf left out.
      is_transposed: Whether the matrix is stored as `[out, in]`.
    """

    path: str
    is_transposed: bool


def layer_names(
    names: list[str], config: Mapping[str, Any], source: str
) -> dict[str, LayerName]:
    """The layers of the tensors that could be a matrix or an embedding, by stored name.

    Args:
      names: Of all tensors.
      config: The checkpoint's `config.json`; may be empty.
      source: Its path, for messages.

    Raises:
      CheckpointError: If the configuration of an architecture that the library has
        cannot be read.
    """
    model_type = str(config.get("model_type", ""))
    known = _classifier_paths(config, source) if model_type in _CLASSIFIERS else {}
    found = {}
    for name in names:
        leaf = name.replace("/", ".").rsplit(".", 1)[-1]
        if leaf not in _MATRICES:
            continue
        parsed = parse_stored_name(name, _prefix(model_type))
        path = known.get(parsed.name, parsed.name.rsplit(".", 1)[0])
        path = path.replace(".", "/")
        flips = leaf == "weight" and model_type not in _UNTRANSPOSED
        found[name] = LayerName(path, flips and not _EMBEDDING.search(path))
    return found


def _prefix(model_type: str) -> str:
    return f"{model_type}." if model_type in _CLASSIFIERS else "model."


def _classifier_paths(config: Mapping[str, Any], source: str) -> dict[str, str]:
    """Our paths by published name, both without prefix and leaf or with it."""
    parsed = ClassifierConfig.from_dict(dict(config), source)
    abstract = nnx.eval_shape(lambda: SequenceClassifier(parsed, rngs=nnx.Rngs(0)))
    kind = parsed.model_type
    paths = {}
    for path, _ in nnx.to_flat_state(nnx.state(abstract, nnx.Param)):
        name = classifier_name(path, kind).removeprefix(f"{kind}.")
        paths[name] = ".".join(map(str, path[:-1]))
    return paths
