"""Loading models from checkpoints in Hugging Face's layout.

A classifier's checkpoint may hold several heads on one encoder. They are then in
`heads.safetensors`, as `NAME.classifier.weight` and so on, and `config.json` describes
them under `glue_heads`: `{NAME: {"labels": [...]}}`, or, for a value instead of
classes, `{NAME: {"problem_type": "regression"}}`.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key

from kashin_jax.errors import CheckpointError, NonFiniteError, UsageError
from kashin_jax.io import (
    Checkpoint,
    TensorFile,
    checkpoint_directory,
    open_checkpoint,
    open_safetensors,
    read_json,
)
from kashin_jax.models.architecture import Architecture, ParamPath, abstract_state
from kashin_jax.models.bert import (
    REGRESSION,
    SINGLE_LABEL,
    ClassifierConfig,
    SequenceClassifier,
)
from kashin_jax.models.names import StoredName
from kashin_jax.models.opt import OPT
from kashin_jax.models.registry import ARCHITECTURES, find_architecture

__all__ = [
    "LoadedClassifier",
    "LoadedModel",
    "head_names",
    "load_classifier",
    "load_language_model",
    "load_model",
    "load_opt",
]

_DTYPES = ("float32", "bfloat16", "float16")
_HEADS_FILE = "heads.safetensors"
_HEADS_KEY = "glue_heads"

# A tensor to read: its file, and its name there.
Place = tuple[TensorFile, str]


class LoadedModel(NamedTuple):
    """A language model and where it came from.

    Attributes:
      model: A `CausalLM`, in evaluation mode.
      config: Its architecture, a `LanguageConfig`.
      stored_dtype: NumPy name of the precision that most of the weights are stored in,
        such as `float16`.
      directory: Where the checkpoint lies; its tokenizer is there too.
    """

    model: Any
    config: Any
    stored_dtype: str
    directory: Path


class LoadedClassifier(NamedTuple):
    """A classifier and where it came from.

    Attributes:
      model: In evaluation mode.
      config: Its architecture; labels are those of the head that was chosen.
      stored_dtype: NumPy name of the precision that most of the weights are stored in,
        such as `float16`.
      directory: Where the checkpoint lies; its tokenizer is there too.
    """

    model: SequenceClassifier
    config: ClassifierConfig
    stored_dtype: str
    directory: Path


def load_model(
    source: str | Path | Checkpoint,
    *,
    dtype: DTypeLike = jnp.float32,
    head: str | None = None,
) -> LoadedModel | LoadedClassifier:
    """Loads a model of any architecture in the registry, tensor by tensor.

    Reads `model.safetensors`, else `flax_model.msgpack`, else `pytorch_model.bin` (the
    last needs torch), whole or in shards with an index.

    Args:
      source: A directory, a hub id, which is downloaded, or what `open_checkpoint`
        returned. Parameters that the checkpoint holds packed are left as shapes:
        `load_quantized` puts packed layers in their place.
      dtype: Type of parameters and activations: float32, bfloat16 or float16.
      head: Which head, for classifiers with several.

    Returns:
      The model, ready for evaluation.

    Raises:
      CheckpointError: If the checkpoint cannot be found or read, is of an architecture
        that is not in the registry, has no or several heads while none is chosen, or
        has missing, unexpected or mis-shaped tensors.
      NonFiniteError: If a weight is NaN or infinite, or overflows `dtype`.
      UsageError: If `dtype` is not supported, or a language model has no `head`.
    """
    dtype = _check_dtype(dtype)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    config, where = _read_config(checkpoint)
    architecture = find_architecture(config, where)
    if architecture.head is not None:
        return _load_classifier(checkpoint, architecture, dtype, head=head)
    if head is not None:
        raise UsageError(f"`head`={head!r} is for classifiers; leave it out.")
    return _load_language_model(checkpoint, architecture, dtype)


def load_language_model(
    path_or_id: str | Path, *, dtype: DTypeLike = jnp.float32
) -> LoadedModel:
    """Loads a dense language model of any architecture that runs; see `load_model`.

    Args:
      path_or_id: A directory, or a hub id, which is downloaded.
      dtype: Type of parameters and activations: float32, bfloat16 or float16.

    Raises:
      CheckpointError: As `load_model`, or if it is quantized.
      NonFiniteError: If a weight is NaN or infinite, or overflows `dtype`.
      UsageError: If it is a classifier, or `dtype` is not supported.
    """
    dtype = _check_dtype(dtype)
    checkpoint = _open_dense(path_or_id)
    architecture = find_architecture(*_read_config(checkpoint))
    if architecture.head is not None:
        raise UsageError(
            f"{checkpoint.directory}: is a classifier ({architecture.model_type}); "
            "name a language model."
        )
    return _load_language_model(checkpoint, architecture, dtype)


def load_opt(path_or_id: str | Path, *, dtype: DTypeLike = jnp.float32) -> LoadedModel:
    """Loads an OPT checkpoint, tensor by tensor; see `load_model`.

    Args:
      path_or_id: A directory, or a hub id, which is downloaded.
      dtype: Type of parameters and activations: float32, bfloat16 or float16.

    Returns:
      The model, ready for evaluation.

    Raises:
      CheckpointError: If the checkpoint cannot be found or read, is quantized or of
        another architecture, or has missing, unexpected or mis-shaped tensors.
      NonFiniteError: If a weight is NaN or infinite, or overflows `dtype`.
      UsageError: If `dtype` is not supported.
    """
    dtype = _check_dtype(dtype)
    return _load_language_model(_open_dense(path_or_id), OPT, dtype)


def load_classifier(
    path_or_id: str | Path,
    *,
    head: str | None = None,
    labels: tuple[str, ...] | None = None,
    key: Key[Array, ""] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> LoadedClassifier:
    """Loads a classifier, or puts a fresh head on an encoder; see `load_model`.

    Args:
      path_or_id: A directory, or a hub id, which is downloaded.
      head: Which head, for checkpoints with several.
      labels: Names of the outputs of a fresh head; any stored head is left alone, and
        with it BERT's pooler if none is stored. Empty for one value (regression).
      key: Draws the fresh head; `jax.random.key(0)` when None.
      dtype: Type of parameters and activations: float32, bfloat16 or float16.

    Returns:
      The model, ready for evaluation.

    Raises:
      CheckpointError: If the checkpoint cannot be found or read, is quantized or of
        another architecture, has no or several heads while none is chosen, or has
        missing, unexpected or mis-shaped tensors.
      NonFiniteError: If a weight is NaN or infinite, or overflows `dtype`.
      UsageError: If `dtype` is not supported, or `head` and `labels` are both given.
    """
    dtype = _check_dtype(dtype)
    if head is not None and labels is not None:
        raise UsageError("`head` and `labels` exclude each other; give one of them.")
    checkpoint = _open_dense(path_or_id)
    content, where = _read_config(checkpoint)
    # Refuses other architectures.
    model_type = ClassifierConfig.from_dict(content, where).model_type
    return _load_classifier(
        checkpoint, ARCHITECTURES[model_type], dtype, head=head, labels=labels, key=key
    )


def head_names(path_or_id: str | Path) -> tuple[str, ...]:
    """Names of the heads of a checkpoint with several; empty where there is one.

    Raises:
      CheckpointError: If the checkpoint cannot be found, or its configuration read.
    """
    source = checkpoint_directory(path_or_id) / "config.json"
    return tuple(_heads(read_json(source), str(source)))


def _check_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype, if a model can be loaded in it; raises UsageError if not."""
    if (dtype := jnp.dtype(dtype)).name not in _DTYPES:
        raise UsageError(f"`dtype` must be one of {_DTYPES}. Got {dtype.name}.")
    return dtype


def _open_dense(path_or_id: str | Path) -> Checkpoint:
    checkpoint = open_checkpoint(path_or_id)
    if checkpoint.descriptions:
        raise CheckpointError(
            f"{checkpoint.directory}: holds {len(checkpoint.descriptions)} packed "
            "tensors; load it with `load_quantized`."
        )
    return checkpoint


def _read_config(checkpoint: Checkpoint) -> tuple[Mapping[str, Any], str]:
    """Content of `config.json`, and its path for messages."""
    where = str(checkpoint.directory / "config.json")
    if not checkpoint.config:
        raise CheckpointError(f"{where}: is missing; copy or download it.")
    return checkpoint.config, where


def _load_language_model(
    checkpoint: Checkpoint, architecture: Architecture, dtype: np.dtype
) -> LoadedModel:
    config: Any = architecture.config.from_dict(*_read_config(checkpoint))
    loading = _Loading(architecture, config, dtype)
    is_tied = architecture.tied is not None and config.tie_word_embeddings
    if architecture.tied is not None and is_tied:
        # The head is stored all the same by some, and then has to be the embedding.
        head, embedding = architecture.tied
        shape = loading.state[embedding].shape[::-1]
        loading.targets[head] = nnx.Param(jax.ShapeDtypeStruct(shape, dtype))
    loading.read(checkpoint)
    if architecture.tied is not None and is_tied:
        loading.drop_tied(checkpoint.directory, *architecture.tied)
    loading.check_complete(checkpoint.directory)
    return LoadedModel(
        loading.model(), config, loading.stored_dtype(), checkpoint.directory
    )


def _load_classifier(
    checkpoint: Checkpoint,
    architecture: Architecture,
    dtype: np.dtype,
    *,
    head: str | None = None,
    labels: tuple[str, ...] | None = None,
    key: Key[Array, ""] | None = None,
) -> LoadedClassifier:
    content, where = _read_config(checkpoint)
    config = ClassifierConfig.from_dict(content, where)
    if labels is None:
        config = _with_stored_head(config, _heads(content, where), head, where)
    else:
        config = _relabelled(config, labels)
    loading = _Loading(architecture, config, dtype)
    loading.read(checkpoint, leave_head=labels is not None)
    if head is not None:
        loading.read_head(checkpoint.directory / _HEADS_FILE, head)
    if labels is not None:
        loading.draw_fresh(jax.random.key(0) if key is None else key)
    loading.check_complete(checkpoint.directory)
    return LoadedClassifier(
        loading.model(), config, loading.stored_dtype(), checkpoint.directory
    )


class _Tensor(NamedTuple):
    label: str
    name: str
    is_transposed: bool
    value: np.ndarray


class _Loading:
    """A model that is being filled, variable by variable.

    Attributes:
      state: All variables that the model has, as shapes.
      targets: Those that a file may hold: these, and a tied output matrix.
    """

    def __init__(self, architecture: Architecture, config: Any, dtype: np.dtype):
        self._architecture, self._config, self._dtype = architecture, config, dtype
        self._graphdef, state = abstract_state(architecture.model, config, dtype)
        self.state: dict[ParamPath, nnx.Variable] = dict(nnx.to_flat_state(state))
        self.targets = dict(self.state)
        self._loaded: dict[ParamPath, nnx.Variable] = {}
        self._packed: set[ParamPath] = set()
        self._sizes: collections.Counter[str] = collections.Counter()

    def model(self) -> Any:
        """The model, of what was loaded."""
        return nnx.merge(self._graphdef, nnx.from_flat_state(self._loaded))

    def stored_dtype(self) -> str:
        """NumPy name of the precision that most of the values have on disk."""
        return self._sizes.most_common(1)[0][0]

    def read(self, checkpoint: Checkpoint, *, leave_head: bool = False) -> None:
        """Reads all tensors of a checkpoint; what is packed stays a shape.

        Raises:
          CheckpointError: If a file is damaged or empty, or a tensor is not part of the
            model, stored twice, or of another shape or kind.
          NonFiniteError: If a weight is NaN or infinite, or overflows the dtype.
        """
        names = self._architecture.names
        # Under other names than this model's, a head may be anything.
        left = {stem.split(".")[0] for stem in self._head()} if leave_head else set()

        def parse(stored: str) -> StoredName | None:
            parsed = names.parse(stored)
            is_left = parsed is not None and parsed.name.split(".")[0] in left
            return None if is_left else parsed

        by_name = {names.stem(path): path for path in self.targets}
        plain, packed = [], checkpoint.descriptions
        for stored in checkpoint.names():
            if stored not in packed:
                plain.append((checkpoint.file_of(stored), stored))
            elif (parsed := parse(stored)) is not None and parsed.name in by_name:
                self._packed.add(by_name[parsed.name])
        self._read(plain, by_name, parse)
        if not self._sizes:
            raise CheckpointError(
                f"{', '.join(str(file.path) for file in checkpoint.files.values())}: "
                "nothing to load is in there; get new files."
            )
        self._loaded |= {path: self.targets[path] for path in self._packed}

    def read_head(self, path: Path, head: str) -> None:
        """Reads one of several heads from a file of its own."""
        if not path.is_file():
            raise CheckpointError(f"{path}: is missing; it holds the head {head!r}.")

        def parse(stored: str) -> StoredName | None:
            name = stored.removeprefix(f"{head}.")
            return None if name == stored else self._architecture.names.parse(name)

        file = open_safetensors(path)
        self._read([(file, stored) for stored in file.specs], self._head(), parse)

    def draw_fresh(self, key: Key[Array, ""]) -> None:
        """Draws the modules of a fresh head that were not stored."""
        # A graph of its own, since only one small part of it is kept.
        whole = self._architecture.model(
            self._config,
            rngs=nnx.Rngs(params=key),
            dtype=self._dtype,
            param_dtype=self._dtype,
        )
        drawn = dict(nnx.to_flat_state(nnx.state(whole)))
        for path in self.state.keys() - self._loaded.keys():
            if path[0] in self._architecture.fresh:
                self._loaded[path] = drawn[path]

    def drop_tied(self, directory: Path, head: ParamPath, embedding: ParamPath) -> None:
        """Forgets an output matrix that is the embedding; CheckpointError if not."""
        if (found := self._loaded.pop(head, None)) is None:
            return
        # What is packed has no values here; quantizing has tied or refused it.
        if self._packed & {head, embedding} or embedding not in self._loaded:
            return
        if not jnp.array_equal(found[...].T, self._loaded[embedding][...]):
            raise CheckpointError(
                f"{directory}: `{self._architecture.names.published(head)}` differs "
                "from the token embedding that config.json ties it to; set "
                "`tie_word_embeddings` to false there."
            )

    def check_complete(self, directory: Path) -> None:
        """Raises CheckpointError, naming the first, if variables are missing."""
        missing = [path for path in self.state if path not in self._loaded]
        if not missing:
            return
        names, fresh = self._architecture.names, self._architecture.fresh
        remedy = (
            "this is an encoder without a head: fine-tune it first, or name fresh "
            "`labels`."
            if all(path[0] in fresh for path in missing)
            else "use the weights published with config.json."
        )
        raise CheckpointError(
            f"{directory}: {len(missing)} tensors are missing, the first is "
            f"`{min(map(names.published, missing))}`; {remedy}"
        )

    def _head(self) -> dict[str, ParamPath]:
        head, names = self._architecture.head, self._architecture.names
        return {names.stem(path): path for path in self.state if path[0] == head}

    def _read(
        self,
        places: Iterable[Place],
        by_name: Mapping[str, ParamPath],
        parse: Callable[[str], StoredName | None],
    ) -> None:
        read: set[ParamPath] = set()
        for file, stored in places:
            if (parsed := parse(stored)) is None:
                continue
            label = f"{file.path}: `{stored}`"
            if parsed.name not in by_name:
                raise CheckpointError(
                    f"{label} is not part of the model that config.json describes; use "
                    "the two files that were published together."
                )
            path = by_name[parsed.name]
            if path in read:
                raise CheckpointError(f"{label} is stored twice; remove one copy.")
            read.add(path)
            tensor = _Tensor(label, *parsed, file.read(stored))
            variable = self.targets[path]
            array = _converted(tensor, path, variable.shape, self._dtype)
            self._loaded[path] = variable.replace(array)
            self._sizes[tensor.value.dtype.name] += tensor.value.size


def _converted(
    tensor: _Tensor, path: ParamPath, shape: tuple[int, ...], dtype: np.dtype
) -> Float[Array, "..."]:
    value = tensor.value
    if value.dtype.name not in _DTYPES:
        raise CheckpointError(
            f"{tensor.label} is stored as {value.dtype.name}; only {_DTYPES} can be "
            "loaded."
        )
    flip = path[-1] == "kernel" and tensor.is_transposed
    expected = shape[::-1] if flip else shape
    if value.shape != expected:
        raise CheckpointError(
            f"{tensor.label} has shape {value.shape}, but config.json asks for "
            f"{expected}; use the two files that were published together."
        )
    cast, is_finite = _cast(jnp.asarray(value), dtype, flip)
    if not is_finite:
        raise NonFiniteError(
            f"{tensor.label} overflows {dtype.name}; load it in a wider dtype."
            if np.isfinite(value).all()
            else f"{tensor.label} has NaN or infinite values; download it again."
        )
    return cast


@jax.jit(static_argnums=(1, 2))
def _cast(
    value: Float[Array, "..."], dtype: np.dtype, flip: bool
) -> tuple[Float[Array, "..."], Bool[Array, ""]]:
    """A weight in its type and orientation, and whether all of it is finite.

    By XLA: NumPy took 4.1 seconds of CPU for an embedding of 128256 x 2048 in bfloat16,
    all of it passed through memory four times, and this takes 1.1 to 1.6.
    """
    cast = (value.T if flip else value).astype(dtype)
    return cast, jnp.isfinite(cast).all()


def _heads(content: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    heads = content.get(_HEADS_KEY, {})
    if not isinstance(heads, Mapping) or not all(
        isinstance(head, Mapping) for head in heads.values()
    ):
        raise CheckpointError(
            f"{source}: field `{_HEADS_KEY}` is not an object of objects; restore the "
            "config.json that was published with the checkpoint."
        )
    return heads


def _with_stored_head(
    config: ClassifierConfig, heads: Mapping[str, Any], head: str | None, source: str
) -> ClassifierConfig:
    if head is None and not heads:
        return config
    if head is None or head not in heads:
        known = ", ".join(heads) or "one without a name"
        raise CheckpointError(
            f"{source}: has no head {head!r}; its heads are: {known}."
        )
    described = heads[head]
    labels = described.get("labels", ())
    if not isinstance(labels, list | tuple):
        raise CheckpointError(
            f"{source}: `labels` of head {head!r} is {labels!r}; expected a list."
        )
    if not labels and described.get("problem_type") != REGRESSION:
        raise CheckpointError(
            f"{source}: head {head!r} has neither `labels` nor `problem_type` "
            f"{REGRESSION!r}; restore the file."
        )
    return _relabelled(config, tuple(map(str, labels)))


def _relabelled(config: ClassifierConfig, labels: tuple[str, ...]) -> ClassifierConfig:
    return dataclasses.replace(
        config,
        id2label=labels or ("LABEL_0",),
        problem_type=SINGLE_LABEL if labels else REGRESSION,
    )
