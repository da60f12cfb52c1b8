"""Quantized classifiers on disk: packed tensors, the parameters beside them, layouts.

A directory in Hugging Face's layout whose `model.safetensors` holds, for every packed
matrix, its leaves as `NAME.LEAF` (`bert.pooler.dense.weight.packed_codes`) instead of
`NAME`. `config.json` has under `quantization` the type and layout of each. The format
is that of the experiments and may change; it is not yet the library's.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from experiments.results import atomic_path
from kashin_jax import BasisSpec
from kashin_jax.errors import CheckpointError
from kashin_jax.models.classifier import ClassifierConfig, SequenceClassifier
from kashin_jax.models.classifier_names import classifier_name
from kashin_jax.models.saving import stored_array, write_tensors
from kashin_jax.models.tensor_files import iter_tensors, read_json
from kashin_jax.quantized import (
    AffineTensor,
    CodebookTensor,
    Quantized,
    QuantizedTensor,
)
from kashin_jax.quantized.controls import GroupLayout
from kashin_jax.quantized.tensor import KashinLayout

__all__ = [
    "QuantizedClassifier",
    "copy_tokenizer",
    "load_quantized",
    "save_quantized",
]

_KEY = "quantization"
# Fields of layouts that name bases, and are written as text.
_SPECS = {"basis", "rotation"}
_TYPES: Mapping[str, tuple[Any, Any]] = {
    "QuantizedTensor": (QuantizedTensor, KashinLayout),
    "AffineTensor": (AffineTensor, GroupLayout),
    "CodebookTensor": (CodebookTensor, GroupLayout),
}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)


class QuantizedClassifier(NamedTuple):
    """A classifier with some matrices packed.

    Attributes:
      model: Dense; its packed kernels are zero until `tensors` are decoded into them.
      tensors: Packed kernels by path of their layer.
      config: The architecture.
      described: What the maker said about it: method, bits, seed, stored bits.
      stored_dtype: NumPy name of the type of the parameters that are not packed.
      directory: Where it lies; its tokenizer is there too.
    """

    model: SequenceClassifier
    tensors: dict[str, Quantized]
    config: ClassifierConfig
    described: dict[str, Any]
    stored_dtype: str
    directory: Path


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer files of a checkpoint, each in one step."""
    target.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            with atomic_path(target / name) as temporary:
                shutil.copyfile(source / name, temporary)


def save_quantized(
    directory: Path,
    model: SequenceClassifier,
    tensors: Mapping[str, Quantized],
    config: ClassifierConfig,
    *,
    tokenizer: Path,
    described: Mapping[str, Any],
    dtype: str = "float16",
) -> None:
    """Writes a classifier whose packed kernels are in `tensors`, `config.json` last.

    Args:
      directory: Created where it does not exist.
      model: Gives every other parameter.
      tensors: Packed kernels by path of their layer, as `encoder/layers/0/query`.
      config: The architecture.
      tokenizer: Directory whose tokenizer files are copied.
      described: Method, bits and so on, kept as they are.
      dtype: Of the parameters that are not packed.

    Raises:
      NonFiniteError: If a parameter is not finite in `dtype`; names it.
    """
    leaves: dict[str, np.ndarray] = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = classifier_name(path, config.model_type)
        layer = "/".join(map(str, path[:-1]))
        if path[-1] == "kernel" and layer in tensors:
            leaves |= {
                f"{name}.{leaf}": np.asarray(value)
                for leaf, value in _fields(tensors[layer]).items()
            }
            continue
        leaves[name] = stored_array(name, path, np.asarray(variable[...]), dtype)
    layers = {path: _description(tensor) for path, tensor in tensors.items()}
    content = config.to_dict() | {_KEY: {**described, "dtype": dtype, "layers": layers}}
    copy_tokenizer(tokenizer, directory)
    with atomic_path(directory / "model.safetensors") as temporary:
        write_tensors(temporary, leaves)
    with atomic_path(directory / "config.json") as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _fields(tensor: Quantized) -> dict[str, Any]:
    found: dict[str, Any] = tensor._asdict()  # type: ignore[attr-defined]
    return {
        name: value
        for name, value in found.items()
        if name != "layout" and value is not None
    }


def _description(tensor: Any) -> dict[str, Any]:
    layout = dataclasses.asdict(tensor.layout)
    for name in _SPECS & layout.keys():
        spec = getattr(tensor.layout, name)
        layout[name] = None if spec is None else str(spec)
    leaves = sorted(_fields(tensor))
    return {"type": type(tensor).__name__, "leaves": leaves, "layout": layout}


def load_quantized(directory: str | Path) -> QuantizedClassifier:
    """Reads what `save_quantized` wrote.

    Raises:
      CheckpointError: If a file is missing or damaged, or the two do not belong
        together.
    """
    directory = Path(directory)
    source = directory / "config.json"
    content = read_json(source)
    config = ClassifierConfig.from_dict(content, str(source))
    described = content.get(_KEY)
    if not isinstance(described, dict) or not isinstance(described.get("layers"), dict):
        raise CheckpointError(
            f"{source}: has no `{_KEY}` with `layers`; name a directory that "
            "`experiments.glue --save=` wrote."
        )
    stored = dict(iter_tensors(directory / "model.safetensors"))
    layers: dict[str, Any] = dict(described.pop("layers"))
    dtype = str(described.pop("dtype", "float16"))
    try:
        model, tensors = _assembled(config, stored, layers)
    except (KeyError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(
            f"{directory}: `config.json` and `model.safetensors` do not belong "
            f"together ({reason}); save it again."
        ) from error
    return QuantizedClassifier(model, tensors, config, described, dtype, directory)


def _assembled(
    config: ClassifierConfig, stored: dict[str, np.ndarray], layers: dict[str, Any]
) -> tuple[SequenceClassifier, dict[str, Quantized]]:
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: SequenceClassifier(config, rngs=nnx.Rngs(0)))
    )
    flat, tensors = {}, {}
    for path, variable in nnx.to_flat_state(state):
        name = classifier_name(path, config.model_type)
        layer = "/".join(map(str, path[:-1]))
        if path[-1] == "kernel" and layer in layers:
            tensors[layer] = _tensor(name, layers[layer], stored)
            if tensors[layer].shape != variable.shape:
                raise ValueError(f"`{name}` has shape {tensors[layer].shape}")
            value = np.zeros(variable.shape, np.float32)
        else:
            value = stored.pop(name).astype(np.float32)
            value = value.T if path[-1] == "kernel" else value
        if value.shape != variable.shape:
            raise ValueError(f"`{name}` has shape {value.shape}")
        flat[path] = variable.replace(jax.device_put(value))
    if stored or layers.keys() - tensors.keys():
        raise ValueError(f"unexpected {sorted([*stored, *layers])[0]!r}")
    return nnx.merge(graphdef, nnx.from_flat_state(flat)), tensors


def _tensor(
    name: str, description: Mapping[str, Any], stored: dict[str, np.ndarray]
) -> Quantized:
    tensor_type, layout_type = _TYPES[description["type"]]
    fields = dict(description["layout"])
    specs = {
        key: None if fields[key] is None else BasisSpec.parse(fields.pop(key))
        for key in _SPECS & fields.keys()
    }
    shapes = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in fields.items()
    }
    layout = layout_type(**shapes | specs)
    found = dict.fromkeys(tensor_type._fields) | {
        leaf: jax.device_put(stored.pop(f"{name}.{leaf}"))
        for leaf in description["leaves"]
    }
    tensor = tensor_type(**found | {"layout": layout})
    # Decoding is what shows that codes, levels and scales fit the layout.
    jax.eval_shape(lambda t: t.decode(), tensor)
    return tensor
