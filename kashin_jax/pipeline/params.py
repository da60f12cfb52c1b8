"""Parameter trees, of Linen models or of none: matrices replaced by packed ones."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jaxtyping import Array, Key, PyTree

from kashin_jax.errors import UsageError
from kashin_jax.layers.contraction import Contraction
from kashin_jax.layers.linen import kernel_readers
from kashin_jax.methods import Method
from kashin_jax.pipeline.coverage import Coverage
from kashin_jax.pipeline.paths import join, natural
from kashin_jax.pipeline.plan import (
    ADDED,
    Candidate,
    Choice,
    Plan,
    Select,
    axes_by_rules,
    choose_methods,
    make_plan,
)
from kashin_jax.pipeline.report import LayerReport
from kashin_jax.pipeline.rules import Rules
from kashin_jax.pipeline.run import LayerQuantizer, quantize_each
from kashin_jax.tensors import KernelAxes, PackedArray, QuantizedTensor, dequantize

__all__ = ["QuantizedParams", "dequantize_params", "plan_params", "quantize_params"]


class _Pair(NamedTuple):
    params: Any
    reports: dict[str, LayerReport]


class QuantizedParams(_Pair):
    """Parameters with packed matrices, and what each of them lost.

    Attributes:
      params: Has a packed tensor in the place of each quantized leaf and shares the
        others with the tree it was made from.
      reports: By path of the layer, such as `Dense_0`.
      coverage: How much was quantized, and what was not. No item of the tuple, so that
        it can still be unpacked into two.
    """

    coverage: Coverage


class _Leaf(NamedTuple):
    # One array of the tree, and all its places in the order of the leaves.
    candidate: Candidate
    value: Any
    places: tuple[int, ...]


def quantize_params(
    params: PyTree[Any],
    config: Method | None = None,
    key: Key[Array, ""] | None = None,
    *,
    rules: Rules | None = None,
    select: Select | None = None,
    stacks: Sequence[str] = (),
    call: Callable[[Any], Any] | None = None,
    dry_run: bool = False,
) -> QuantizedParams:
    """Replaces matrices of any tree of parameters by packed ones.

    Paths leave out the collection `params` and, for matrices called `kernel`, that
    name: `{"params": {"Dense_0": {"kernel": ...}}}` has the layer `Dense_0`. Kernels
    that the rules do not leave out are quantized. A matrix of another name, such as
    `Embed_0/embedding`, needs a rule that names it.

    How kernels of more than two axes are to be read as matrices is not in the tree.
    Those of `nn.DenseGeneral`, `nn.MultiHeadDotProductAttention`, `nn.Einsum` and
    `nn.Conv` stay unless `call` shows what reads them, or a rule names their inputs by
    `contract`; layers under `nn.scan` stay unless `stacks` names them.

    Flat dicts with tuples as keys are taken, too, and of Linen's boxes
    (`nn.with_partitioning`) what is in them. A packed tensor takes the place of array
    or box, and a `PackedArray` that of a kernel that is not `[in, out]`.
    `QuantizedDense` takes what comes out; `packed_dense` lets models of Flax's own
    layers take it.

    Args:
      params: Not changed.
      config: The method; None takes that of the rules, or joint coding at 4 bits.
      key: Root key, folded with each path; `jax.random.key(0)` when None.
      rules: A method for each layer; None takes `Rules(config=config)`. The layers of
        a group of `share` have a seed and a scale of inputs in common, equal arrays in
        every matrix; their products each transform the input, unless `QuantizedLinear`
        layers are made of them.
      select: Called with paths; false leaves a layer out. Heads, embeddings and what
        else is skipped by default stay all the same; a rule that names them takes them.
      stacks: Regular expressions for paths of kernels that are matrices along leading
        axes, as `nn.scan` makes them with `variable_axes={"params": 0}`. Every matrix
        is quantized alone, and the leaf is a stack again, which `nn.scan` takes apart.
      call: Runs the Linen model on such parameters, as
        `lambda params: model.apply(params, x)`. It is traced, nothing is computed, to
        see which layer reads each kernel, and along which axes. A kernel that none
        reads, or one that `packed_dense` could not run, then stays.
      dry_run: Whether to print the plan, see `plan_params`, and stop there.

    Returns:
      The new tree and a report per layer; for a dry run the tree given, no reports.

    Raises:
      UsageError: If nothing is selected, a rule matches nothing, or a selected matrix
        cannot be quantized: it names the path.
      NonFiniteError: If a selected matrix holds NaN or infinity; names its path.
    """
    if dry_run:
        plan = plan_params(
            params, config, rules=rules, select=select, stacks=stacks, call=call
        )
        print(plan)
        return _result(params, {}, plan.coverage)
    root = jax.random.key(0) if key is None else key
    leaves, treedef = jax.tree.flatten(params, is_leaf=_is_whole)
    known = _matrices(params, stacks, rules, call)
    choices = _choices(known, config, rules, select)
    # Methods that cannot code a matrix say so before hours of work, not after.
    plan = make_plan(choices, *_others(params, known))
    choices = [layer.choice for layer in plan.layers]
    coverage = plan.coverage
    by_path = {leaf.candidate.paths[0]: leaf for leaf in known}

    def kernel(choice: Choice) -> Array:
        value, axes = jnp.asarray(by_path[choice.path].value), choice.candidate.axes
        return value if axes is None else axes.to_matrix(value)

    def put(choice: Choice, tensor: QuantizedTensor) -> None:
        axes = choice.candidate.axes
        for place in by_path[choice.path].places:
            if axes is None or axes.is_plain:
                leaves[place] = tensor
            else:
                leaves[place] = PackedArray(tensor, axes)

    quantizer = LayerQuantizer(choices, rules, root, kernel)
    reports = quantize_each(choices, quantizer, put)
    coverage.warn()
    return _result(jax.tree.unflatten(treedef, leaves), reports, coverage)


def _result(
    params: Any, reports: dict[str, LayerReport], coverage: Coverage
) -> QuantizedParams:
    result = QuantizedParams(params, reports)
    result.coverage = coverage
    return result


def plan_params(
    params: PyTree[Any],
    config: Method | None = None,
    *,
    rules: Rules | None = None,
    select: Select | None = None,
    stacks: Sequence[str] = (),
    call: Callable[[Any], Any] | None = None,
) -> Plan:
    """Plans what `quantize_params` would do, quantizing nothing; print it for a table.

    Takes trees of `jax.ShapeDtypeStruct` as well, as `jax.eval_shape` gives them.

    Raises:
      UsageError: As `quantize_params`.
    """
    known = _matrices(params, stacks, rules, call)
    choices = _choices(known, config, rules, select)
    return make_plan(choices, *_others(params, known))


def _others(params: PyTree[Any], known: Sequence[_Leaf]) -> tuple[int, int]:
    """Bytes and number of all parameters that are no matrices; shared ones once."""
    arrays = {
        id(leaf): leaf for leaf in jax.tree.leaves(params) if hasattr(leaf, "dtype")
    }
    for leaf in known:
        arrays.pop(id(leaf.value), None)
    sizes = [leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in arrays.values()]
    return sum(sizes), sum(leaf.size for leaf in arrays.values())


def dequantize_params(params: PyTree[Any]) -> PyTree[Any]:
    """The tree with dense matrices again, each in the type that it had."""

    def dense(leaf: Any) -> Any:
        if isinstance(leaf, PackedArray):
            return leaf.decode()
        return dequantize(leaf) if isinstance(leaf, QuantizedTensor) else leaf

    return jax.tree.map(dense, params, is_leaf=_is_packed)


def _choices(
    known: Sequence[_Leaf],
    config: Method | None,
    rules: Rules | None,
    select: Select | None,
) -> list[Choice]:
    candidates = (leaf.candidate for leaf in known)
    return choose_methods(candidates, config, rules, select, what="kernels")


def _matrices(
    params: PyTree[Any],
    stacks: Sequence[str],
    rules: Rules | None,
    call: Callable[[Any], Any] | None,
) -> list[_Leaf]:
    """Arrays of floats that are multiplied by, in the order of their paths."""
    found: dict[int, tuple[Any, list[tuple[str, int]]]] = {}
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_whole)
    for place, (keys, boxed) in enumerate(leaves):
        path = _path([part for key in keys for part in _parts(key)])
        leaf = _unboxed(boxed, path)
        if _is_packed(leaf) or getattr(leaf, "ndim", 0) < 2:
            continue
        if path.split("/")[-1] in ADDED or not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        found.setdefault(id(leaf), (leaf, []))[1].append((path, place))
    readers = None
    if call is not None:
        named = [path for _, places in found.values() for path, _ in places]
        kernels = {_layer_path(p) for p in named if p.split("/")[-1] == "kernel"}
        readers = kernel_readers(call, params, kernels)
    reading = _Reading(stacks, rules, readers)
    known = [_leaf(value, sorted(places), reading) for value, places in found.values()]
    _check_stacks(stacks, known)
    return sorted(known, key=lambda leaf: natural(leaf.candidate.paths[0]))


def _check_stacks(stacks: Sequence[str], known: Sequence[_Leaf]) -> None:
    high = [leaf.candidate for leaf in known if leaf.value.ndim > 2]
    for pattern in stacks:
        if not any(re.search(pattern, path) for each in high for path in each.paths):
            some = ", ".join(each.paths[0] for each in high[:2]) or "none"
            raise UsageError(
                f"`stacks`: {pattern!r} matches no kernel of more than two axes, such "
                f"as {some}. Correct or remove it."
            )


def _leaf(value: Any, places: list[tuple[str, int]], reading: "_Reading") -> _Leaf:
    named = [path for path, _ in places]
    kernels = [path for path in named if path.split("/")[-1] == "kernel"]
    paths = tuple(map(_layer_path, named))
    found = reading.axes(paths, value.shape, is_kernel=bool(kernels))
    axes = None if isinstance(found, str) else found
    shape = value.shape if axes is None else axes.matrix_shape(value.shape)
    candidate = Candidate(
        paths=paths,
        shape=shape,
        dtype=value.dtype.name,
        only_by_rule=len(kernels) < len(named),
        left=found if isinstance(found, str) else None,
        axes=axes,
        original=None if shape == value.shape else value.shape,
    )
    return _Leaf(candidate, value, tuple(place for _, place in places))


def _layer_path(path: str) -> str:
    """The path of a layer, of that of its kernel; any other path as it is."""
    *parts, last = path.split("/")
    return join(parts) if last == "kernel" and parts else path


class _Reading(NamedTuple):
    # What is said about how arrays are to be read as matrices.
    stacks: Sequence[str]
    rules: Rules | None
    readers: Mapping[str, Contraction | str] | None

    def axes(
        self, paths: Sequence[str], shape: tuple[int, ...], *, is_kernel: bool
    ) -> KernelAxes | str | None:
        """The axes of an array, if any are known, or why it stays."""
        if is_kernel and self.readers is not None:
            found = {self._read(path, shape) for path in paths}
            return found.pop() if len(found) == 1 else "is read along different axes"
        if (named := axes_by_rules(self.rules, paths, shape)) is not None:
            return named
        if len(shape) == 2 or self._is_stack(paths):
            return None
        return (
            f"has {len(shape)} axes; if it is a stack of kernels, name it by `stacks`, "
            "else give `call`, or a rule with `contract`"
        )

    def _read(self, path: str, shape: tuple[int, ...]) -> KernelAxes | str:
        assert self.readers is not None, "asked for where there are some"
        found = self.readers.get(path, "is read by no layer that `call` runs")
        if isinstance(found, str):
            return found
        leading = len(shape) - len(found.shape)
        if leading < 0 or shape[leading:] != found.shape or 0 in shape[:leading]:
            return f"has {len(shape)} axes, and is no stack of {found.shape}"
        if leading and not self._is_stack([path]):
            return f"is a stack of {found.shape}; name it by `stacks`"
        return found.kernel

    def _is_stack(self, paths: Sequence[str]) -> bool:
        return any(re.search(each, path) for each in self.stacks for path in paths)


def _path(parts: list[str]) -> str:
    return join(parts[1:] if parts[0] == "params" and len(parts) > 1 else parts)


def _parts(key: Any) -> list[str]:
    """A step into the tree; flat dicts have several in one."""
    name = getattr(key, "key", None)
    if isinstance(name, tuple):
        return list(map(str, name))
    return jax.tree_util.keystr((key,), simple=True).split("/")


def _unboxed(leaf: Any, path: str) -> Any:
    """The array in one of Linen's boxes, which `nn.with_partitioning` makes."""
    if isinstance(leaf, nnx.Variable):
        raise UsageError(
            f"`{path}` is a variable of NNX: quantize the model itself by "
            "`quantize_model`, or give `nnx.to_pure_dict(state)`."
        )
    return nn.meta.unbox(leaf)


def _is_whole(leaf: Any) -> bool:
    return _is_packed(leaf) or isinstance(leaf, nn.meta.AxisMetadata | nnx.Variable)


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedTensor | PackedArray)
