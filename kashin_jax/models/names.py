"""Names of parameters: NNX paths here, dotted names in checkpoints.

Checkpoints written from PyTorch call every matrix `weight` and store linears as
`[out, in]`; those written from Flax say `kernel`, `embedding` or `scale` and store
`[in, out]`. The last part of a name therefore tells the layout.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = ["StoredName", "opt_name", "parse_stored_name", "tensor_name"]

_PREFIX = "model."
# The first BERT checkpoints call scale and bias of a layer norm gamma and beta.
_LEAVES = {
    "kernel": "weight",
    "embedding": "weight",
    "scale": "weight",
    "gamma": "weight",
    "weight": "weight",
    "bias": "bias",
    "beta": "bias",
}


class StoredName(NamedTuple):
    """A tensor's name in a file.

    Attributes:
      name: In the spelling of `tensor_name`, without the prefix.
      is_transposed: Whether a matrix under this name is `[out, in]`.
    """

    name: str
    is_transposed: bool


def tensor_name(path: Sequence[Any]) -> str:
    """`decoder.layers.0.fc1.weight` for `("decoder", "layers", 0, "fc1", "kernel")`."""
    *modules, leaf = map(str, path)
    return ".".join([*modules, _LEAVES.get(leaf, leaf)])


def opt_name(path: Sequence[Any]) -> str:
    """Hugging Face's name of an OPT parameter: all but the head start with `model.`."""
    return ("" if path[0] == "lm_head" else _PREFIX) + tensor_name(path)


def parse_stored_name(stored: str, prefix: str = _PREFIX) -> StoredName:
    """Reads a checkpoint's name, of PyTorch (dots) or Flax (dots or slashes)."""
    parts = stored.replace("/", ".").removeprefix(prefix).split(".")
    return StoredName(tensor_name(tuple(parts)), parts[-1] == "weight")
