"""What the tensors of a checkpoint are taken for, in one line and before any work."""

import collections
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from kashin_jax.io import Checkpoint
from kashin_jax.models.tensor_roles import (
    QUANTIZED_KINDS,
    has_names,
    tensor_roles,
)

__all__ = ["RoleCounts", "count_roles"]

# One of them, and several.
_NAMES = {
    "linear": ("linear", "linears"),
    "experts": ("stack of experts", "stacks of experts"),
    "head": ("head", "heads"),
    "embedding": ("embedding", "embeddings"),
    "router": ("router", "routers"),
    "norm": ("norm", "norms"),
    "step": ("time step", "time steps"),
    "convolution": ("convolution", "convolutions"),
    "bias": ("bias", "biases"),
    "vector": ("vector", "vectors"),
    "other": ("other", "others"),
}


class RoleCounts(NamedTuple):
    """How many tensors are of which kind; printed, it is a line.

    Attributes:
      source: Where that is known from: a table, names, or defaults.
      counts: By kind, in the order of the line; kinds without tensors are left out.
    """

    source: str
    counts: Mapping[str, int]

    def __str__(self) -> str:
        coded = self._listed(kind for kind in self.counts if kind in QUANTIZED_KINDS)
        left = self._listed(kind for kind in self.counts if kind not in QUANTIZED_KINDS)
        return (
            f"Tensors by {self.source}: {coded or 'no linears'}; in full precision "
            f"unless a rule names them: {left or 'none'}."
        )

    def _listed(self, kinds: Iterable[str]) -> str:
        counted = ((self.counts[kind], _NAMES[kind]) for kind in kinds)
        return ", ".join(f"{n} {names[n > 1]}" for n, names in counted)


def count_roles(checkpoint: Checkpoint) -> RoleCounts:
    """Counts the kinds of tensors of a checkpoint, quantized or not; reads headers."""
    roles = tensor_roles(checkpoint.config)
    found = collections.Counter(
        roles.of(name, checkpoint.spec(name).shape).kind for name in checkpoint.names()
    )
    source = _source(checkpoint.config, list(roles.families))
    return RoleCounts(source, {kind: found[kind] for kind in _NAMES if found[kind]})


def _source(config: Mapping[str, Any], tables: list[str]) -> str:
    if tables:
        listed = " and ".join(f"`{name}`" for name in tables)
        return f"the table of {listed}"
    model_type = config.get("model_type")
    if has_names(config):
        return f"the names of `{model_type}`, which runs here"
    if model_type is None:
        return "defaults, config.json naming no `model_type`"
    return f"defaults, `{str(model_type)[:40]}` having no table of its own"
