"""Loading quantized checkpoints as models whose kernels stay packed."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.io import Checkpoint, open_checkpoint
from kashin_jax.layers import PackedKernel
from kashin_jax.layers.packed import Inputs, pack
from kashin_jax.models.loading import LoadedClassifier, LoadedModel, load_model
from kashin_jax.models.registry import names_of
from kashin_jax.models.tensor_roles import tensor_roles
from kashin_jax.pipeline.checkpoint_plan import refuse_foreign
from kashin_jax.pipeline.paths import join
from kashin_jax.pipeline.targets import packed_layer
from kashin_jax.tensors import QuantizedTensor

__all__ = ["load_quantized", "packed_layers", "packed_tensors"]


def load_quantized(
    path_or_id: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    head: str | None = None,
) -> LoadedModel | LoadedClassifier:
    """Loads a checkpoint of any architecture in `models.registry`, quantized or not.

    Packed matrices become `QuantizedLinear` and `QuantizedEmbed` layers and are never
    decoded as a whole; with the same rules and seed the model is that of
    `quantize_model`.

    Args:
      path_or_id: A directory, or a hub id, which is downloaded.
      dtype: Type of parameters and activations, whatever type the checkpoint has.
      head: Which head, for classifiers with several.

    Raises:
      UsageError: If another library quantized it.
      CheckpointError: If the checkpoint is damaged or of another architecture, or a
        packed matrix belongs to no layer of it.
      NonFiniteError: If a weight is NaN or infinite, or overflows `dtype`.
    """
    checkpoint = open_checkpoint(path_or_id)
    refuse_foreign(checkpoint)
    loaded = load_model(checkpoint, dtype=dtype, head=head)
    names = names_of(loaded.config.model_type)
    # Quantized with the rest, though the model has no place for them.
    unused = {names.layer(n).path for n in checkpoint.names() if names.parse(n) is None}
    tensors = {
        path: _of_type(tensor, dtype)
        for path, tensor in packed_layers(checkpoint).items()
        if path not in unused
    }
    model = _with_packed(loaded.model, tensors, checkpoint.directory)
    return loaded._replace(model=model)


def packed_layers(checkpoint: Checkpoint) -> dict[str, QuantizedTensor]:
    """The packed matrices of a checkpoint by path of their layer, experts' in stacks.

    Raises:
      CheckpointError: If one is damaged, or orientations do not fit the names.
    """
    roles = tensor_roles(checkpoint.config)
    tensors: dict[str, QuantizedTensor] = {}
    for name in checkpoint.descriptions:
        described = checkpoint.described(name)
        role = roles.of(name, described.shape)
        # Either orientation is used for experts.
        fits = described.stack or role.is_transposed == described.is_transposed
        if not (role.is_matrix and fits):
            raise CheckpointError(
                f"{checkpoint.directory}: packed tensor `{name}` is no layer's matrix "
                "by its name and orientation; quantize the original again."
            )
        tensor: Any = checkpoint.load(name)
        tensors[role.path] = tensor
    return tensors


def packed_tensors(model: nnx.Module) -> dict[str, QuantizedTensor]:
    """The packed matrices of a model by path of their layer."""
    found = nnx.to_flat_state(nnx.state(model, PackedKernel))
    return {join(path[:-1]): variable.get_raw_value() for path, variable in found}


def _of_type(tensor: Any, dtype: DTypeLike) -> QuantizedTensor:
    """The packed matrix, decoded to the type that a dense one would be loaded in."""
    layout = dataclasses.replace(tensor.layout, dtype=jnp.dtype(dtype).name)
    cast: QuantizedTensor = tensor.replace(layout=layout)
    return cast


def _with_packed(
    model: Any, tensors: Mapping[str, QuantizedTensor], directory: Path
) -> Any:
    found, known = set(), Inputs()

    def swap(parts: tuple[Any, ...], node: Any) -> Any:
        path = join(parts)
        if path not in tensors or type(node) not in (nnx.Linear, nnx.Embed):
            return node
        found.add(path)
        packed = pack(tensors[path], known)
        return packed_layer(node, packed, path)

    try:
        swapped = nnx.recursive_map(swap, model)
    except UsageError as error:
        raise CheckpointError(
            f"{directory}: {error} Use the files that were written together."
        ) from error
    if missing := sorted(tensors.keys() - found):
        raise CheckpointError(
            f"{directory}: packed layer `{missing[0]}` is no linear layer or embedding "
            "of the model; use the files that were written together."
        )
    return swapped
