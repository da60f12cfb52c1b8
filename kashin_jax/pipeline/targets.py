"""The matrices of an NNX model, and how packed ones are put in their places."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from kashin_jax.layers.contraction import contraction_of, declared_shape
from kashin_jax.layers.embed import QuantizedEmbed
from kashin_jax.layers.linear import QuantizedLinear
from kashin_jax.layers.packed import Packed, PackedParam
from kashin_jax.pipeline.paths import join, natural
from kashin_jax.pipeline.plan import ADDED, Candidate, axes_by_rules
from kashin_jax.pipeline.rules import Rules
from kashin_jax.tensors import KernelAxes, PackedArray, QuantizedTensor

__all__ = [
    "Graph",
    "Target",
    "find_targets",
    "packed_layer",
    "put_layers",
    "put_params",
]

# The attribute that holds the matrix. Subclasses may compute anything: exact types.
_MATRIX: dict[type, str] = {
    nnx.Linear: "kernel",
    nnx.LinearGeneral: "kernel",
    nnx.Einsum: "kernel",
    nnx.Conv: "kernel",
    nnx.Embed: "embedding",
}

# Wrappers that do not only call a layer, but compute its kernel at every call.
_REACHING = frozenset({nnx.WeightNorm, nnx.SpectralNorm})

Place = tuple[Any, Any]
"""A node of the model, and the attribute or item of it."""


class _Layer(NamedTuple):
    # A module with a matrix, and where it hangs in the model.
    path: str
    node: Any
    holders: tuple[Place, ...]


class Target(NamedTuple):
    """A matrix, and what uses it; nothing where it has to stay.

    Attributes:
      candidate: What is to be decided about.
      variable: Holds the matrix.
      layers: Layers that become packed ones, in the order of the paths of the
        candidate.
      places: Where a module reads the variable itself, and gets one that decodes.
    """

    candidate: Candidate
    variable: nnx.Variable[Array]
    layers: tuple[_Layer, ...] = ()
    places: tuple[Place, ...] = ()

    def matrix(self) -> Array:
        """The dense matrix, or a stack of them."""
        value, axes = self.variable.get_value(), self.candidate.axes
        return value if axes is None else axes.to_matrix(value)


class Graph:
    """The nodes of a model by path, and what holds what.

    Attributes:
      nodes: With their paths, in order.
      holders: By id of a module, every node that holds it, and as what.
      users: By id of a variable the same, with its path there.
    """

    def __init__(self, model: nnx.Module) -> None:
        found = [(join(parts), node) for parts, node in nnx.iter_graph(model)]
        self.nodes = sorted(found, key=lambda item: natural(item[0]))
        self.holders: dict[int, list[Place]] = {}
        self.users: dict[int, list[tuple[str, Place]]] = {}
        for path, node in self.nodes:
            for name, child in _children(node):
                if isinstance(child, nnx.Variable):
                    place = join([*filter(None, [path]), name]), (node, name)
                    self.users.setdefault(id(child), []).append(place)
                elif isinstance(child, nnx.Module):
                    self.holders.setdefault(id(child), []).append((node, name))

    def layer(self, path: str, node: Any) -> _Layer:
        return _Layer(path, node, tuple(self.holders.get(id(node), ())))

    def stands_alone(self, module: nnx.Module) -> bool:
        """Whether a module is in one place, and all that it holds in no other."""
        within = {id(node) for _, node in nnx.iter_graph(module)}
        places = [list(held) for key, held in self.holders.items() if key != id(module)]
        places += [[place for _, place in held] for held in self.users.values()]
        own = [{id(node) in within for node, _ in held} for held in places]
        return len(self.holders.get(id(module), ())) <= 1 and {True, False} not in own


def find_targets(model: nnx.Module, rules: Rules | None = None) -> list[Target]:
    """All matrices of a model, in the order of their paths; each one once.

    Args:
      model: Not changed.
      rules: Say of arrays that no known layer has which axes are inputs.

    Raises:
      UsageError: If a rule names axes that an array does not have.
    """
    graph = Graph(model)
    groups: dict[int, list[_Layer]] = {}
    variables: dict[int, nnx.Variable[Array]] = {}
    for path, node in graph.nodes:
        variable = _matrix_of(node)
        if variable is not None:
            groups.setdefault(id(variable), []).append(graph.layer(path, node))
            variables[id(variable)] = variable
    known = [
        _target(variables[key], tuple(layers), graph, rules)
        for key, layers in groups.items()
    ]
    return known + _unknown(graph, set(groups), rules)


def packed_layer(
    dense: Any, packed: Packed, path: str
) -> QuantizedLinear | QuantizedEmbed:
    """The packed layer that does what a layer of NNX does."""
    if type(dense) is nnx.Embed:
        return QuantizedEmbed.from_embed(dense, packed, path=path)
    return QuantizedLinear.from_linear(dense, packed, path=path)


def put_layers(target: Target, packed: Packed, model: Any) -> Any:
    """Puts packed layers wherever the dense ones hang; returns the model.

    That is the layer itself where the model was one of the dense ones.
    """
    for layer in target.layers:
        new = packed_layer(layer.node, packed, layer.path)
        for place in layer.holders:
            _put(place, new)
        model = new if layer.node is model else model
    return model


def put_params(target: Target, tensor: QuantizedTensor) -> None:
    """Puts a packed parameter wherever modules read the dense one."""
    axes = target.candidate.axes
    assert axes is not None, "a rule has named them"
    param = PackedParam(PackedArray(tensor, axes))
    for place in target.places:
        _put(place, param)


def _put(place: Place, new: Any) -> None:
    holder, name = place
    if isinstance(holder, nnx.Pytree):
        setattr(holder, name, new)
    else:
        holder[name] = new


def _children(node: Any) -> list[tuple[Any, Any]]:
    if isinstance(node, nnx.Pytree):
        return list(vars(node).items())
    if isinstance(node, list | tuple):
        return list(enumerate(node))
    return list(node.items()) if isinstance(node, dict) else []


def _matrix_of(node: Any) -> nnx.Variable[Array] | None:
    """What a layer multiplies by, if it is an array of two axes or more."""
    if not isinstance(node, nnx.Module):
        return None
    for name in sorted(set(_MATRIX.values())):
        found = vars(node).get(name)
        # Abstract arrays can be planned for.
        if isinstance(found, nnx.Param) and getattr(found.get_value(), "ndim", 0) >= 2:
            return found
    return None


def _target(
    variable: nnx.Variable[Array],
    layers: tuple[_Layer, ...],
    graph: Graph,
    rules: Rules | None,
) -> Target:
    shape = variable.get_value().shape
    users = graph.users.get(id(variable), [])
    nodes = {id(layer.node) for layer in layers}
    outside = [path for path, (node, _) in users if id(node) not in nodes]
    found = _common_axes(layers, shape, outside)
    paths = tuple(layer.path for layer in layers)
    only_by_rule = nnx.Embed in {type(layer.node) for layer in layers}
    if isinstance(found, KernelAxes):
        candidate = _candidate(paths, variable, found)
        return Target(candidate._replace(only_by_rule=only_by_rule), variable, layers)
    target = _read_by_modules(paths, variable, graph, found, rules)
    candidate = target.candidate._replace(only_by_rule=only_by_rule)
    return target._replace(candidate=candidate)


def _unknown(graph: Graph, known: set[int], rules: Rules | None) -> list[Target]:
    """Other arrays of two axes and more: nothing is known of what is done with them."""
    found: dict[int, Target] = {}
    for _, node in graph.nodes:
        for name, child in _children(node):
            if not isinstance(child, nnx.Param) or id(child) in known | found.keys():
                continue
            value = child.get_value()
            is_float = jnp.issubdtype(getattr(value, "dtype", bool), jnp.floating)
            if not is_float or value.ndim < 2 or name in ADDED:
                continue
            paths = tuple(path for path, _ in graph.users[id(child)])
            left = f"in a {type(node).__name__}"
            found[id(child)] = _read_by_modules(paths, child, graph, left, rules)
    return list(found.values())


def _read_by_modules(
    paths: tuple[str, ...],
    variable: nnx.Variable[Array],
    graph: Graph,
    left: str,
    rules: Rules | None,
) -> Target:
    """An array that stays, unless a rule says which of its axes are inputs."""
    places = tuple(place for _, place in graph.users[id(variable)])
    axes = axes_by_rules(rules, paths, variable.get_value().shape)
    nodes = [node for node, _ in places]
    above = [holder for node in nodes for holder, _ in graph.holders.get(id(node), ())]
    why = _why_written([*nodes, *above]) or _why_fixed(nodes)
    if axes is None or why:
        stays = left if axes is None else why
        return Target(_candidate(paths, variable, None, stays), variable)
    return Target(_candidate(paths, variable, axes), variable, places=places)


def _candidate(
    paths: tuple[str, ...],
    variable: nnx.Variable[Array],
    axes: KernelAxes | None,
    left: str | None = None,
) -> Candidate:
    value = variable.get_value()
    shape = value.shape if axes is None else axes.matrix_shape(value.shape)
    return Candidate(
        paths=paths,
        shape=shape,
        dtype=value.dtype.name,
        left=left,
        axes=axes,
        original=None if shape == value.shape else value.shape,
    )


def _common_axes(
    layers: Sequence[_Layer], shape: tuple[int, ...], outside: Sequence[str]
) -> KernelAxes | str:
    """How all layers read a kernel that they share, or why it stays."""
    for layer in layers:
        if type(layer.node) not in _MATRIX:
            return f"in a {type(layer.node).__name__}"
    if outside:
        return f"tied to {outside[0]}"
    found: list[KernelAxes] = []
    for layer in layers:
        holders = [holder for holder, _ in layer.holders]
        why = _why_written(holders) or _why_fixed(holders)
        axes = why or _axes_of(layer.node, shape)
        if isinstance(axes, str):
            return axes
        found.append(axes)
    if len(set(found)) > 1:
        return f"read in different ways by {' and '.join(e.path for e in layers)}"
    return found[0]


def _why_written(holders: Sequence[Any]) -> str | None:
    for holder in holders:
        if type(holder) in _REACHING:
            return f"inside an nnx.{type(holder).__name__}, which writes to its kernel"
    return None


def _why_fixed(holders: Sequence[Any]) -> str | None:
    for holder in holders:
        if not isinstance(holder, nnx.Pytree | list | dict):
            kind = type(holder).__name__
            return (
                f"held by a {kind}, which cannot be changed; use nnx.List or nnx.Dict"
            )
    return None


def _axes_of(node: Any, shape: tuple[int, ...]) -> KernelAxes | str:
    """Which axes of a kernel a layer sums over, or why it cannot be packed."""
    stays = f"has {len(shape)} axes, and is no stack of kernels [in, out]"
    if type(node) is nnx.Embed:
        return KernelAxes.of(shape, (0,)) if len(shape) == 2 else stays
    declared = declared_shape(node)
    found = contraction_of(node, declared)
    if isinstance(found, str):
        return found
    if type(node) is nnx.Linear and len(shape) == 2:
        return KernelAxes.of(shape, (0,))
    leading = len(shape) - len(declared)
    if leading < 0 or shape[leading:] != declared or 0 in shape[:leading]:
        return stays
    return found.kernel
