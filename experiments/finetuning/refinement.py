"""Quantization-aware refinement: codes stay as they are, what decodes them is trained.

Trained are the floating-point leaves of packed tensors (centroids, levels, scales) and
the vectors of the model (biases, norms); codes, seeds, embeddings and the head's matrix
are not. Gradients reach the centroids through decoding: the gradient of a centroid is
the sum over the weights that are coded by it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from experiments.train.step import Params
from kashin_jax.models.classifier import ClassifierConfig, SequenceClassifier
from kashin_jax.tensors import QuantizedTensor

__all__ = ["Build", "Refinable", "abstract_classifier", "take_apart"]

Leaves = list[Array]


# Puts `(params, frozen)` together.
Build: TypeAlias = Callable[[Params, PyTree[Array]], SequenceClassifier]


class _Structure(NamedTuple):
    # Static: how a packed tensor is put together from its leaves.
    tree: Any
    dtypes: tuple[str, ...]

    @property
    def is_trained(self) -> list[bool]:
        return [dtype.startswith("float") for dtype in self.dtypes]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refinable:
    """A quantized classifier taken apart.

    Attributes:
      params: What is trained: `vectors` and, for each packed matrix, `packed` leaves
        in units of their own root-mean-square, so that one learning rate fits all.
      frozen: The other parameters, the other leaves and the units.
      structures: How the leaves of each packed matrix make a tensor.
    """

    params: Params
    frozen: PyTree[Array]
    structures: Mapping[str, _Structure]

    def tensors(
        self, params: Params, frozen: PyTree[Array]
    ) -> dict[str, QuantizedTensor]:
        """The packed tensors that `(params, frozen)` mean, types as stored."""
        return {
            path: _joined(structure, params["packed"][path], frozen["packed"][path])
            for path, structure in self.structures.items()
        }

    def builder(
        self, config: ClassifierConfig, dtype: DTypeLike, *, training: bool
    ) -> Build:
        """A function that makes the classifier of `(params, frozen)`.

        Args:
          config: The architecture; its dropout rates may be other ones.
          dtype: Of activations.
          training: Whether dropout is on.
        """
        graphdef, state = abstract_classifier(config, dtype, training=training)
        templates = dict(nnx.to_flat_state(state))

        def build(params: Params, frozen: PyTree[Array]) -> SequenceClassifier:
            values = {**params["vectors"], **frozen["matrices"]}
            for path, tensor in self.tensors(params, frozen).items():
                values[f"{path}/kernel"] = tensor.decode()
            flat = {
                path: variable.replace(values[_join(path)])
                for path, variable in templates.items()
            }
            return nnx.merge(graphdef, nnx.from_flat_state(flat))

        return build


def take_apart(
    model: SequenceClassifier, tensors: Mapping[str, QuantizedTensor]
) -> Refinable:
    """Separates what is trained from what is not.

    Args:
      model: Gives the parameters that are not packed; those layers are
        `QuantizedLinear`.
      tensors: Packed kernels by path of their layer.
    """
    dense = {
        _join(path): variable[...]
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    structures, trained, kept = {}, {}, {}
    for path, tensor in tensors.items():
        leaves, tree = jax.tree.flatten(tensor)
        structure = _Structure(tree, tuple(leaf.dtype.name for leaf in leaves))
        structures[path] = structure
        trained[path], kept[path] = _split(structure, leaves)
    vectors = {path: value for path, value in dense.items() if value.ndim == 1}
    matrices = {path: value for path, value in dense.items() if value.ndim != 1}
    return Refinable(
        params={"vectors": vectors, "packed": trained},
        frozen={"matrices": matrices, "packed": kept},
        structures=structures,
    )


def _split(structure: _Structure, leaves: Leaves) -> tuple[Leaves, Leaves]:
    trained, kept = [], []
    for leaf, is_trained in zip(leaves, structure.is_trained, strict=True):
        if not is_trained:
            kept.append(leaf)
            continue
        values = leaf.astype(jnp.float32)
        unit = _unit(values)
        trained.append(values / unit)
        kept.append(unit)
    return trained, kept


def _unit(values: Float[Array, "..."]) -> Float[Array, ""]:
    rms = jnp.sqrt(jnp.mean(jnp.square(values)))
    return jnp.where(rms > 0, rms, 1.0)


def _joined(structure: _Structure, trained: Leaves, kept: Leaves) -> QuantizedTensor:
    new = iter(trained)
    # Cast to the stored type in every step, so that what is trained is what is stored.
    leaves = [
        (next(new) * old).astype(dtype) if is_trained else old
        for old, dtype, is_trained in zip(
            kept, structure.dtypes, structure.is_trained, strict=True
        )
    ]
    return jax.tree.unflatten(structure.tree, leaves)


def abstract_classifier(
    config: ClassifierConfig, dtype: DTypeLike, *, training: bool
) -> tuple[nnx.GraphDef, nnx.State]:
    """A classifier without values, with dropout on or off: graph and parameters."""
    model = nnx.eval_shape(
        lambda: SequenceClassifier(config, rngs=nnx.Rngs(0), dtype=dtype)
    )
    if training:
        model.train()
    return nnx.split(model, nnx.Param)


def _join(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))
