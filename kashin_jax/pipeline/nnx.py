"""Whole NNX models: the dense layers of a plan replaced by packed ones."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
from flax import nnx
from jaxtyping import Array, Float, Key

from kashin_jax.errors import UsageError
from kashin_jax.layers.packed import Inputs, pack
from kashin_jax.methods import Method
from kashin_jax.pipeline.calibrated_model import quantize_calibrated
from kashin_jax.pipeline.calibration import Calibration, calibration_rules
from kashin_jax.pipeline.coverage import Coverage, cover
from kashin_jax.pipeline.paths import join
from kashin_jax.pipeline.plan import (
    Choice,
    Plan,
    Select,
    choose_methods,
    make_plan,
    part_of,
)
from kashin_jax.pipeline.report import LayerReport
from kashin_jax.pipeline.rules import Rules, default_select, resolve_rules
from kashin_jax.pipeline.run import Coded, LayerQuantizer, quantize_each, reported
from kashin_jax.pipeline.sharing import Group, find_groups
from kashin_jax.pipeline.targets import Target, find_targets, put_layers, put_params
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
    calibration: Calibration | None = None,
) -> QuantizedModel:
    """Replaces layers of any NNX model by packed ones.

    Every `nnx.Linear`, `nnx.LinearGeneral` (those of an `nnx.MultiHeadAttention`, too),
    `nnx.Einsum` and `nnx.Conv` of kernel size 1 that the rules do not leave out becomes
    a `QuantizedLinear`, and an `nnx.Embed` that one of them names a `QuantizedEmbed`.
    Norms and everything that is not exactly of these types stay as they are, but for
    arrays whose inputs a rule names by `contract`: these become a `PackedParam`, which
    decodes when the module reads it. Kernels of more axes are read as `[in, out]`, in
    plans, reports and `quantize_layer`. Of a stack of kernels, as `nnx.vmap`
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
      calibration: A text that decides what is lost, see `quantize_calibrated`, for
        models that give logits of token ids `[b, t]`, and encoders. All packed layers
        are then held beside the model before the first is replaced.

    Returns:
      The new model and a report per layer; for a dry run the model given, no reports.

    Raises:
      UsageError: If nothing is selected, a rule matches nothing, or a selected layer
        cannot be quantized: it names the path.
      NonFiniteError: If a selected kernel holds NaN or infinity; names its path.
    """
    if calibration is not None:
        if quantize_layer is not None:
            raise UsageError("Give `calibration` or `quantize_layer`, not both.")
        rules = calibration_rules(resolve_rules(config, rules), calibration.weighting)
        config = None
    if dry_run:
        plan = plan_model(model, config, rules=rules, select=select)
        print(plan)
        return _result(model, {}, plan.coverage)
    root = jax.random.key(0) if key is None else key
    # Nothing else holds the targets: in place, it would hold the dense kernels.
    targets = find_targets(model, rules)
    choices = _choices(targets, config, rules, select)
    if quantize_layer is None:
        # Methods that cannot code a matrix say so before hours of work, not after.
        choices = [layer.choice for layer in make_plan(choices, 0).layers]
    parts = [part_of(choice) for choice in choices]
    coverage = cover(parts, *reversed(_others(model, targets)))
    del targets
    whole = model if in_place else nnx.clone(model, variables=False)
    changed = _Replacing(whole, find_groups(choices, rules), rules)
    quantizer: Callable[[Choice], tuple[QuantizedTensor, LayerReport]]
    if quantize_layer is None:
        quantizer = LayerQuantizer(choices, rules, root, changed.kernel)
        if calibration is not None:
            chosen = [choice for choice in choices if choice.config is not None]
            found = _Calibrated(changed.kernel, quantizer)
            quantize_calibrated(model, chosen, calibration, root, found)
            quantizer = found
    else:
        own = quantize_layer

        def quantizer(choice: Choice) -> tuple[QuantizedTensor, LayerReport]:
            kernel = changed.kernel(choice)
            return reported(choice.path, None, lambda: own(choice.path, kernel))

    reports = quantize_each(choices, quantizer, changed.put)
    coverage.warn()
    return _result(changed.model, reports, coverage)


class _Calibrated:
    """Calibrated layers, each held until it is asked for, and the others without."""

    def __init__(
        self,
        kernel: Callable[[Choice], Array],
        without: Callable[[Choice], tuple[QuantizedTensor, LayerReport]],
    ) -> None:
        self.kernel, self._without = kernel, without
        self._known: dict[str, tuple[QuantizedTensor, LayerReport]] = {}

    def is_kept(self, choice: Choice) -> bool:
        return False

    def kept(self, choice: Choice) -> QuantizedTensor | None:
        return None

    def keep(
        self, choice: Choice, tensor: QuantizedTensor, report: LayerReport
    ) -> None:
        self._known[choice.path] = tensor, report

    def __call__(self, choice: Choice) -> tuple[QuantizedTensor, LayerReport]:
        return self._known.pop(choice.path, None) or self._without(choice)


def _result(
    model: Any, reports: dict[str, LayerReport], coverage: Coverage
) -> QuantizedModel:
    result = QuantizedModel(model, reports)
    result.coverage = coverage
    return result


class _Replacing:
    """A model some of whose layers are packed, and the matrices of all others."""

    def __init__(
        self, model: Any, groups: Mapping[str, Group], rules: Rules | None
    ) -> None:
        self.model, self._groups = model, groups
        found = find_targets(model, rules)
        self._targets = {each.candidate.paths[0]: each for each in found}
        self._known: Inputs = {}

    def kernel(self, choice: Choice) -> Array:
        """The dense matrix."""
        return self._targets[choice.path].matrix()

    def put(self, choice: Choice, tensor: QuantizedTensor) -> None:
        """Puts a packed matrix in the place of a dense one, which is let go."""
        target = self._targets.pop(choice.path)
        if target.places:
            put_params(target, tensor)
            return
        packed = pack(tensor, self._known, self._groups.get(choice.path))
        self.model = put_layers(target, packed, self.model)


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
    targets = find_targets(model, rules)
    choices = _choices(targets, config, rules, select)
    return make_plan(choices, *_others(model, targets))


def selected_kernels(
    model: nnx.Module,
    select: Select = default_select,
    *,
    rules: Rules | None = None,
) -> dict[str, Float[Array, "m n"]]:
    """Kernels of the selected layers by path, in a fixed order, as `[in, out]`.

    Args:
      model: Not changed.
      select: Called with paths; false leaves a layer out.
      rules: As for `quantize_model`; methods do not matter.

    Raises:
      UsageError: If nothing is selected, or a selected kernel is not a matrix.
    """
    targets = find_targets(model, rules)
    choices = _choices(targets, None, rules, select)
    kernels = {
        choice.path: target.matrix()
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


def replace_kernels(
    model: Model, kernels: Mapping[str, Array], *, rules: Rules | None = None
) -> Model:
    """A copy of the model with other dense kernels; the rest is shared.

    Args:
      model: Not changed.
      kernels: By path, as `[in, out]`: those that `selected_kernels` gives.
      rules: As for `selected_kernels`.

    Raises:
      ValueError: If a path names no kernel of the model, or one of another shape.
    """
    graphdef, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    paths = {join(parts[:-1]): parts for parts in flat if parts[-1] == "kernel"}
    targets = [each.candidate for each in find_targets(model, rules)]
    known = {path: each for each in targets for path in each.paths}
    paths |= {join(parts): parts for parts in flat if join(parts) in known}
    for path, kernel in kernels.items():
        if path not in paths:
            raise ValueError(
                f"`{path}` is no layer with a kernel. `selected_kernels` lists paths "
                "of this model's linears."
            )
        variable = flat[paths[path]]
        axes = known[path].axes if path in known else None
        shape = variable.get_value().shape if axes is None else known[path].shape
        if kernel.shape != shape:
            raise ValueError(
                f"`{path}/kernel` has shape {shape}; the new one has {kernel.shape}. "
                "Give kernels as [in, out]."
            )
        whole = kernel if axes is None else axes.from_matrix(kernel)
        flat[paths[path]] = variable.replace(whole)
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _choices(
    targets: list[Target],
    config: Method | None,
    rules: Rules | None,
    select: Select | None,
) -> list[Choice]:
    candidates = (target.candidate for target in targets)
    return choose_methods(candidates, config, rules, select, what="layers")


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
