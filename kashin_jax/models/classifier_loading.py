"""Loading BERT, RoBERTa and DistilBERT classifiers in Hugging Face's layout.

A checkpoint may hold several heads on one encoder. They are then in
`heads.safetensors`, as `NAME.classifier.weight` and so on, and `config.json` describes
them under `glue_heads`: `{NAME: {"labels": [...]}}`, or, for a value instead of
classes, `{NAME: {"problem_type": "regression"}}`.
"""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.io import (
    Checkpoint,
    checkpoint_directory,
    open_checkpoint,
    open_safetensors,
    read_json,
)
from kashin_jax.models.bert import ClassifierConfig, SequenceClassifier
from kashin_jax.models.classifier_config import REGRESSION, SINGLE_LABEL
from kashin_jax.models.classifier_names import (
    classifier_name,
    is_foreign,
    parse_classifier_name,
)
from kashin_jax.models.names import StoredName
from kashin_jax.models.reading import (
    LoadedVariables,
    ParamPath,
    abstract_state,
    check_dtype,
    load_variables,
    present,
)
from kashin_jax.models.saving import save_classifier

__all__ = [
    "LoadedClassifier",
    "head_names",
    "load_classifier",
    "save_classifier",
]

HEADS_FILE = "heads.safetensors"
_HEADS_KEY = "glue_heads"
_HEAD = "classifier"


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


def head_names(path_or_id: str | Path) -> tuple[str, ...]:
    """Names of the heads of a checkpoint with several; empty where there is one.

    Raises:
      CheckpointError: If the checkpoint cannot be found, or its configuration read.
    """
    source = checkpoint_directory(path_or_id) / "config.json"
    return tuple(_heads(read_json(source), source))


def load_classifier(
    path_or_id: str | Path,
    *,
    head: str | None = None,
    labels: tuple[str, ...] | None = None,
    key: Key[Array, ""] | None = None,
    dtype: DTypeLike = jnp.float32,
    absent: Collection[str] = (),
) -> LoadedClassifier:
    """Loads a classifier, or puts a fresh head on an encoder.

    Reads `model.safetensors`, else `flax_model.msgpack`, else `pytorch_model.bin` (the
    last needs torch), whole or in shards with an index.

    Args:
      path_or_id: A directory, or a hub id, which is downloaded.
      head: Which head, for checkpoints with several.
      labels: Names of the outputs of a fresh head; any stored head is left alone, and
        with it BERT's pooler if none is stored. Empty for one value (regression).
      key: Draws the fresh head; `jax.random.key(0)` when None.
      dtype: Of parameters and activations: float32, bfloat16 or float16.
      absent: Stored names of tensors that the files hold in a form of their own, as
        NAME.LEAF; they are left out, and their variables stay shapes.

    Returns:
      The model, ready for evaluation.

    Raises:
      CheckpointError: If the checkpoint cannot be found or read, is of another
        architecture, has no or several heads while none is chosen, or has missing,
        unexpected or mis-shaped tensors.
      NonFiniteError: If a weight is NaN or infinite, or overflows `dtype`.
      UsageError: If `dtype` is not supported, or `head` and `labels` are both given.
    """
    dtype = check_dtype(dtype)
    if head is not None and labels is not None:
        raise UsageError("`head` and `labels` exclude each other; give one of them.")
    checkpoint = open_checkpoint(path_or_id)
    directory = checkpoint.directory
    source, content = directory / "config.json", checkpoint.config
    if not content:
        raise CheckpointError(f"{source}: is missing; copy or download it.")
    config = ClassifierConfig.from_dict(content, str(source))
    if labels is None:
        config = _with_stored_head(config, _heads(content, source), head, source)
    else:
        config = _relabelled(config, labels)

    graphdef, state = abstract_state(SequenceClassifier, config, dtype)
    targets = dict(nnx.to_flat_state(state))
    loaded = _load(checkpoint, config, targets, head, labels is not None, dtype, absent)
    variables = loaded.variables | _left_out(targets, config, absent)
    if labels is not None:
        # A graph of its own, since only one small part of it is kept.
        root = jax.random.key(0) if key is None else key
        whole = SequenceClassifier(
            config, rngs=nnx.Rngs(params=root), dtype=dtype, param_dtype=dtype
        )
        fresh = dict(nnx.to_flat_state(nnx.state(whole)))
        drawn = {path: fresh[path] for path in targets if _may_be_fresh(path)}
        variables = drawn | variables
    _check_complete(directory, config, targets, variables)
    model = nnx.merge(graphdef, nnx.from_flat_state(variables))
    return LoadedClassifier(model, config, loaded.stored_dtype, directory)


def _may_be_fresh(path: ParamPath) -> bool:
    return path[0] in (_HEAD, "pooler")


def _heads(content: Mapping[str, Any], source: Path) -> Mapping[str, Any]:
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
    config: ClassifierConfig,
    heads: Mapping[str, Any],
    head: str | None,
    source: Path,
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


def _load(
    checkpoint: Checkpoint,
    config: ClassifierConfig,
    targets: Mapping[ParamPath, nnx.Variable],
    head: str | None,
    leave_head: bool,
    dtype: Any,
    absent: Collection[str],
) -> LoadedVariables:
    kind = config.model_type
    prefix = f"{kind}."
    by_name = {
        classifier_name(path, kind).removeprefix(prefix): (path, variable)
        for path, variable in targets.items()
    }
    of_head = {name for name, (path, _) in by_name.items() if path[0] == _HEAD}
    # Under other names than this model's, a head may be anything.
    roots = {name.split(".")[0] for name in of_head}

    def parse(stored: str) -> StoredName | None:
        parsed = parse_classifier_name(stored, kind)
        is_left = leave_head and parsed.name.split(".")[0] in roots
        return None if is_left or is_foreign(parsed.name, kind) else parsed

    def parse_head(stored: str) -> StoredName | None:
        name = stored.removeprefix(f"{head}.")
        return None if name == stored else parse_classifier_name(name, kind)

    files = checkpoint.files.values()
    loaded = load_variables(files, by_name, present(parse, absent), dtype)
    if head is None:
        return loaded
    path = checkpoint.directory / HEADS_FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing; it holds the head {head!r}.")
    heads = {name: by_name[name] for name in of_head}
    found = load_variables([open_safetensors(path)], heads, parse_head, dtype)
    return loaded._replace(variables=loaded.variables | found.variables)


def _left_out(
    targets: Mapping[ParamPath, nnx.Variable],
    config: ClassifierConfig,
    absent: Collection[str],
) -> dict[ParamPath, nnx.Variable]:
    kind = config.model_type
    left = {parse_classifier_name(name, kind).name for name in absent}
    return {
        path: variable
        for path, variable in targets.items()
        if classifier_name(path, kind).removeprefix(f"{kind}.") in left
    }


def _check_complete(
    directory: Path,
    config: ClassifierConfig,
    targets: Mapping[ParamPath, nnx.Variable],
    variables: Mapping[ParamPath, nnx.Variable],
) -> None:
    missing = [path for path in targets if path not in variables]
    if not missing:
        return
    first = min(classifier_name(path, config.model_type) for path in missing)
    remedy = (
        "this is an encoder without a head: fine-tune it first, or name fresh `labels`."
        if all(map(_may_be_fresh, missing))
        else "use the weights published with config.json."
    )
    raise CheckpointError(
        f"{directory}: {len(missing)} tensors are missing, the first is `{first}`; "
        f"{remedy}"
    )
