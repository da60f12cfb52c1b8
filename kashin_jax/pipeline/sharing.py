"""Layers that read the same input: one seed and one scale of inputs for all."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float16, Key

from kashin_jax.methods import Method, require_finite
from kashin_jax.pipeline.paths import path_key
from kashin_jax.pipeline.policy import Choice
from kashin_jax.pipeline.rules import Rules

__all__ = [
    "Group",
    "InputScales",
    "Reader",
    "chosen_groups",
    "find_groups",
    "layer_key",
]


class Reader(NamedTuple):
    """A layer that will be quantized.

    Attributes:
      path: Its path.
      config: The method.
      inputs: Their number, after the sizes of the axes of a stack.
    """

    path: str
    config: Method
    inputs: tuple[int, ...]


class Group(NamedTuple):
    """Layers that read the same input, at least two.

    Attributes:
      name: What is left of their paths.
      paths: Those, in order.
      config: The method of all of them.
    """

    name: str
    paths: tuple[str, ...]
    config: Method


def find_groups(layers: Iterable[Reader], rules: Rules | None) -> dict[str, Group]:
    """The group of every layer that has one, by its path.

    One layer alone is none: it keeps the key of its path.
    """
    found: dict[tuple[Any, Method, tuple[int, ...]], list[str]] = {}
    for path, config, inputs in layers:
        name = None if rules is None else rules.shared_name(path)
        if name is not None:
            found.setdefault((name, config, inputs), []).append(path)
    groups = [
        # One order, that of sums too, whatever the order of the layers.
        Group(name, tuple(sorted(set(paths))), config)
        for ((_, name), config, _), paths in found.items()
        if len(set(paths)) > 1
    ]
    return {path: group for group in groups for path in group.paths}


def chosen_groups(choices: Iterable[Choice], rules: Rules | None) -> dict[str, Group]:
    """`find_groups` among the matrices that will be packed."""
    layers = (
        Reader(choice.path, choice.config, choice.candidate.shape[:-1])
        for choice in choices
        if choice.config is not None
    )
    return find_groups(layers, rules)


def layer_key(
    root: Key[Array, ""], path: str, groups: Mapping[str, Group]
) -> Key[Array, ""]:
    """The key of a layer: folded from its path, or from the name of its group."""
    return path_key(root, groups[path].name if path in groups else path)


class InputScales:
    """Scales of the inputs that layers share, computed when first asked for."""

    def __init__(self, groups: Mapping[str, Group], kernel: Callable[[str], Array]):
        """Computes nothing.

        Args:
          groups: From `find_groups`.
          kernel: Gives the kernel of a path; called once for every member of a group,
            before any of its scales is returned. Nothing that it gives is kept.
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
            kernels = self._finite(group.paths)
            self._known[group] = group.config.common_input_scale(kernels)
        return self._known[group]

    def _finite(self, paths: Iterable[str]) -> Iterator[Array]:
        for path in paths:
            kernel = jnp.asarray(self._kernel(path))
            require_finite(kernel, path)
            yield kernel
            del kernel
