"""Packed matrices cut over devices: how leaves lie, and products of the parts.

Over inputs every device multiplies its part of x, and the results are added up; over
outputs every device has its part of the result. Nothing packed leaves its device.
Compilers cannot find that in the loops of kernels, so they are told.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
    custom_partitioning,
)
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

__all__ = ["INPUTS", "OUTPUTS", "Axes", "Names", "cut_product", "specs_of"]

INPUTS, OUTPUTS = "inputs", "outputs"
"""What the axes of a leaf can run along; None for others, which are never cut."""

Axes = tuple[str | None, ...]
"""What each axis of a leaf runs along."""

Names = str | tuple[str, ...] | None
"""Mesh axes."""

Run = Callable[..., Float[Array, "r n"]]


def specs_of(
    axes: Axes, inputs: Names, outputs: Names, stack: int = 0
) -> PartitionSpec:
    """How a leaf lies when a matrix is cut over mesh axes of these names.

    Args:
      axes: Of the leaf.
      inputs: Mesh axes that inputs are cut over; None for none.
      outputs: Mesh axes that outputs are cut over.
      stack: Leading axes, which are not cut.
    """
    names = {INPUTS: inputs, OUTPUTS: outputs, None: None}
    return PartitionSpec(*(None,) * stack, *(names[axis] for axis in axes))


def cut_product(
    run: Run,
    whole: Run,
    rows: Float[Array, "r m"],
    leaves: Sequence[Array],
    axes: Sequence[Axes],
    cuts: tuple[int, int],
) -> Float[Array, "r n"]:
    """A product that partitioners cut as its matrix is cut.

    Args:
      run: Called with rows and leaves, of the whole matrix or of a part, on one device.
      whole: The same where a compiler may divide it: for derivatives, and for matrices
        that `vmap` maps over.
      rows: Of x.
      leaves: All that the product takes beside them.
      axes: Of every leaf.
      cuts: Into how many parts, of whole blocks, inputs and outputs can be cut.
    """
    rule = _Cut(run, tuple(axes), cuts)
    # `jit` keeps constants, which partitioning refuses, to itself.
    partitioned = custom_partitioning(jax.jit(run))
    partitioned.def_partition(rule.partition, sharding_rule=rule.sharding_rule)

    @custom_vmap
    def mapped(rows: Array, *leaves: Array) -> Array:
        found: Array = partitioned(rows, *leaves)
        return found

    @mapped.def_vmap
    def _batched(
        size: int, is_batched: Sequence[bool], rows: Array, *leaves: Array
    ) -> tuple[Array, bool]:
        if any(is_batched[1:]):
            # Matrices of their own: whatever the compiler makes of it.
            across = [0 if one else None for one in is_batched]
            return jax.vmap(whole, across)(rows, *leaves), True
        y = mapped(rows.reshape(-1, rows.shape[-1]), *leaves)
        return y.reshape(size, -1, y.shape[-1]), True

    @jax.custom_jvp
    def product(rows: Array, leaves: Sequence[Array]) -> Array:
        found: Array = mapped(rows, *leaves)
        return found

    @product.defjvp
    def _derivative(primals: Any, tangents: Any) -> tuple[Array, Array]:
        def of_all(rows: Array, leaves: Sequence[Array]) -> Array:
            return whole(rows, *leaves)

        return product(*primals), jax.jvp(of_all, primals, tangents)[1]

    y: Array = product(rows, list(leaves))
    return y


class _Cut:
    """The rule of one product, for the compiler that asks."""

    def __init__(self, run: Run, axes: tuple[Axes, ...], cuts: tuple[int, int]) -> None:
        self._run, self._axes = run, axes
        self._cuts = dict(zip((INPUTS, OUTPUTS), cuts, strict=True))

    def sharding_rule(
        self, mesh: Mesh, value_types: Sequence[Any], result_types: Sequence[Any]
    ) -> SdyShardingRule:
        """Which axes of arguments and result go together; only whole blocks are cut."""
        # A factor that is a whole axis somewhere has its size from there.
        sizes, alone = dict[str, int](), set[str]()
        # Factors that are not cut, in the order of their first use, which is asked for.
        uncut: list[str] = []

        def factor(kind: str | None, size: int) -> str | CompoundFactor:
            if kind is None:
                alone.add(name := f"whole{len(uncut)}")
                uncut.append(name)
                return name
            cuts = self._cuts[kind]
            if size == cuts:
                alone.add(kind)
                return kind
            if cuts == 1:
                # Of factors beside others none may have size 1.
                if (name := f"{kind}{size}") not in alone:
                    alone.add(name)
                    uncut.append(name)
                return name
            # Within blocks, or within what of them fills whole bytes.
            if (minor := f"{kind}{size // cuts}") not in sizes:
                uncut.append(minor)
            sizes.update({kind: cuts, minor: size // cuts})
            return CompoundFactor(kind, minor)

        def mapping(kinds: Axes, value: Any) -> ArrayMapping:
            each = zip(kinds, value.shape, strict=True)
            return ArrayMapping(*(factor(kind, size) for kind, size in each))

        rows, *leaves = value_types
        first = ArrayMapping("rows", factor(INPUTS, rows.shape[1]))
        operands = (first, *map(mapping, self._axes, leaves))
        result = ArrayMapping("rows", factor(OUTPUTS, result_types[0].shape[1]))
        given: dict[str, Any] = {k: v for k, v in sizes.items() if k not in alone}
        return SdyShardingRule(
            operands, (result,), need_replication_factors=tuple(uncut), **given
        )

    def partition(
        self, mesh: Mesh, arguments: Sequence[Any], result: Any
    ) -> tuple[Mesh, Run, NamedSharding, tuple[NamedSharding, ...]]:
        """The product of a part, and how its arguments and result lie."""
        found: dict[str, tuple[str, ...]] = {INPUTS: (), OUTPUTS: ()}
        for kinds, argument in zip(self._axes, arguments[1:], strict=True):
            for kind, names in zip(kinds, argument.sharding.spec, strict=False):
                if kind is not None and len(_tuple(names)) > len(found[kind]):
                    found[kind] = _tuple(names)
        cut = {
            kind: _fitting(mesh, names, self._cuts[kind])
            for kind, names in found.items()
        }
        inputs, outputs = cut[INPUTS], cut[OUTPUTS]
        spec = (*arguments[0].sharding.spec, None)[:1]
        taken = {*inputs, *outputs}
        batch = tuple(name for name in _tuple(spec[0]) if name not in taken)

        def part(rows: Array, *leaves: Array) -> Array:
            y = self._run(rows, *leaves)
            return jax.lax.psum(y, inputs) if inputs else y

        def lies(*names: Names) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec(*(name or None for name in names)))

        leaves = (
            NamedSharding(mesh, specs_of(kinds, inputs or None, outputs or None))
            for kinds in self._axes
        )
        return mesh, part, lies(batch, outputs), (lies(batch, inputs), *leaves)


def _tuple(names: Names) -> tuple[str, ...]:
    if names is None:
        return ()
    return (names,) if isinstance(names, str) else tuple(names)


def _fitting(mesh: Mesh, names: tuple[str, ...], cuts: int) -> tuple[str, ...]:
    """The first mesh axes that a number of whole blocks can be dealt over."""
    fitting: tuple[str, ...] = ()
    for name in names:
        if cuts % math.prod(mesh.shape[each] for each in (*fitting, name)):
            break
        fitting = (*fitting, name)
    return fitting
