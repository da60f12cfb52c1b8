"""Names of parameters: NNX paths here, dotted names in checkpoints.

Checkpoints written from PyTorch call every matrix `weight` and store linears as
`[out, in]`; those written from Flax say `kernel`, `embedding` or `scale` and store
`[in, out]`. The last part of a name therefore tells the layout.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["TABLES", "LayerName", "Names", "StoredName", "tensor_name"]

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
TABLES = r"embed|emb|embeddings?|embedder|embed_(?!out\b)\w+|wte|wpe|shared"
"""What tables with a row for every token are called; `embed_out` is a head."""

# Rows there and here.
_EMBEDDING = re.compile(rf"(^|[/_])({TABLES}|relative_attention_bias)$")


class StoredName(NamedTuple):
    """A tensor's name in a file.

    Attributes:
      name: As published, without the prefix.
      is_transposed: Whether a matrix under this name is `[out, in]`.
    """

    name: str
    is_transposed: bool


class LayerName(NamedTuple):
    """The layer that a stored matrix belongs to.

    Attributes:
      path: As `quantize_model` calls it where the library has the architecture, such as
        `decoder/layers/0/fc1`; else the stored name with slashes, its leaf left out.
      is_transposed: Whether the matrix is stored as `[out, in]`.
    """

    path: str
    is_transposed: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """How the published names of an architecture belong to its NNX paths.

    Attributes:
      prefix: In front of all published names but those of `bare`; may be left out in a
        file.
      bare: First parts of the published names that have no prefix.
      modules: Published names of modules by ours, `*` standing for the number of a
        block; the prefix is left out, and so are modules that are called the same.
      ignored: Matches names, without prefix, of tensors that are no part of the model.
      untransposed: Matches names, without prefix, of matrices that are called `weight`
        and are `[in, out]` all the same.
    """

    prefix: str = "model."
    bare: frozenset[str] = frozenset({"lm_head"})
    modules: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: re.Pattern[str] | None = None
    untransposed: re.Pattern[str] | None = None

    def published(self, path: Sequence[Any]) -> str:
        """The name of a parameter in a checkpoint written from PyTorch."""
        name = self.stem(path)
        return name if name.split(".")[0] in self.bare else self.prefix + name

    def stem(self, path: Sequence[Any]) -> str:
        """The published name of a parameter without the prefix."""
        *modules, leaf = tensor_name(path).split(".")
        return ".".join([_renamed(".".join(modules), self.modules), leaf])

    def parse(self, stored: str) -> StoredName | None:
        """Reads a name of PyTorch (dots) or Flax (dots or slashes).

        Returns:
          The name; None for tensors that are left alone.
        """
        found = self._parsed(stored)
        is_ignored = self.ignored is not None and self.ignored.match(found.name)
        return None if is_ignored else found

    def layer(self, stored: str) -> LayerName:
        """The layer of a stored matrix or embedding, in the model or not."""
        name, is_transposed = self._parsed(stored)
        ours = {theirs: ours for ours, theirs in self.modules.items()}
        path = _renamed(name.rsplit(".", 1)[0], ours).replace(".", "/")
        return LayerName(path, is_transposed and not _EMBEDDING.search(path))

    def _parsed(self, stored: str) -> StoredName:
        parts = stored.replace("/", ".").removeprefix(self.prefix).split(".")
        name, special = tensor_name(parts), self.untransposed
        is_special = special is not None and special.match(name) is not None
        return StoredName(name, parts[-1] == "weight" and not is_special)


def tensor_name(path: Sequence[Any]) -> str:
    """`decoder.layers.0.fc1.weight` for `("decoder", "layers", 0, "fc1", "kernel")`."""
    *modules, leaf = map(str, path)
    return ".".join([*modules, _LEAVES.get(leaf, leaf)])


def _renamed(module: str, names: Mapping[str, str]) -> str:
    """A module's name by a table in which `*` stands for the number of a block."""
    parts = module.split(".")
    number = next((part for part in parts if part.isdecimal()), "")
    pattern = ".".join("*" if part == number else part for part in parts)
    return names[pattern].replace("*", number) if pattern in names else module
