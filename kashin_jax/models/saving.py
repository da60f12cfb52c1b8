"""Saving models in Hugging Face's layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from kashin_jax.errors import NonFiniteError, UsageError
from kashin_jax.io import make_directory, write_json, write_tensors
from kashin_jax.models.architecture import (
    Architecture,
    Config,
    ParamPath,
    abstract_state,
)
from kashin_jax.models.bert import ClassifierConfig, SequenceClassifier
from kashin_jax.models.opt import OPTConfig, OPTForCausalLM
from kashin_jax.models.registry import ARCHITECTURES

__all__ = ["save_classifier", "save_model", "save_opt", "stored_array"]


def save_model(
    model: nnx.Module,
    config: Config,
    directory: str | Path,
    *,
    dtype: DTypeLike,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes `model.safetensors` and `config.json`, as `transformers` reads them.

    Each file appears whole or not at all, `config.json` last. The tokenizer is not
    part of a model and is left to the caller.

    Args:
      model: A model with dense layers.
      config: Its architecture, one of the registry.
      directory: Created where it does not exist; files of those names are replaced.
      dtype: Floating-point precision to store.
      extra: Further fields of `config.json`, such as `finetuning_task`.

    Raises:
      UsageError: If the model has other parameters than `config` asks for, as after
        quantizing; dequantize it first.
      NonFiniteError: If a weight is not finite, or overflows `dtype`; names it.
      CheckpointError: If the directory cannot be written.
    """
    dtype, directory = jnp.dtype(dtype), Path(directory)
    tensors = _tensors(model, config, ARCHITECTURES[config.model_type], dtype)
    content = config.to_dict() | dict(extra or {}) | {"torch_dtype": dtype.name}
    make_directory(directory)
    # Readers of transformers refuse files that do not say whose layout they have.
    write_tensors(directory / "model.safetensors", tensors, {"format": "pt"})
    write_json(directory / "config.json", content)


def save_opt(
    model: OPTForCausalLM,
    config: OPTConfig,
    directory: str | Path,
    *,
    dtype: DTypeLike = "float16",
) -> None:
    """Writes an OPT model as published ones are stored; see `save_model`."""
    save_model(model, config, directory, dtype=dtype)


def save_classifier(
    model: SequenceClassifier,
    config: ClassifierConfig,
    directory: str | Path,
    *,
    dtype: DTypeLike = "float32",
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes a classifier as published ones are stored; see `save_model`."""
    save_model(model, config, directory, dtype=dtype, extra=extra)


def _tensors(
    model: nnx.Module, config: Any, architecture: Architecture, dtype: np.dtype
) -> dict[str, np.ndarray]:
    _, expected = abstract_state(architecture.model, config, jnp.dtype(jnp.float32))
    shapes = {path: v.shape for path, v in nnx.to_flat_state(expected)}
    found = dict(nnx.to_flat_state(nnx.state(model)))
    if odd := shapes.keys() ^ found.keys():
        raise UsageError(
            f"`model` and `config` differ in parameter "
            f"`{'.'.join(map(str, min(odd, key=str)))}`; save dense models only."
        )
    tensors = {}
    for path, variable in found.items():
        name = architecture.names.published(path)
        value = np.asarray(variable[...])
        if value.shape != shapes[path]:
            raise UsageError(
                f"`{name}` has shape {value.shape}, but `config` asks for "
                f"{shapes[path]}."
            )
        found_name = architecture.names.parse(name)
        is_transposed = found_name is None or found_name.is_transposed
        tensors[name] = stored_array(
            name, path, value, dtype, is_transposed=is_transposed
        )
    return tensors


def stored_array(
    name: str,
    path: ParamPath,
    value: np.ndarray,
    dtype: DTypeLike,
    *,
    is_transposed: bool = True,
) -> np.ndarray:
    """A parameter as PyTorch lays it out: matrix products as `[out, in]`.

    Args:
      name: In the file, for the message.
      path: Where the model has it.
      value: As the model has it.
      dtype: Floating-point precision to store.
      is_transposed: Whether matrices of that name are so; GPT-2's are not.

    Raises:
      NonFiniteError: If the value is not finite, or overflows `dtype`; names it.
    """
    dtype = jnp.dtype(dtype)
    with np.errstate(over="ignore"):
        flip = is_transposed and path[-1] == "kernel"
        stored = (value.T if flip else value).astype(dtype)
    if not np.isfinite(stored).all():
        raise NonFiniteError(f"`{name}` is not finite in {dtype.name}.")
    return np.ascontiguousarray(stored)
