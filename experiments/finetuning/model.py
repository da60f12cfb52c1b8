"""The classifier that a run starts from, what of it is trained, and the loss.

A quantized one is refined: its codes stay as they are, and of the rest that is trained
which `kashin_jax.pipeline.refinable` names; embeddings and the head's matrix are not.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, PyTree

from experiments.classification.labels import output_order, with_task_labels
from experiments.classification.quantized import load_classifier_packed
from experiments.common.checkpoints import dense_directory
from experiments.finetuning.batches import TrainBatch
from experiments.finetuning.config import STORED, FinetuneConfig
from experiments.train.step import LossFn, Params
from kashin_jax import Rules
from kashin_jax.models import (
    ClassifierConfig,
    LoadedClassifier,
    SequenceClassifier,
    load_classifier,
)
from kashin_jax.pipeline import packed_tensors
from kashin_jax.pipeline.refinable import Structure, take_apart
from kashin_jax.tensors import QuantizedTensor

__all__ = [
    "Build",
    "Packed",
    "Start",
    "abstract_classifier",
    "load_start",
    "make_loss",
]

# Puts `(params, frozen)` together.
Build: TypeAlias = Callable[[Params, PyTree[Array]], SequenceClassifier]


def decoding_builder(
    structure: Structure,
    config: ClassifierConfig,
    dtype: DTypeLike,
    *,
    training: bool,
) -> Build:
    """A function that makes the dense classifier of `(params, frozen)`.

    Args:
      structure: Of the packed classifier, taken apart.
      config: The architecture; its dropout rates may be other ones.
      dtype: Of activations.
      training: Whether dropout is on.
    """
    graphdef, state = abstract_classifier(config, dtype, training=training)
    templates = dict(nnx.to_flat_state(state))

    def build(params: Params, frozen: PyTree[Array]) -> SequenceClassifier:
        packed = structure.model(params, frozen)
        plain = nnx.to_flat_state(nnx.state(packed, nnx.Param))
        values = {_join(path): variable.get_value() for path, variable in plain}
        for path, tensor in packed_tensors(packed).items():
            values[f"{path}/kernel"] = tensor.decode()
        flat = {
            path: variable.replace(values[_join(path)])
            for path, variable in templates.items()
        }
        return nnx.merge(graphdef, nnx.from_flat_state(flat))

    return build


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


class Packed(NamedTuple):
    """What a quantized classifier is, beyond its parameters.

    Attributes:
      tensors: The packed matrices, by path of their layer, that `(params, frozen)`
        mean.
      rules: What they were made by.
      seed: What they were made by.
      described: Method, bits and so on, for records.
    """

    tensors: Callable[[Params, PyTree[Array]], dict[str, QuantizedTensor]]
    rules: Rules
    seed: int
    described: dict[str, Any]


class Start(NamedTuple):
    """A classifier taken apart into what is trained and what is not.

    Attributes:
      params: What is trained.
      frozen: What is not.
      training: Puts `(params, frozen)` together in the precision of training, with
        dropout.
      evaluation: The same in float32, without dropout.
      loaded: Its configuration, with the dropout rates of the run and the task's names
        of the outputs, and its directory, where the tokenizer is. Training consumes the
        arrays of its model.
      order: The output of each label of the task.
      packed: Of a quantized classifier: how its packed matrices are put together.
    """

    params: Params
    frozen: PyTree[Array]
    training: Build
    evaluation: Build
    loaded: LoadedClassifier
    order: tuple[int, ...]
    packed: Packed | None = None


_REFINE = "`--quantized=` takes it as it is."


def load_start(config: FinetuneConfig) -> Start:
    """Loads the encoder with the head that the flags ask for, or a quantized one.

    All of the first is trained; of the second, what `refinement` says.

    Raises:
      CheckpointError: If the checkpoint cannot be used, has no such head, or a stored
        head is not one for the task.
      UsageError: If the flags contradict the checkpoint.
    """
    if config.quantized:
        return _load_quantized_start(config)
    task = config.glue_task
    loaded = load_classifier(
        dense_directory(config.model, instead=_REFINE),
        head=None if config.head in ("", STORED) else config.head,
        labels=None if config.head else task.labels,
        key=jax.random.fold_in(jax.random.key(config.seed), 0),
    )
    if config.head:
        order = output_order(task, loaded.config.id2label, config.labels)
    else:
        order = tuple(range(task.num_outputs))
    model_config = with_task_labels(loaded.config, task, order)
    model_config = _with_dropout(model_config, config.dropout)
    return Start(
        params=nnx.state(loaded.model, nnx.Param),
        frozen=(),
        training=_builder(model_config, config.compute_dtype, training=True),
        evaluation=_builder(model_config, jnp.float32, training=False),
        loaded=loaded._replace(config=model_config),
        order=order,
    )


def _load_quantized_start(config: FinetuneConfig) -> Start:
    """Takes a quantized classifier apart; codes and matrices are frozen."""
    task = config.glue_task
    found = load_classifier_packed(config.quantized)
    loaded = found.loaded
    order = output_order(task, loaded.config.id2label)
    model_config = _with_dropout(loaded.config, config.dropout)
    parts = take_apart(loaded.model)
    build = partial(decoding_builder, parts.structure, model_config)

    def tensors(params: Params, frozen: PyTree[Array]) -> dict[str, QuantizedTensor]:
        return packed_tensors(parts.structure.model(params, frozen))

    return Start(
        params=parts.params,
        frozen=parts.frozen,
        training=build(config.compute_dtype, training=True),
        evaluation=build(jnp.float32, training=False),
        loaded=loaded._replace(config=model_config),
        order=order,
        packed=Packed(tensors, found.rules, found.seed, found.described),
    )


def _builder(config: ClassifierConfig, dtype: DTypeLike, *, training: bool) -> Build:
    graphdef, _ = abstract_classifier(config, dtype, training=training)
    return lambda params, frozen: nnx.merge(graphdef, params)


def _with_dropout(config: ClassifierConfig, rate: float) -> ClassifierConfig:
    if rate < 0:
        return config
    return dataclasses.replace(
        config,
        hidden_dropout_prob=rate,
        attention_probs_dropout_prob=rate,
        classifier_dropout=rate,
    )


def make_loss(build: Build, *, is_regression: bool) -> LossFn:
    """Mean cross entropy in nats, or mean squared error of a regression."""

    def loss_fn(
        params: Params, frozen: PyTree[Array], batch: TrainBatch, key: Key[Array, ""]
    ) -> Float[Array, ""]:
        ids, mask, types, targets = map(jnp.asarray, batch)
        model = build(params, frozen)
        outputs = model(ids, mask, types, rngs=nnx.Rngs(dropout=key))
        if is_regression:
            return jnp.mean(jnp.square(outputs[:, 0] - targets))
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, targets)
        return jnp.mean(losses)

    return loss_fn
