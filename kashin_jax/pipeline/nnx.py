"""Whole NNX models: the dense layers of a plan replaced by packed ones."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from kashin_jax.errors import UsageError
from kashin_jax.layers.embed import QuantizedEmbed
from kashin_jax.layers.linear import QuantizedLinear, require_plain_product
from kashin_jax.layers.packed import Inputs, Packed, pack
from kashin_jax.methods import Method
from kashin_jax.pipeline.coverage import Coverage, cover
from kashin_jax.pipeline.paths import join, natural
from kashin_jax.pipeline.plan import (
    ADDED,
    Candidate,
    Choice,
    Plan,
    Select,
    choose_methods,
    make_plan,
    part_of,
)
from kashin_jax.pipeline.report import LayerReport
from kashin_jax.pipeline.rules import Rules, default_select
from kashin_jax.pipeline.run import Coded, LayerQuantizer, quantize_each, reported
from kashin_jax.pipeline.sharing import Group, find_groups
from kashin_jax.tensors import QuantizedTensor

__all__ = [
    "QuantizedModel",
    "plan_model",
    "quantize_model",
    "replace_kernels",
    "selected_kernels",
]

Model = TypeVar("Model", bound=nnx.Module)
QuantizeLayer = Callable[[str, Array], Coded]

# The attribute that holds the matrix. Subclasses may compute anything: exact types.
_MATRIX: dict[type, str] = {nnx.Linear: "kernel", nnx.Embed: "embedding"}

# Wrappers that do not only call a layer, but compute its kernel at every call.
_REACHING = frozenset({nnx.WeightNorm, nnx.SpectralNorm})


class _Pair(NamedTuple):
    model: Any
    reports: dict[str, LayerReport]


class QuantizedModel(_Pair):
    """A model with packed layers, and what each of them lost.

    Attributes:
      model: Shares every other parameter with the model it was made from.
      reports: By path of the layer, such as `decoder/layers/0/fc1`.
      coverage: How much was quantized, and what was not. No item of the tuple, so that
        it can still be unpacked into two.
    """

    coverage: Coverage


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
      layers: The layers that use it, in the order of the paths of the candidate.
    """

    candidate: Candidate
    variable: nnx.Variable[Array]
    layers: tuple[Layer, ...]


def quantize_model(
    model: Model,
    config: Method | None = None,
    key: Key[Array, ""] | None = None,
    *,
    rules: Rules | None = None,
    select: Select | None = None,
    quantize_layer: QuantizeLayer | None = None,
    dry_run: bool = False,
    in_place: bool = False,
) -> QuantizedModel:
    """Replaces layers of any NNX model by packed ones.

    Every `nnx.Linear` that the rules do not leave out becomes a `QuantizedLinear`, and
    an `nnx.Embed` that one of them names a `QuantizedEmbed`. Norms and everything that
    is not exactly of these types stay as they are. Of a stack of kernels, as `nnx.vmap`
    and `nnx.scan` make them, every matrix is quantized alone, with a key folded from
    its index too, and the layer holds a stack again. Each matrix has a key folded from
    its path, so adding a layer leaves the codes of the others unchanged; the layers of
    a group of `rules.share` have a key and a scale of inputs in common, and the
    variables of what is done to their input, which under one `jit` is then done once. A
    matrix that several layers share is quantized once and stays shared; where one of
    them is to stay, or something else reads it, all stay. Layers that lost much more
    than others are named in a logged warning, see `outliers`.

    Args:
      model: Not changed, unless `in_place`.
      config: The method; None takes that of the rules, or joint coding at 4 bits.
      key: Root key; `jax.random.key(0)` when None.
      rules: A method for each layer; None takes `Rules(config=config)`.
      select: Called with paths; false leaves a layer out. Heads, embeddings and what
        else is skipped by default stay all the same; a rule that names them takes them.
      quantize_layer: Called as `(path, kernel)` in place of `quantize`, by callers that
        keep finished layers; None quantizes with the planned method and the layer's
        key.
      dry_run: Whether to print the plan, see `plan_model`, and stop there.
      in_place: Whether to change the model itself. Each layer is replaced as soon as it
        is quantized and its dense kernel let go, so that no more than one layer is held
        twice. After an error the layers done so far are packed and the model works.

    Returns:
      The new model and a report per layer; for a dry run the model given, no reports.

    Raises:
      UsageError: If nothing is selected, a rule matches nothing, or a selected layer
        cannot be quantized: it names the path.
      NonFiniteError: If a selected kernel holds NaN or infinity; names its path.
    """
    if dry_run:
        plan = plan_model(model, config, rules=rules, select=select)
        print(plan)
        return _result(model, {}, plan.coverage)
    root = jax.random.key(0) if key is None else key
    # Nothing else holds the targets: in place, it would hold the dense kernels.
    targets = find_targets(model)
    choices = _choices(targets, config, rules, select)
    if quantize_layer is None:
        # Methods that cannot code a matrix say so before hours of work, not after.
        choices = [layer.choice for layer in make_plan(choices, 0).layers]
    parts = [part_of(choice) for choice in choices]
    coverage = cover(parts, *reversed(_others(model, targets)))
    del targets
    whole = model if in_place else nnx.clone(model, variables=False)
    changed = _Replacing(whole, find_groups(choices, rules))
    quantizer: Callable[[Choice], tuple[QuantizedTensor, LayerReport]]
    if quantize_layer is None:
        quantizer = LayerQuantizer(choices, rules, root, changed.kernel)
    else:
        own = quantize_layer

        def quantizer(choice: Choice) -> tuple[QuantizedTensor, LayerReport]:
            kernel = changed.kernel(choice)
            return reported(choice.path, None, lambda: own(choice.path, kernel))

    reports = quantize_each(choices, quantizer, changed.put)
    coverage.warn()
    return _result(changed.model, reports, coverage)


def _result(
    model: Any, reports: dict[str, LayerReport], coverage: Coverage
) -> QuantizedModel:
    result = QuantizedModel(model, reports)
    result.coverage = coverage
    return result


class _Replacing:
    """A model some of whose layers are packed, and the matrices of all others."""

    def __init__(self, model: Any, groups: Mapping[str, Group]) -> None:
        self.model, self._groups = model, groups
        self._targets = {each.candidate.paths[0]: each for each in find_targets(model)}
        self._known: Inputs = {}

    def kernel(self, choice: Choice) -> Array:
        """The dense matrix."""
        return self._targets[choice.path].variable.get_value()

    def put(self, choice: Choice, tensor: QuantizedTensor) -> None:
        """Puts a packed matrix in the place of a dense one, which is let go."""
        packed = pack(tensor, self._known, self._groups.get(choice.path))
        for layer in self._targets.pop(choice.path).layers:
            new = put_layer(layer, packed)
            self.model = new if layer.node is self.model else self.model


def plan_model(
    model: nnx.Module,
    config: Method | None = None,
    *,
    rules: Rules | None = None,
    select: Select | None = None,
) -> Plan:
    """Plans what `quantize_model` would do, quantizing nothing; print it for a table.

    Raises:
      UsageError: As `quantize_model`.
    """
    targets = find_targets(model)
    choices = _choices(targets, config, rules, select)
    return make_plan(choices, *_others(model, targets))


def selected_kernels(
    model: nnx.Module, select: Select = default_select
) -> dict[str, Float[Array, "m n"]]:
    """Kernels of the selected `nnx.Linear` layers by path, in a fixed order.

    Raises:
      UsageError: If nothing is selected, or a selected kernel is not a matrix.
    """
    targets = find_targets(model)
    choices = _choices(targets, None, None, select)
    kernels = {
        choice.path: target.variable.get_value()
        for choice, target in zip(choices, targets, strict=True)
        if choice.config is not None
    }
    for path, kernel in kernels.items():
        if kernel.ndim != 2:
            raise UsageError(
                f"`{path}/kernel` has shape {kernel.shape}, a stack of matrices; leave "
                "it out by `select`."
            )
    return kernels


def replace_kernels(model: Model, kernels: Mapping[str, Array]) -> Model:
    """A copy of the model with other dense kernels; the rest is shared.

    Raises:
      ValueError: If a path names no kernel of the model, or one of another shape.
    """
    graphdef, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    paths = {join(parts[:-1]): parts for parts in flat if parts[-1] == "kernel"}
    for path, kernel in kernels.items():
        if path not in paths:
            raise ValueError(
                f"`{path}` is no layer with a kernel. `selected_kernels` lists paths "
                "of this model's linears."
            )
        variable = flat[paths[path]]
        if kernel.shape != variable.get_value().shape:
            raise ValueError(
                f"`{path}/kernel` has shape {variable.get_value().shape}; the new one "
                f"has {kernel.shape}. Give kernels as [in, out]."
            )
        flat[paths[path]] = variable.replace(kernel)
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _choices(
    targets: list[Target],
    config: Method | None,
    rules: Rules | None,
    select: Select | None,
) -> list[Choice]:
    candidates = (target.candidate for target in targets)
    return choose_methods(candidates, config, rules, select, what="nnx.Linear layers")


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
    known = [
        _target(variables[key], tuple(layers), users.get(key, []))
        for key, layers in groups.items()
    ]
    return known + _unknown(nodes, set(groups))


def _unknown(nodes: list[tuple[str, Any]], known: set[int]) -> list[Target]:
    """Other arrays of two axes and more: nothing is known of what is done with them."""
    found: dict[int, Target] = {}
    for path, node in sorted(nodes, key=lambda item: natural(item[0])):
        for name, child in _children(node):
            if not isinstance(child, nnx.Param) or id(child) in known | found.keys():
                continue
            value = child.get_value()
            is_float = jnp.issubdtype(getattr(value, "dtype", bool), jnp.floating)
            if not is_float or value.ndim < 2 or name in ADDED:
                continue
            candidate = Candidate(
                paths=(join([*filter(None, [path]), name]),),
                shape=value.shape,
                dtype=value.dtype.name,
                left=f"in a {type(node).__name__}",
            )
            found[id(child)] = Target(candidate, child, ())
    return list(found.values())


def packed_layer(
    dense: Any, packed: Packed, path: str
) -> QuantizedLinear | QuantizedEmbed:
    """The packed layer that does what an `nnx.Linear` or `nnx.Embed` does."""
    if type(dense) is nnx.Embed:
        return QuantizedEmbed.from_embed(dense, packed, path=path)
    return QuantizedLinear.from_linear(dense, packed, path=path)


def put_layer(layer: Layer, packed: Packed) -> QuantizedLinear | QuantizedEmbed:
    """Puts a packed layer wherever the dense one hangs, and returns it."""
    new = packed_layer(layer.node, packed, layer.path)
    for holder, name in layer.holders:
        if isinstance(holder, nnx.Pytree):
            setattr(holder, name, new)
        else:
            holder[name] = new
    return new


def _others(model: nnx.Module, targets: list[Target]) -> tuple[int, int]:
    """Bytes and number of all parameters that are no target's."""
    known = {id(target.variable) for target in targets}
    leaves = [
        leaf
        for _, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Param) and id(node) not in known
        for leaf in jax.tree.leaves(node.get_value())
    ]
    sizes = (leaf.size * leaf.dtype.itemsize for leaf in leaves)
    return sum(sizes), sum(leaf.size for leaf in leaves)


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
    if strange := [layer for layer in layers if type(layer.node) not in _MATRIX]:
        left: str | None = f"in a {type(strange[0].node).__name__}"
    elif outside := [path for path, node in users if id(node) not in nodes]:
        left = f"tied to {outside[0]}"
    else:
        left = next(
            filter(None, (_why_left(layer, value.shape) for layer in layers)), None
        )
    return Target(
        Candidate(
            paths=tuple(layer.path for layer in layers),
            shape=value.shape,
            dtype=value.dtype.name,
            only_by_rule=nnx.Embed in kinds,
            left=left,
        ),
        variable,
        layers if left is None else (),
    )


def _why_left(layer: Layer, shape: tuple[int, ...]) -> str | None:
    """Why a layer cannot be replaced by a packed one; None if it can."""
    if len(shape) != 2 and not _is_stack(layer.node, shape):
        return f"has {len(shape)} axes, and is no stack of kernels [in, out]"
    for holder, _ in layer.holders:
        if type(holder) in _REACHING:
            return f"inside an nnx.{type(holder).__name__}, which writes to its kernel"
        if not isinstance(holder, nnx.Pytree | list | dict):
            kind = type(holder).__name__
            return (
                f"held by a {kind}, which cannot be changed; use nnx.List or nnx.Dict"
            )
    try:
        require_plain_product(layer.node, layer.path)
    except UsageError:
        return "multiplies by a function of its own, which packed weights cannot"
    return None


def _is_stack(layer: Any, shape: tuple[int, ...]) -> bool:
    """Whether a kernel is some matrices of the layer along leading axes."""
    if type(layer) is not nnx.Linear or 0 in shape[:-2]:
        return False
    return shape[-2:] == (layer.in_features, layer.out_features)
