"""The classifier that a run starts from, what of it is trained, and the loss."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, PyTree

from experiments.classification.labels import output_order, with_task_labels
from experiments.classification.quantized import dense_directory, load_classifier_packed
from experiments.finetuning.batches import TrainBatch
from experiments.finetuning.config import STORED, FinetuneConfig
from experiments.finetuning.refinement import Build, abstract_classifier, take_apart
from experiments.train.step import LossFn, Params
from kashin_jax import Rules
from kashin_jax.models.classifier import ClassifierConfig
from kashin_jax.models.classifier_loading import LoadedClassifier, load_classifier
from kashin_jax.tensors import QuantizedTensor

__all__ = ["Packed", "Start", "load_start", "make_loss"]


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
    parts = take_apart(loaded.model, found.tensors)
    return Start(
        params=parts.params,
        frozen=parts.frozen,
        training=parts.builder(model_config, config.compute_dtype, training=True),
        evaluation=parts.builder(model_config, jnp.float32, training=False),
        loaded=loaded._replace(config=model_config),
        order=order,
        packed=Packed(parts.tensors, found.rules, found.seed, found.described),
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
