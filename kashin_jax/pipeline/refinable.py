"""A model with packed layers taken apart: what decodes its codes, and all the rest.

What can learn while the codes stay as they are: the floating-point leaves of packed
matrices (scales, centroids, levels) and the vectors of the model (biases, norms).
Codes, seeds, bases and dense matrices do not. The gradient of a centroid is the sum
over the weights that are coded by it.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kashin_jax.layers import PackedKernel, QuantizedEmbed, QuantizedLinear
from kashin_jax.layers.packed import DerivedBasis, InputSide

__all__ = ["Frozen", "Refinable", "Structure", "take_apart"]


class Frozen(NamedTuple):
    """What is not trained.

    Attributes:
      units: Root-mean-square of every trained leaf before training.
      others: Leaves that stay as they are.
    """

    units: list[Float[Array, ""]]
    others: list[Array]


@dataclasses.dataclass(frozen=True)
class Structure:
    """How leaves make a model: hashable, the same for models that differ in values.

    Attributes:
      graphdef: Of the model.
      tree: Of its state.
      dtypes: Of every leaf that is trained its type on disk, and in the model; None for
        the others.
    """

    graphdef: Any
    tree: Any
    dtypes: tuple[tuple[str, str] | None, ...]

    def model(self, params: list[Array], frozen: Frozen) -> Any:
        """The model that `(params, frozen)` mean; differentiable.

        Leaves are rounded to their stored type in every step, so that what is trained
        is what is stored.
        """
        trained, others = zip(params, frozen.units, strict=True), iter(frozen.others)
        leaves = []
        for dtypes in self.dtypes:
            if dtypes is None:
                leaves.append(next(others))
            else:
                value, unit = next(trained)
                stored, own = dtypes
                value = value * unit
                value = value if stored == own else _rounded(stored, value)
                leaves.append(value.astype(own))
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.tree, leaves))


class Refinable(NamedTuple):
    """A model taken apart.

    Attributes:
      params: What is trained, each leaf in units of its own root-mean-square, so that
        one learning rate fits all; float32.
      frozen: What is not, and the units.
      structure: Puts them together.
      names: Of what is trained, as `decoder/layers/0/fc1/kernel/scale`.
    """

    params: list[Float[Array, "..."]]
    frozen: Frozen
    structure: Structure
    names: tuple[str, ...]

    def model(self, params: list[Array] | None = None) -> Any:
        """The model with these parameters, or with its own."""
        params = self.params if params is None else params
        return _settled(self.structure.model(params, self.frozen))


def take_apart(model: nnx.Module, stored: Mapping[str, str] | None = None) -> Refinable:
    """Separates what is trained from what is not.

    Args:
      model: Some of its layers are packed. Not changed.
      stored: Types that vectors have on disk, by path; others have their own.
    """
    stored = {} if stored is None else stored
    graphdef, state = nnx.split(model)
    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    variables = jax.tree.leaves(state, is_leaf=is_variable)
    marks = list(itertools.chain.from_iterable(map(_is_trained, variables)))
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    params, units, others, names = [], [], [], []
    dtypes: list[tuple[str, str] | None] = []
    for (path, leaf), is_trained in zip(leaves, marks, strict=True):
        if not is_trained:
            dtypes.append(None)
            others.append(leaf)
            continue
        names.append(jax.tree_util.keystr(path, simple=True, separator="/"))
        own = leaf.dtype.name
        dtypes.append((stored.get(names[-1].removesuffix("/value"), own), own))
        values = leaf.astype(jnp.float32)
        units.append(_unit(values))
        params.append(values / units[-1])
    structure = Structure(graphdef, tree, tuple(dtypes))
    return Refinable(params, Frozen(units, others), structure, tuple(names))


def _is_trained(variable: Any) -> list[bool]:
    """For every leaf of a variable, whether it is trained."""
    value = variable.get_raw_value()
    if isinstance(variable, PackedKernel):
        return [
            jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(value)
        ]
    if isinstance(variable, DerivedBasis):
        # Of bases nothing is, but layers may have a scale of inputs in common.
        marks = jax.tree.map(lambda _: False, value)
        if isinstance(value, InputSide) and value.scale is not None:
            marks = marks._replace(scale=True)
        return jax.tree.leaves(marks)
    is_vector = isinstance(variable, nnx.Param) and jnp.ndim(value) == 1
    return [is_vector and jnp.issubdtype(value.dtype, jnp.floating)]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _rounded(dtype: str, values: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Values as `dtype` has them; what learns does not feel the rounding."""
    kind = jnp.finfo(dtype)
    # There and back is nothing to XLA's GPU compiler; what it keeps flushes subnormals.
    return jnp.where(
        jnp.abs(values) < float(kind.smallest_normal),
        values.astype(dtype).astype(values.dtype),
        jax.lax.reduce_precision(values, kind.nexp, kind.nmant),
    )


@_rounded.defjvp
def _rounded_jvp(dtype: str, primals: Any, tangents: Any) -> tuple[Array, Array]:
    return _rounded(dtype, *primals), tangents[0]


def _unit(values: Float[Array, "..."]) -> Float[Array, ""]:
    rms = jnp.sqrt(jnp.mean(jnp.square(values)))
    return jnp.where(rms > 0, rms, 1.0)


def _settled(model: Any) -> Any:
    """The model, scales that layers have in common stored with every matrix."""
    for _, node in nnx.iter_graph(model):
        if isinstance(node, QuantizedLinear):
            kernel = node.kernel
        elif isinstance(node, QuantizedEmbed):
            kernel = node.table
        else:
            continue
        if node.inputs is not None and node.inputs.get_value().scale is not None:
            scale = node.inputs.get_value().scale
            kernel.set_value(kernel.get_value().replace(in_scale=scale))
    return model
