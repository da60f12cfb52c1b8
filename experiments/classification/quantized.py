"""Quantized classifiers in the library's format, with what experiments need beside it.

`kashin_jax.io` writes them and `load_quantized` reads them; see `docs/format.md`.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from experiments.common.checkpoints import is_quantized
from experiments.common.quantized_layers import decode
from kashin_jax import Rules
from kashin_jax.errors import CheckpointError
from kashin_jax.io import (
    atomic_path,
    checkpoint_directory,
    read_json,
    save_checkpoint,
)
from kashin_jax.layers import PackedKernel, QuantizedLinear
from kashin_jax.methods import config_to_json
from kashin_jax.models import ClassifierConfig, LoadedClassifier, SequenceClassifier
from kashin_jax.models.registry import names_of
from kashin_jax.models.saving import stored_array
from kashin_jax.pipeline import (
    load_quantized,
    packed_tensors,
    rules_from_json,
    rules_to_json,
)
from kashin_jax.tensors import QuantizedTensor

__all__ = [
    "QuantizedClassifier",
    "copy_tokenizer",
    "load_classifier_packed",
    "save_quantized",
]

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
      loaded: Its packed layers are `QuantizedLinear`.
      tensors: Packed kernels by path of their layer.
      rules: What was asked for.
      seed: What was asked for.
    """

    loaded: LoadedClassifier
    tensors: dict[str, QuantizedTensor]
    rules: Rules
    seed: int

    @property
    def described(self) -> dict[str, Any]:
        """Method, its fields and seed, for records."""
        return {**config_to_json(self.rules.config), "seed": self.seed}

    def decoded(self) -> LoadedClassifier:
        """The classifier with its layers decoded, as tables score them."""
        model = nnx.recursive_map(_dense, self.loaded.model)
        return self.loaded._replace(model=model)


def _dense(path: tuple[Any, ...], node: Any) -> Any:
    if type(node) is not QuantizedLinear:
        return node
    linear = nnx.Linear(
        node.in_features,
        node.out_features,
        use_bias=node.use_bias,
        dtype=node.dtype,
        kernel_init=nnx.initializers.zeros_init(),
        rngs=nnx.Rngs(0),
    )
    linear.kernel = nnx.Param(decode(node.kernel.get_value()))
    linear.bias = node.bias
    return linear


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
    tensors: Mapping[str, QuantizedTensor],
    config: ClassifierConfig,
    *,
    tokenizer: Path,
    rules: Rules,
    seed: int,
    dtype: str = "float16",
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes a classifier whose packed kernels are in `tensors`, `config.json` last.

    Args:
      directory: Created where it does not exist.
      model: Dense; gives every other parameter.
      tensors: Packed kernels by path of their layer, as `encoder/layers/0/query`.
      config: The architecture.
      tokenizer: Directory whose tokenizer files are copied.
      rules: What was asked for.
      seed: What was asked for.
      dtype: Of the parameters that are not packed.
      extra: Further fields of `config.json`, such as `finetuning_task`.

    Raises:
      NonFiniteError: If a parameter is not finite in `dtype`; names it.
      CheckpointError: If the directory cannot be written.
    """
    stored: dict[str, np.ndarray | QuantizedTensor] = {}
    packed = set()
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = names_of(config.model_type).published(path)
        layer = "/".join(map(str, path[:-1]))
        if path[-1] == "kernel" and layer in tensors:
            stored[name] = tensors[layer]
            packed.add(name)
            continue
        stored[name] = stored_array(name, path, np.asarray(variable[...]), dtype)
    content = config.to_dict() | {"torch_dtype": dtype} | dict(extra or {})
    copy_tokenizer(tokenizer, directory)
    save_checkpoint(
        directory,
        stored,
        content,
        transposed=packed,
        rules=rules_to_json(rules),
        seed=seed,
    )


def load_classifier_packed(
    path_or_id: str | Path, head: str | None = None
) -> QuantizedClassifier:
    """Loads a quantized classifier, as `kashin quantize` and `save_quantized` write it.

    Args:
      path_or_id: A directory or hub id.
      head: Which head, for checkpoints with several.

    Raises:
      CheckpointError: If it is not quantized, damaged, no classifier, or its embeddings
        are packed.
      UsageError: If another library quantized it.
    """
    directory = checkpoint_directory(path_or_id)
    if not is_quantized(directory):
        raise CheckpointError(
            f"{directory}: is not quantized; name a directory of `experiments.glue "
            "--save=` or `kashin quantize`."
        )
    loaded = load_quantized(directory, head=head)
    if not isinstance(loaded, LoadedClassifier):
        raise CheckpointError(f"{directory}: is no classifier; name one.")
    found = nnx.to_flat_state(nnx.state(loaded.model, PackedKernel))
    if odd := [path for path, _ in found if path[-1] != "kernel"]:
        raise CheckpointError(
            f"{directory}: has the embedding `{'/'.join(map(str, odd[0]))}` packed; "
            "quantize the original without a rule for embeddings."
        )
    tensors = packed_tensors(loaded.model)
    rules, seed = _asked_for(directory / "config.json")
    return QuantizedClassifier(loaded, tensors, rules, seed)


def _asked_for(path: Path) -> tuple[Rules, int]:
    described = read_json(path)["quantization_config"]
    try:
        return rules_from_json(described["rules"]), int(described["seed"])
    except (KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path}: `quantization_config` does not say by what rules ({reason}); "
            "copy it again, or quantize the original again."
        ) from error
