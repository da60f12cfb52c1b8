"""What quantizing a checkpoint would do: which tensors, and how they are stored."""

import itertools
import math
import re
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.io import (
    Checkpoint,
    PlannedTensor,
    TensorSpec,
    plan_packed,
    plan_plain,
)
from kashin_jax.methods import distinct_values
from kashin_jax.models.registry import tied_copy
from kashin_jax.models.tensor_roles import is_bias, tensor_roles
from kashin_jax.pipeline.plan import (
    Candidate,
    Choice,
    LayerPlan,
    Plan,
    choose_methods,
    make_plan,
)
from kashin_jax.pipeline.rules import Rules
from kashin_jax.pipeline.sharing import find_groups

__all__ = [
    "check_copy",
    "is_float",
    "plan_checkpoint",
    "refuse_foreign",
    "stored_kernel",
    "stored_matrix",
    "stored_tensor",
]

_FLOATS = frozenset({"float32", "bfloat16", "float16"})
# Of a table that is compared with another one.
_ROWS = 4096


def plan_checkpoint(source: Checkpoint, rules: Rules | None = None) -> Plan:
    """Applies rules to every matrix of a checkpoint; quantizes nothing.

    Of a matrix it reads as many rows as show that its values are many, usually one.

    Matrices are the floating-point tensors of two axes named `weight`, `kernel` or
    `embedding`, and stacks of experts, of three axes, of which every matrix is coded
    alone; other arrays of two axes and more stay, and the plan says why. A head
    that is stored beside the embedding it is tied to is left out: rules that name
    either are about the embedding.

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
    rules = Rules() if rules is None else rules
    candidates = _candidates(source, rules)
    what = f"matrices of {source.directory}"
    choices = choose_methods(candidates, None, rules, None, what=what)
    matrices = {each.stored_name for each in candidates}
    stored = _without_copy(source)
    others = [source.spec(name) for name in stored if name not in matrices]
    plan = make_plan(
        choices,
        sum(spec.size for spec in others),
        sum(math.prod(spec.shape) for spec in others if is_float(spec.dtype)),
        _has_few_values(source, find_groups(choices, rules)),
    )
    packed = {layer.choice.name: layer for layer in plan.quantized}
    tensors = (stored_tensor(source, name, packed.get(name)) for name in stored)
    return plan._replace(tensors=tuple(tensors))


def refuse_foreign(checkpoint: Checkpoint) -> None:
    """Raises UsageError if another library quantized a checkpoint."""
    method = (checkpoint.quantization or {}).get("quant_method", "kashin")
    if method != "kashin":
        raise UsageError(
            f"{checkpoint.directory}: is quantized by the method {str(method)[:40]!r} "
            "of another library; name the original checkpoint."
        )


def _without_copy(source: Checkpoint) -> list[str]:
    """Names of all tensors but a tied head, which the embedding stands for."""
    copy = tied_copy(source.names(), source.config)
    return [name for name in source.names() if copy is None or name != copy.head]


def _candidates(source: Checkpoint, rules: Rules) -> list[Candidate]:
    found = []
    copy = tied_copy(source.names(), source.config)
    roles = tensor_roles(source.config)
    for name in _without_copy(source):
        spec = source.spec(name)
        if len(spec.shape) < 2 or 0 in spec.shape or not is_float(spec.dtype):
            continue
        if is_bias(name):
            continue
        role = roles.of(name, spec.shape)
        *stack, m, n = spec.shape
        paths: tuple[str, ...] = (role.path,)
        if copy is not None and name == copy.embedding:
            head = roles.of(copy.head, source.spec(copy.head).shape).path
            paths = _named((role.path, head), rules) or paths
        found.append(
            Candidate(
                paths=paths,
                shape=(*stack, *((n, m) if role.is_transposed else (m, n))),
                dtype=spec.dtype,
                left=_why_left(spec, is_layer=role.is_matrix),
                stored_name=name,
                is_transposed=role.is_transposed,
                kind=role.kind if role.by_table else None,
            )
        )
    return found


def _named(paths: tuple[str, ...], rules: Rules) -> tuple[str, ...]:
    """The paths that a rule or a pattern to skip is about."""

    def is_named(path: str) -> bool:
        skipped = any(re.search(pattern, path) for pattern in rules.skip)
        return skipped or rules.names(path)

    return tuple(filter(is_named, paths))


def _has_few_values(
    source: Checkpoint, groups: Collection[str]
) -> Callable[[Choice], bool]:
    """Whether matrices that share no scale have no more values than codes."""

    def few(choice: Choice) -> bool:
        config, name = choice.config, choice.name
        if config is None or choice.path in groups or not config.most_values:
            return False
        count, most = source.spec(name).shape[0], config.most_values
        file = source.file_of(name)
        if len(choice.candidate.shape) > 2:
            each = (file.read_rows(name, i, i + 1) for i in range(count))
            return all(distinct_values([part], most) is not None for part in each)
        chunks = (_rows(source, name, start) for start in range(0, count, _ROWS))
        # The first row alone tells of almost every matrix that its values are many.
        parts = itertools.chain([file.read_rows(name, 0, 1)], chunks)
        return distinct_values(parts, most) is not None

    return few


def check_copy(source: Checkpoint) -> None:
    """Raises CheckpointError if a head to be left out is not the tied embedding."""
    if (copy := tied_copy(source.names(), source.config)) is None:
        return
    head, embedding = source.spec(copy.head).shape, source.spec(copy.embedding).shape
    if copy.head.endswith("kernel"):
        is_same = head == embedding[::-1] and np.array_equal(
            np.asarray(source.load(copy.head)).T,
            np.asarray(source.load(copy.embedding)),
        )
    else:
        is_same = head == embedding and all(
            np.array_equal(
                _rows(source, copy.head, start), _rows(source, copy.embedding, start)
            )
            for start in range(0, head[0], _ROWS)
        )
    if not is_same:
        raise CheckpointError(
            f"{source.directory}: `{copy.head}` differs from the token embedding that "
            "config.json ties it to; set `tie_word_embeddings` to false there."
        )


def _rows(source: Checkpoint, name: str, start: int) -> Shaped[np.ndarray, "..."]:
    file = source.file_of(name)
    return file.read_rows(name, start, min(start + _ROWS, file.spec(name).shape[0]))


def is_float(dtype: str) -> bool:
    """Whether NumPy's name of a type is that of a floating-point one."""
    return dtype.startswith(("float", "bfloat"))


def _why_left(spec: TensorSpec, *, is_layer: bool) -> str | None:
    if spec.dtype not in _FLOATS:
        return f"its type is {spec.dtype}; {', '.join(sorted(_FLOATS))} are quantized"
    if is_layer:
        return None
    if len(spec.shape) != 2:
        return f"has {len(spec.shape)} axes"
    return "is not called weight, kernel or embedding"


def stored_tensor(
    source: Checkpoint, name: str, plan: LayerPlan | None
) -> PlannedTensor:
    """How a tensor is stored: as it is, or packed by a plan."""
    if plan is None:
        spec = source.spec(name)
        return plan_plain(name, spec.dtype, spec.shape)
    candidate = plan.choice.candidate

    def stacked(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = (*candidate.shape[:-2], *leaf.shape)
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    packed = jax.tree.map(stacked, plan.packed)
    return plan_packed(name, packed, is_transposed=candidate.is_transposed)


def stored_kernel(source: Checkpoint, choice: Choice) -> Array:
    """The matrix of a layer as `[in, out]`, or a stack of them."""
    return stored_matrix(source, choice.name, choice.candidate.is_transposed)


def stored_matrix(source: Checkpoint, name: str, is_transposed: bool) -> Array:
    """A tensor that is not packed as `[in, out]`, or a stack of them."""
    stored = source.load(name)
    assert isinstance(stored, np.ndarray)
    return jnp.asarray(stored.swapaxes(-1, -2) if is_transposed else stored)
