"""Loading OPT checkpoints that lie in Hugging Face's layout."""

import collections
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kashin_jax.errors import CheckpointError, NonFiniteError, UsageError
from kashin_jax.models.hub import checkpoint_directory
from kashin_jax.models.names import (
    parse_stored_name,
    published_name,
    tensor_name,
)
from kashin_jax.models.opt import OPTConfig, OPTForCausalLM
from kashin_jax.models.saving import save_opt
from kashin_jax.models.tensor_files import find_weights, iter_tensors, read_json

__all__ = ["LoadedModel", "load_opt", "save_opt"]

_DTYPES = ("float32", "bfloat16", "float16")
_HEAD = ("lm_head", "kernel")
_EMBEDDING = ("decoder", "embed_tokens", "embedding")
# Left in some conversions from fairseq; a version number, not a weight.
_IGNORED = frozenset({"decoder.version"})

ParamPath = tuple[Any, ...]


class LoadedModel(NamedTuple):
    """A model and where it came from.

    Attributes:
      model: In evaluation mode.
      config: Its architecture.
      stored_dtype: NumPy name of the precision that most of the weights are stored in,
        such as `float16`.
      directory: Where the checkpoint lies; its tokenizer is there too.
    """

    model: OPTForCausalLM
    config: OPTConfig
    stored_dtype: str
    directory: Path


class _Tensor(NamedTuple):
    label: str
    name: str
    is_transposed: bool
    value: np.ndarray


def load_opt(path_or_id: str | Path, *, dtype: DTypeLike = jnp.float32) -> LoadedModel:
    """Loads an OPT checkpoint, tensor by tensor.

    Reads `model.safetensors`, else `flax_model.msgpack`, else `pytorch_model.bin` (the
    last needs torch), whole or in shards with an index.

    Args:
      path_or_id: A directory, or a hub id, which is downloaded.
      dtype: Of parameters and activations: float32, bfloat16 or float16.

    Returns:
      The model, ready for evaluation.

    Raises:
      CheckpointError: If the checkpoint cannot be found or read, is of another
        architecture, or has missing, unexpected or mis-shaped tensors.
      NonFiniteError: If a weight is NaN or infinite, or overflows `dtype`.
      UsageError: If `dtype` is not supported.
    """
    if (dtype := jnp.dtype(dtype)).name not in _DTYPES:
        raise UsageError(f"`dtype` must be one of {_DTYPES}. Got {dtype.name}.")
    directory = checkpoint_directory(path_or_id)
    source = directory / "config.json"
    config = OPTConfig.from_dict(read_json(source), str(source))
    graphdef, state = nnx.split(_abstract_model(config, dtype))
    targets = dict(nnx.to_flat_state(state))
    if config.tie_word_embeddings:
        # The head is stored all the same by some, and then has to be the embedding.
        head_shape = (config.embedding_size, config.vocab_size)
        targets[_HEAD] = nnx.Param(jax.ShapeDtypeStruct(head_shape, dtype))
    loaded, stored_dtype = _load_variables(directory, targets, dtype)
    if config.tie_word_embeddings and (head := loaded.pop(_HEAD, None)) is not None:
        _check_tied(directory, head[...], loaded.get(_EMBEDDING))
    missing = [path for path, _ in nnx.to_flat_state(state) if path not in loaded]
    if missing:
        raise CheckpointError(
            f"{directory}: {len(missing)} tensors are missing, the first is "
            f"`{min(map(published_name, missing))}`; use the weights published with "
            "config.json."
        )
    model = nnx.merge(graphdef, nnx.from_flat_state(loaded))
    return LoadedModel(model, config, stored_dtype, directory)


def _abstract_model(config: OPTConfig, dtype: DTypeLike) -> OPTForCausalLM:
    # Shapes only: drawing random weights costs more than reading the real ones.
    return nnx.eval_shape(
        lambda: OPTForCausalLM(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)
    )


def _load_variables(
    directory: Path, targets: dict[ParamPath, nnx.Variable], dtype: np.dtype
) -> tuple[dict[ParamPath, nnx.Variable], str]:
    """The variables found, and the precision that most of their values have on disk."""
    paths = {tensor_name(path): path for path in targets}
    loaded: dict[ParamPath, nnx.Variable] = {}
    sizes: collections.Counter[str] = collections.Counter()
    for tensor in _read(directory):
        if (path := paths.get(tensor.name)) is None:
            raise CheckpointError(
                f"{tensor.label} is not part of the model that config.json describes; "
                "use the two files that were published together."
            )
        if path in loaded:
            raise CheckpointError(f"{tensor.label} is stored twice; remove one copy.")
        variable = targets[path]
        array = _converted(tensor, path[-1] == "kernel", variable.shape, dtype)
        loaded[path] = variable.replace(array)
        sizes[tensor.value.dtype.name] += tensor.value.size
    if not sizes:
        raise CheckpointError(f"{directory}: the weight files are empty; get new ones.")
    return loaded, sizes.most_common(1)[0][0]


def _read(directory: Path) -> Iterator[_Tensor]:
    for file in find_weights(directory):
        for stored, value in iter_tensors(file):
            name, is_transposed = parse_stored_name(stored)
            if name not in _IGNORED:
                yield _Tensor(f"{file}: `{stored}`", name, is_transposed, value)


def _converted(
    tensor: _Tensor, is_kernel: bool, shape: tuple[int, ...], dtype: np.dtype
) -> Float[Array, "..."]:
    value = tensor.value
    if value.dtype.name not in _DTYPES:
        raise CheckpointError(
            f"{tensor.label} is stored as {value.dtype.name}; only {_DTYPES} can be "
            "loaded."
        )
    flip = is_kernel and tensor.is_transposed
    _check_shape(tensor, shape[::-1] if flip else shape)
    with np.errstate(over="ignore"):
        cast = (value.T if flip else value).astype(dtype)
    if not np.isfinite(cast).all():
        raise NonFiniteError(
            f"{tensor.label} overflows {dtype.name}; load it in a wider dtype."
            if np.isfinite(value).all()
            else f"{tensor.label} has NaN or infinite values; download it again."
        )
    return jnp.asarray(cast)


def _check_tied(
    directory: Path, head: Float[Array, "e vocab"], embedding: nnx.Variable | None
) -> None:
    if embedding is not None and not jnp.array_equal(head.T, embedding[...]):
        raise CheckpointError(
            f"{directory}: `lm_head.weight` differs from the token embedding that "
            "config.json ties it to; set `tie_word_embeddings` to false there."
        )


def _check_shape(tensor: _Tensor, expected: tuple[int, ...]) -> None:
    if tensor.value.shape != expected:
        raise CheckpointError(
            f"{tensor.label} has shape {tensor.value.shape}, but config.json asks for "
            f"{expected}; use the two files that were published together."
        )
