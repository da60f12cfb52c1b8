"""Whole NNX models: the dense layers of a plan replaced by packed ones."""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
from flax import nnx
from jaxtyping import Array, Float, Key
from tqdm import tqdm

from kashin_jax.errors import UsageError
from kashin_jax.layers.packed import Inputs, pack
from kashin_jax.methods import Method, QuantizationReport
from kashin_jax.methods.stacks import quantize_stack
from kashin_jax.pipeline.paths import join
from kashin_jax.pipeline.plan import Plan, make_plan
from kashin_jax.pipeline.policy import (
    Choice,
    Policy,
    Select,
    choose_methods,
    default_select,
    make_policy,
)
from kashin_jax.pipeline.report import LayerReport, run_layer, warn_of_outliers
from kashin_jax.pipeline.rules import Rules
from kashin_jax.pipeline.sharing import InputScales, chosen_groups, layer_key
from kashin_jax.pipeline.targets import Target, find_targets, other_bytes, put
from kashin_jax.tensors import QuantizedTensor

__all__ = [
    "QuantizedModel",
    "plan_model",
    "quantize_model",
    "replace_kernels",
    "selected_kernels",
]

Model = TypeVar("Model", bound=nnx.Module)
QuantizeLayer = Callable[[str, Array], tuple[QuantizedTensor, QuantizationReport]]


class QuantizedModel(NamedTuple):
    """A model with packed layers, and what each of them lost.

    Attributes:
      model: Shares every other parameter with the model it was made from.
      reports: By path of the layer, such as `decoder/layers/0/fc1`.
    """

    model: Any
    reports: dict[str, LayerReport]


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

    Every `nnx.Linear` becomes a `QuantizedLinear`, output heads apart; with rules,
    those that they say, and an `nnx.Embed` that one of them names becomes a
    `QuantizedEmbed`.
    Norms and everything that is not exactly of these types stay as they are. Of a stack
    of kernels, as `nnx.vmap` and `nnx.scan` make them, every matrix is quantized alone,
    with a key folded from its index too, and the layer holds a stack again. Each
    matrix has a key folded from its path, so adding a layer leaves the codes of the
    others unchanged; the layers of a group of `rules.share` have a key and a scale of
    inputs in common, and the variables of what is done to their input, which under one
    `jit` is then done once. A matrix that several layers share is quantized once and
    stays shared; where one of them is to stay, or something else reads it, all stay.
    Layers that lost much more than others are named in a logged warning, see
    `outliers`.

    Args:
      model: Not changed, unless `in_place`.
      config: The method; None takes that of the rules, or joint coding at 4 bits.
      key: Root key; `jax.random.key(0)` when None.
      rules: A method for each layer.
      select: Called with paths; false leaves a layer out. None takes every linear but
        those of the output head, or what the rules say.
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
        print(plan_model(model, config, rules=rules, select=select))
        return QuantizedModel(model, {})
    root = jax.random.key(0) if key is None else key
    choices = _choices(find_targets(model), make_policy(config, rules, select))
    if quantize_layer is None:
        # Methods that cannot code a matrix say so before hours of work, not after.
        make_plan(choices, 0)
    methods = {c.path: c.config for c in choices if c.config is not None}
    result = model if in_place else nnx.clone(model, variables=False)
    pending = deque(
        target
        for target in find_targets(result)
        if target.candidate.paths[0] in methods
    )

    def kernel_of(path: str) -> Array:
        (target,) = (each for each in pending if each.candidate.paths[0] == path)
        return target.variable.get_value()

    groups = chosen_groups(choices, rules)
    scales = InputScales(groups, kernel_of)

    def run(path: str, kernel: Array) -> tuple[Any, LayerReport]:
        if quantize_layer is not None:
            return run_layer(lambda: quantize_layer(path, kernel), None)
        method, own = methods[path], layer_key(root, path, groups)
        return run_layer(
            lambda: quantize_stack(
                kernel, method, own, path=path, in_scale=scales(path)
            ),
            method,
        )

    result, reports = _replace_each(result, pending, run)
    warn_of_outliers(reports)
    return QuantizedModel(result, reports)


def _replace_each(
    model: Any,
    pending: deque[Target],
    run: Callable[[str, Array], tuple[Any, LayerReport]],
) -> tuple[Any, dict[str, LayerReport]]:
    """Changes the model; a target is let go before the next one is quantized."""
    reports, known = {}, Inputs()
    progress = tqdm(
        total=len(pending), desc="layers", unit="layer", disable=None, leave=False
    )
    with progress:
        while pending:
            # Still pending while it is quantized: others may want to see its kernel.
            target = pending[0]
            path = target.candidate.paths[0]
            tensor, reports[path] = run(path, target.variable.get_value())
            packed = pack(tensor, known)
            for layer in target.layers:
                new = put(layer, packed)
                model = new if layer.node is model else model
            pending.popleft()
            del target, layer
            progress.update()
    return model, reports


def plan_model(
    model: nnx.Module,
    config: Method | None = None,
    *,
    rules: Rules | None = None,
    select: Select | None = None,
) -> Plan:
    """What `quantize_model` would do with these arguments; print it for a table.

    Raises:
      UsageError: As `quantize_model`.
    """
    targets = find_targets(model)
    choices = _choices(targets, make_policy(config, rules, select))
    return make_plan(choices, other_bytes(model, targets))


def selected_kernels(
    model: nnx.Module, select: Select = default_select
) -> dict[str, Float[Array, "m n"]]:
    """Kernels of the selected `nnx.Linear` layers by path, in a fixed order.

    Raises:
      UsageError: If nothing is selected, or a selected kernel is not a matrix.
    """
    targets = find_targets(model)
    choices = _choices(targets, make_policy(None, None, select))
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


def _choices(targets: list[Target], policy: Policy) -> list[Choice]:
    candidates = (target.candidate for target in targets)
    return choose_methods(candidates, policy, what="nnx.Linear layers")
