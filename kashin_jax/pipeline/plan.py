"""What quantizing a model would do and what it would take: computed, not tried."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kashin_jax.errors import UsageError
from kashin_jax.io import PlannedTensor
from kashin_jax.methods import Method, encode, encode_few_values
from kashin_jax.models.tensor_roles import default_kind, is_outer
from kashin_jax.pipeline.coverage import Coverage, Part, cover
from kashin_jax.pipeline.rules import Rule, Rules, resolve_rules
from kashin_jax.pipeline.table import aligned
from kashin_jax.tensors import KernelAxes, stored_bits

__all__ = [
    "ADDED",
    "Candidate",
    "Choice",
    "LayerPlan",
    "Plan",
    "Select",
    "axes_by_rules",
    "choose_methods",
    "make_plan",
    "method_name",
    "packed_shape",
    "packed_size",
    "part_of",
]

Select = Callable[[str], bool]

ADDED = frozenset({"bias", "scale"})
"""Names of what is added or scaled by: attention has biases of two axes."""


class Candidate(NamedTuple):
    """A matrix of a model that could be quantized.

    Attributes:
      paths: Paths of all layers that use it; the first one names it.
      shape: Shape as `[in, out]`, after the axes of a stack; an array that stays need
        not be a matrix.
      dtype: Its type.
      only_by_rule: Whether it is left alone unless a rule names it.
      left: Why it stays, whatever is asked for; None if it need not.
      stored_name: What a checkpoint calls it; None for models in memory.
      is_transposed: Whether a checkpoint stores it as `[out, in]`.
      axes: Of a model in memory, which axes of the array are inputs; None where that is
        not known, or the array stays.
      original: Shape of the array, where it differs.
      kind: What it is by the table of its family; None where that says nothing.
    """

    paths: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    only_by_rule: bool = False
    left: str | None = None
    stored_name: str | None = None
    is_transposed: bool = False
    axes: KernelAxes | None = None
    original: tuple[int, ...] | None = None
    kind: str | None = None


class Choice(NamedTuple):
    """The decision about one matrix: a method, or the reason why it stays.

    Attributes:
      candidate: The matrix.
      config: The method; None for full precision.
      reason: Why it stays in full precision; None if it does not.
    """

    candidate: Candidate
    config: Method | None
    reason: str | None

    @property
    def path(self) -> str:
        """The layer that keys are folded from."""
        return self.candidate.paths[0]

    @property
    def name(self) -> str:
        """The name of the matrix in messages: as in the checkpoint, or its path."""
        return self.candidate.stored_name or self.path


class LayerPlan(NamedTuple):
    """The decision about one matrix, and the bytes that it will take.

    Attributes:
      choice: The matrix and its method.
      packed: The packed matrix, of a stack each, with shapes and types in the place of
        its arrays; None in full precision.
    """

    choice: Choice
    packed: Any

    @property
    def stored_bits(self) -> int:
        """Bits that the matrix will take; in full precision, those of its type."""
        if self.packed is None:
            return _dense_bits(self.choice.candidate)
        return math.prod(self.choice.candidate.shape[:-2]) * stored_bits(self.packed)

    @property
    def bytes_before(self) -> int:
        return _dense_bits(self.choice.candidate) // 8

    @property
    def bytes_after(self) -> int:
        return self.stored_bits // 8

    @property
    def bits_per_weight(self) -> float:
        return self.stored_bits / max(math.prod(self.choice.candidate.shape), 1)


class Plan(NamedTuple):
    """The decisions about all matrices of a model; printed, it is a table.

    Attributes:
      layers: Every matrix that could be quantized, or might be expected to.
      other_bytes: Size of all other parameters: norms, biases.
      tensors: What a checkpoint will hold, in the order of its source; empty for
        models in memory.
      other_weights: The number of all other parameters.
    """

    layers: tuple[LayerPlan, ...]
    other_bytes: int
    tensors: tuple[PlannedTensor, ...] = ()
    other_weights: int = 0

    @property
    def coverage(self) -> Coverage:
        """How much will be packed, and what stays."""
        parts = (part_of(layer.choice) for layer in self.layers)
        return cover(parts, self.other_weights, self.other_bytes)

    @property
    def quantized(self) -> tuple[LayerPlan, ...]:
        """The matrices that will be packed."""
        return tuple(each for each in self.layers if each.choice.config is not None)

    @property
    def bits_per_weight(self) -> float:
        """Stored, over all matrices that will be packed."""
        weights = sum(math.prod(e.choice.candidate.shape) for e in self.quantized)
        return sum(each.stored_bits for each in self.quantized) / max(weights, 1)

    @property
    def bytes_before(self) -> int:
        """Bytes of all parameters now."""
        return self.other_bytes + sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of all parameters as they will be stored."""
        return self.other_bytes + sum(layer.bytes_after for layer in self.layers)

    def __str__(self) -> str:
        header = ("layer", "shape", "method", "bits/weight", "bytes before", "after")
        rows = [_row(layer) for layer in self.layers]
        rest = f"{self.other_bytes:,}"
        rows.append(("other parameters", "", "", "", rest, rest))
        totals = f"{self.bytes_before:,}", f"{self.bytes_after:,}"
        packed = f"total, {len(self.quantized)} packed"
        rows.append((packed, "", "", f"{self.bits_per_weight:.3f}", *totals))
        return f"{aligned([header, *rows], left=3)}\n{self.coverage}"


def choose_methods(
    candidates: Iterable[Candidate],
    config: Method | None,
    rules: Rules | None,
    select: Select | None,
    *,
    what: str,
) -> list[Choice]:
    """Decides about every matrix.

    Args:
      candidates: In the order of the table.
      config: The method; None takes that of the rules.
      rules: A method for each layer; None takes `Rules(config=config)`.
      select: Layers to leave out where it is false. What the rules leave out, it
        cannot bring back.
      what: What can be quantized, in messages: `kernels`.

    Raises:
      UsageError: If a rule matches nothing, nothing is chosen, a chosen matrix cannot
        be quantized, or layers that share a matrix have different methods.
    """
    known = list(candidates)
    meant = resolve_rules(config, rules)
    possible = [each for each in known if each.left is None]
    _check_named(meant, known)
    _check_axes(meant, possible)
    meant.check(path for each in possible for path in each.paths)

    def decide(path: str, each: Candidate) -> tuple[Method | None, str]:
        if each.only_by_rule and not meant.names(path):
            return None, "no rule names it"
        if select is not None and not select(path):
            return None, "not selected"
        return meant.decide(path, each.kind)

    choices = [_choose(each, decide) for each in known]
    if all(choice.config is None for choice in choices):
        count = sum(len(each.paths) for each in possible if not each.only_by_rule)
        if not known:
            raise UsageError(f"There are no {what}: nothing is to be quantized.")
        given = "the rules quantize none; change them"
        if select is not None:
            given = "`select` takes none that the rules do not leave out; change them"
        raise UsageError(f"Of {count} {what} {given}.{_left(choices)}")
    return choices


def part_of(choice: Choice) -> Part:
    """The matrix as `Coverage` counts it."""
    each = choice.candidate
    return Part(
        choice.name,
        each.shape,
        _dense_bits(each) // 8,
        choice.reason if choice.config is None else None,
        any(is_outer(each.kind or default_kind(path)) for path in each.paths),
    )


def _left(choices: Sequence[Choice]) -> str:
    """Names the largest matrices that cannot be quantized, with the reasons."""
    found = [part_of(each) for each in choices if each.candidate.left is not None]
    found.sort(key=lambda part: -part.weights)
    return f" Not among them: {'; '.join(map(str, found[:3]))}." if found else ""


def _check_named(rules: Rules, known: Sequence[Candidate]) -> None:
    """Raises UsageError if a rule asks for nothing but what has to stay."""
    for rule in rules.rules:
        if rule.config is None:
            continue
        named = [(each, p) for each in known for p in each.paths if rule.matches(p)]
        if named and all(each.left is not None for each, _ in named):
            each, path = named[0]
            raise UsageError(
                f"Rule {rule.pattern!r} names `{path}`, which has to stay: "
                f"{each.left}. Remove the rule{_remedy(rule, each)}."
            )


def _remedy(rule: Rule, each: Candidate) -> str:
    if rule.contract is not None or each.stored_name is not None:
        return ""
    return ", or name the axes of its inputs by `contract`"


def _axes_by_rule(rule: Rule, path: str, shape: Sequence[int]) -> KernelAxes:
    """Which axes of an array are inputs, by a rule that says so.

    Raises:
      UsageError: If the array has not these axes; names the rule and the path.
    """
    assert rule.contract is not None, "callers look for rules with axes"
    try:
        return KernelAxes.of(shape, rule.contract, rule.stack)
    except ValueError as error:
        stack = f" and `stack`={list(rule.stack)}" if rule.stack else ""
        raise UsageError(
            f"Rule {rule.pattern!r}: `contract`={list(rule.contract)}{stack} does not "
            f"suit `{path}`: {error}."
        ) from None


def axes_by_rules(
    rules: Rules | None, paths: Sequence[str], shape: Sequence[int]
) -> KernelAxes | None:
    """Which axes of an array are inputs, by the first rule that says so; None without.

    Args:
      rules: What a caller asked for.
      paths: All places where the array is read.
      shape: Shape of the array.

    Raises:
      UsageError: If the array has not the axes that the rule names.
    """
    for path in paths:
        rule = None if rules is None else rules.rule_for(path)
        if rule is not None and rule.contract is not None:
            return _axes_by_rule(rule, path, shape)
    return None


def _check_axes(rules: Rules, possible: Sequence[Candidate]) -> None:
    """Raises UsageError if a rule names other inputs than a layer is known to have."""
    for each in possible:
        for path in each.paths:
            rule = rules.rule_for(path)
            if rule is None or rule.contract is None:
                continue
            if each.axes is None:
                raise UsageError(
                    f"Rule {rule.pattern!r} has a `contract`, and which axes of "
                    f"`{path}` are inputs is known. Leave `contract` out."
                )
            shape = each.original or each.shape
            if _axes_by_rule(rule, path, shape) != each.axes:
                ndim, own = len(shape), each.axes
                found = [axis + ndim - len(own.shape) for axis in own.inputs]
                raise UsageError(
                    f"Rule {rule.pattern!r}: `contract`={list(rule.contract)}, but "
                    f"`{path}` sums over axes {found} of {ndim}. Leave `contract` out."
                )


def _choose(
    each: Candidate, decide: Callable[[str, Candidate], tuple[Method | None, str]]
) -> Choice:
    if each.left is not None:
        return Choice(each, None, each.left)
    found = {path: decide(path, each) for path in each.paths}
    kept = [path for path, (config, _) in found.items() if config is None]
    if kept:
        # What shares a matrix stays together: all packed, or none.
        alone = len(kept) == len(found)
        return Choice(each, None, found[kept[0]][1] if alone else f"tied to {kept[0]}")
    configs = {config for config, _ in found.values()}
    if len(configs) > 1:
        raise UsageError(
            f"`{'` and `'.join(each.paths)}` share one matrix, but the rules give "
            f"{len(configs)} methods for it. Give one."
        )
    return Choice(each, configs.pop(), None)


def make_plan(
    choices: Sequence[Choice],
    other_bytes: int,
    other_weights: int = 0,
    has_few_values: Callable[[Choice], bool] | None = None,
) -> Plan:
    """Adds sizes, those of the arrays that the coder would return: nothing is coded.

    A matrix that would take more than it does now stays.

    Args:
      choices: In the order of the table.
      other_bytes: Size of all other parameters.
      other_weights: The number of those.
      has_few_values: Whether a matrix will be coded by `encode_few_values`; None where
        nothing is known of values, and sizes are those of other matrices.

    Raises:
      UsageError: If a method cannot code a matrix, or all would grow; names it.
    """
    few = has_few_values or (lambda choice: False)
    layers = tuple(_planned(choice, few) for choice in choices)
    asked = [choice.config is not None for choice in choices]
    if any(asked) and all(layer.packed is None for layer in layers):
        grown = layers[asked.index(True)].choice
        raise UsageError(
            f"`{grown.name}` {grown.reason}, and nothing else is to be quantized; give "
            "another method."
        )
    return Plan(layers, other_bytes, other_weights=other_weights)


def packed_shape(
    shape: tuple[int, int], dtype: str, config: Method, *, few_values: bool = False
) -> Any:
    """The packed matrix with shapes and types in the place of its arrays.

    Args:
      shape: Shape of the matrix, `[in, out]`.
      dtype: Its type.
      config: The method.
      few_values: Whether it will be coded by `encode_few_values`.

    Raises:
      ValueError: If the method cannot code such a matrix.
    """
    config.check(shape)
    # NumPy's float64 becomes float32 on its way into JAX.
    kind = jax.dtypes.canonicalize_dtype(dtype).name
    return _packed_shape(shape, kind, config, few_values)


def packed_size(shape: tuple[int, int], dtype: str, config: Method) -> int:
    """Bits that a packed matrix will take; arguments and errors of `packed_shape`."""
    return stored_bits(packed_shape(shape, dtype, config))


@functools.lru_cache(maxsize=256)
def _packed_shape(
    shape: tuple[int, int], dtype: str, config: Method, few_values: bool
) -> Any:
    matrix = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    key = jax.eval_shape(lambda: jax.random.key(0))
    if few_values:
        values = jax.ShapeDtypeStruct((1,), jnp.float32)
        return jax.eval_shape(
            lambda w, v, k: encode_few_values(w, v, k, config)[0], matrix, values, key
        )
    return jax.eval_shape(lambda w, k: encode(w, k, config)[0], matrix, key)


def _planned(choice: Choice, has_few_values: Callable[[Choice], bool]) -> LayerPlan:
    if choice.config is None:
        return LayerPlan(choice, None)
    m, n = choice.candidate.shape[-2:]
    try:
        few = has_few_values(choice)
        packed = packed_shape(
            (m, n), choice.candidate.dtype, choice.config, few_values=few
        )
    except ValueError as error:
        raise UsageError(f"`{choice.name}`: {str(error).splitlines()[0]}") from None
    plan = LayerPlan(choice, packed)
    if plan.stored_bits <= (dense := _dense_bits(choice.candidate)):
        return plan
    after, before = -(-plan.stored_bits // 8), dense // 8
    reason = f"would take {after:,} bytes packed and has {before:,}"
    return LayerPlan(choice._replace(config=None, reason=reason), None)


def method_name(config: Method) -> str:
    """`kashin-joint 4`: the method and its width."""
    return f"{config.name} {config.bits}"


def _dense_bits(each: Candidate) -> int:
    return 8 * math.prod(each.shape) * jnp.dtype(each.dtype).itemsize


def _row(layer: LayerPlan) -> Iterable[str]:
    candidate, config, reason = layer.choice
    shape = " x ".join(map(str, candidate.shape))
    if candidate.original is not None:
        shape += f" of {' x '.join(map(str, candidate.original))}"
    return (
        " = ".join(candidate.paths),
        shape,
        f"stays: {reason}" if config is None else method_name(config),
        f"{layer.bits_per_weight:.3f}",
        f"{layer.bytes_before:,}",
        f"{layer.bytes_after:,}",
    )
