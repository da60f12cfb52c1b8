"""What becomes of every tensor of a checkpoint: packed, or copied as it is."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kashin_jax.errors import UsageError
from kashin_jax.io import (
    Checkpoint,
    PlannedTensor,
    TensorSpec,
    plan_packed,
    plan_plain,
)
from kashin_jax.methods import Method, encode
from kashin_jax.pipeline.names import LayerName, layer_names
from kashin_jax.pipeline.rules import Rules
from kashin_jax.pipeline.sharing import Group, Reader, find_groups

__all__ = ["LayerPlan", "Plan", "plan_checkpoint", "refuse_foreign"]

_FLOATS = frozenset({"float32", "bfloat16", "float16"})


class LayerPlan(NamedTuple):
    """A matrix that will be quantized.

    Attributes:
      path: Of its layer; its key is folded from it.
      is_transposed: Whether it is stored as `[out, in]`.
      config: The method.
    """

    path: str
    is_transposed: bool
    config: Method


class Plan(NamedTuple):
    """All tensors in the order of the source.

    Attributes:
      tensors: As they will be stored.
      layers: Those to quantize, by stored name.
      groups: Of layers that read the same input, by path of every layer in one.
    """

    tensors: tuple[PlannedTensor, ...]
    layers: Mapping[str, LayerPlan]
    groups: Mapping[str, Group]


def plan_checkpoint(source: Checkpoint, rules: Rules) -> Plan:
    """Applies rules to every matrix of a checkpoint; quantizes and reads nothing.

    Matrices are the floating-point tensors of two axes named `weight` or `kernel`.

    Raises:
      UsageError: If the checkpoint is quantized already, a rule matches nothing, a
        method cannot code a matrix of that shape, or nothing is to be quantized.
      CheckpointError: If `config.json` is not what its architecture needs.
    """
    refuse_foreign(source)
    if source.descriptions:
        raise UsageError(
            f"{source.directory}: is quantized already; name the original checkpoint, "
            "or undo it with `kashin dequantize`."
        )
    where = str(source.directory / "config.json")
    named = layer_names(source.names(), source.config, where)
    layers = {
        name: found
        for name, found in named.items()
        if source.spec(name).dtype in _FLOATS and _is_matrix(source.spec(name))
    }
    rules.check([found.path for found in layers.values()])
    chosen = {name: _chosen(found, rules) for name, found in layers.items()}
    plans = {name: plan for name, plan in chosen.items() if plan is not None}
    if not plans:
        raise UsageError(
            f"{source.directory}: the rules quantize none of {len(layers)} matrices; "
            "change them."
        )
    tensors = tuple(_planned(source, name, plans.get(name)) for name in source.names())
    readers = (
        Reader(each.path, each.config, (_inputs(source.spec(name), each),))
        for name, each in plans.items()
    )
    return Plan(tensors, plans, find_groups(readers, rules))


def refuse_foreign(checkpoint: Checkpoint) -> None:
    """Raises UsageError if another library quantized a checkpoint."""
    method = (checkpoint.quantization or {}).get("quant_method", "kashin")
    if method != "kashin":
        raise UsageError(
            f"{checkpoint.directory}: is quantized by the method {str(method)[:40]!r} "
            "of another library; name the original checkpoint."
        )


def _is_matrix(spec: TensorSpec) -> bool:
    return len(spec.shape) == 2 and 0 not in spec.shape


def _inputs(spec: TensorSpec, plan: LayerPlan) -> int:
    return spec.shape[1 if plan.is_transposed else 0]


def _chosen(found: LayerName, rules: Rules) -> LayerPlan | None:
    config = rules.config_for(found.path)
    return None if config is None else LayerPlan(*found, config)


def _planned(source: Checkpoint, name: str, plan: LayerPlan | None) -> PlannedTensor:
    spec = source.spec(name)
    if plan is None:
        return plan_plain(name, spec.dtype, spec.shape)
    rows, columns = spec.shape
    shape = (columns, rows) if plan.is_transposed else (rows, columns)
    try:
        packed = _packed_shape(shape, spec.dtype, plan.config)
    except ValueError as error:
        raise UsageError(f"`{name}`: {error}") from error
    return plan_packed(name, packed, is_transposed=plan.is_transposed)


@functools.lru_cache(maxsize=256)
def _packed_shape(shape: tuple[int, int], dtype: str, config: Method) -> Any:
    matrix = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda w, k: encode(w, k, config)[0], matrix, key)
