"""Layers that read the same input: one seed and one scale of inputs for all."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float16, Key

from kashin_jax.methods import Method, require_finite
from kashin_jax.pipeline.paths import path_key
from kashin_jax.pipeline.plan import Choice
from kashin_jax.pipeline.rules import Rules

__all__ = ["Group", "InputScales", "find_groups", "layer_key"]


class Group(NamedTuple):
    """Layers that read the same input, at least two.

    Attributes:
      name: Their paths, once what the pattern matches is cut out.
      members: Their matrices, in the order of the paths.
      config: The method of all of them.
    """

    name: str
    members: tuple[Choice, ...]
    config: Method


def find_groups(choices: Iterable[Choice], rules: Rules | None) -> dict[str, Group]:
    """The group of every layer that has one, by its path.

    A layer that is alone in its group has none, and keeps the key of its path.
    """
    found: dict[tuple[Any, Method, tuple[int, ...]], dict[str, Choice]] = {}
    for choice in choices:
        name = None if rules is None else rules.shared_name(choice.path)
        if name is None or choice.config is None:
            continue
        # Of a stack the axes too, not only the number of inputs.
        kind = (name, choice.config, choice.candidate.shape[:-1])
        found.setdefault(kind, {})[choice.path] = choice
    groups = [
        # One order, that of sums too, whatever the order of the layers.
        Group(name, tuple(members[path] for path in sorted(members)), config)
        for ((_, name), config, _), members in found.items()
        if len(members) > 1
    ]
    return {member.path: group for group in groups for member in group.members}


def layer_key(
    root: Key[Array, ""], path: str, groups: Mapping[str, Group]
) -> Key[Array, ""]:
    """The key of a layer: folded from its path, or from the name of its group."""
    return path_key(root, groups[path].name if path in groups else path)


class InputScales:
    """Scales of the inputs that layers share, computed when first asked for."""

    def __init__(
        self, groups: Mapping[str, Group], kernel: Callable[[Choice], Array]
    ) -> None:
        """Computes nothing.

        Args:
          groups: From `find_groups`.
          kernel: Gives a matrix; called once for every member of a group, before any
            of its scales is returned. Nothing that it gives is kept.
        """
        self._groups = groups
        self._kernel = kernel
        self._known: dict[Group, Float16[Array, "*stack m"] | None] = {}

    def __call__(self, path: str) -> Float16[Array, "*stack m"] | None:
        """The scale of a layer's inputs; None for layers that have one of their own.

        Raises:
          NonFiniteError: If a kernel of its group holds NaN or infinity.
        """
        group = self._groups.get(path)
        if group is None:
            return None
        if group not in self._known:
            kernels = self._finite(group)
            self._known[group] = group.config.common_input_scale(kernels)
        return self._known[group]

    def _finite(self, group: Group) -> Iterator[Array]:
        for member in group.members:
            kernel = jnp.asarray(self._kernel(member))
            require_finite(kernel, member.path)
            yield kernel
            del kernel
