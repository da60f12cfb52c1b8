"""Matrices of an NNX model that can be quantized, and where its layers hang."""

from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array

from kashin_jax.errors import UsageError
from kashin_jax.layers.embed import QuantizedEmbed
from kashin_jax.layers.linear import QuantizedLinear, require_plain_product
from kashin_jax.layers.packed import Packed
from kashin_jax.pipeline.paths import join, natural
from kashin_jax.pipeline.policy import Candidate

__all__ = ["Layer", "Target", "find_targets", "other_bytes", "put"]

# The attribute that holds the matrix. Subclasses may compute anything: exact types.
_MATRIX: dict[type, str] = {nnx.Linear: "kernel", nnx.Embed: "embedding"}


class Layer(NamedTuple):
    """A dense layer and the attributes or items of the model that hold it."""

    path: str
    node: Any
    holders: tuple[tuple[Any, Any], ...]


class Target(NamedTuple):
    """A matrix, and the layers that use it; none where it has to stay.

    Attributes:
      candidate: What is to be decided about.
      variable: Holds the matrix.
      layers: Those of the paths of the candidate, in order.
    """

    candidate: Candidate
    variable: nnx.Variable[Array]
    layers: tuple[Layer, ...]


def find_targets(model: nnx.Module) -> list[Target]:
    """All matrices of layers, in the order of their paths; each one once."""
    holders: dict[int, list[tuple[Any, Any]]] = {}
    users: dict[int, list[tuple[str, Any]]] = {}
    nodes = [(join(parts), node) for parts, node in nnx.iter_graph(model)]
    for path, node in nodes:
        for name, child in _children(node):
            if type(child) in _MATRIX:
                holders.setdefault(id(child), []).append((node, name))
            elif isinstance(child, nnx.Variable):
                users.setdefault(id(child), []).append((f"{path}/{name}", node))
    groups: dict[int, list[Layer]] = {}
    variables: dict[int, nnx.Variable[Array]] = {}
    for path, node in sorted(nodes, key=lambda item: natural(item[0])):
        variable = _matrix_of(node)
        if variable is not None:
            layer = Layer(path, node, tuple(holders.get(id(node), ())))
            groups.setdefault(id(variable), []).append(layer)
            variables[id(variable)] = variable
    return [
        _target(variables[key], tuple(layers), users.get(key, []))
        for key, layers in groups.items()
    ]


def put(layer: Layer, packed: Packed) -> QuantizedLinear | QuantizedEmbed:
    """Puts a packed layer wherever the dense one hangs, and returns it.

    Raises:
      UsageError: If that is in something that cannot be changed.
    """
    new: QuantizedLinear | QuantizedEmbed
    if type(layer.node) is nnx.Embed:
        new = QuantizedEmbed.from_embed(layer.node, packed, path=layer.path)
    else:
        new = QuantizedLinear.from_linear(layer.node, packed, path=layer.path)
    for holder, name in layer.holders:
        if isinstance(holder, nnx.Pytree):
            setattr(holder, name, new)
        elif isinstance(holder, list | dict):
            holder[name] = new
        else:
            raise UsageError(
                f"`{layer.path}` is held by a {type(holder).__name__}, which cannot be "
                "changed. Use nnx.List or nnx.Dict."
            )
    return new


def other_bytes(model: nnx.Module, targets: list[Target]) -> int:
    """Bytes of all parameters that are no target's."""
    params = jax.tree.leaves(nnx.state(model, nnx.Param))
    matrices = [
        target.variable.get_value()
        for target in targets
        if isinstance(target.variable, nnx.Param)
    ]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in params) - sum(
        leaf.size * leaf.dtype.itemsize for leaf in matrices
    )


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
    for name in _MATRIX.values():
        found = vars(node).get(name)
        # Abstract arrays can be planned for.
        if isinstance(found, nnx.Param) and getattr(found.get_value(), "ndim", 0) >= 2:
            return found
    return None


def _target(
    variable: nnx.Variable[Array],
    layers: tuple[Layer, ...],
    users: list[tuple[str, Any]],
) -> Target:
    value = variable.get_value()
    kinds = [type(layer.node) for layer in layers]
    nodes = {id(layer.node) for layer in layers}
    left = problem = None
    if strange := [layer for layer in layers if type(layer.node) not in _MATRIX]:
        left = f"in a {type(strange[0].node).__name__}"
    elif outside := [path for path, node in users if id(node) not in nodes]:
        left = f"tied to {outside[0]}"
    else:
        problem = _problem(layers, value)
    return Target(
        Candidate(
            paths=tuple(layer.path for layer in layers),
            shape=value.shape,
            dtype=value.dtype.name,
            only_by_rule=nnx.Embed in kinds,
            left=left,
            problem=problem,
        ),
        variable,
        layers if left is None else (),
    )


def _problem(layers: tuple[Layer, ...], value: Any) -> str | None:
    path = layers[0].path
    for layer in layers:
        if value.ndim != 2 and not _is_stack(layer.node, value.shape):
            name = _MATRIX[type(layer.node)]
            return (
                f"`{path}/{name}` has shape {value.shape}; only matrices can be "
                "quantized, and stacks of kernels [in, out] along leading axes. Leave "
                "it out by `select` or a rule."
            )
        try:
            require_plain_product(layer.node, layer.path)
        except UsageError as error:
            return str(error)
    return None


def _is_stack(layer: Any, shape: tuple[int, ...]) -> bool:
    """Whether a kernel is some matrices of the layer along leading axes."""
    if type(layer) is not nnx.Linear or 0 in shape[:-2]:
        return False
    return shape[-2:] == (layer.in_features, layer.out_features)
