"""Outputs of a classifier on the evaluation splits of a task, and their metrics."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Num
from tqdm import tqdm

from experiments.classification.data import load_examples
from experiments.classification.encoding import (
    Batch,
    EncodedExamples,
    bucket_batches,
    encode_examples,
    in_example_order,
)
from experiments.classification.metrics import glue_metrics
from experiments.classification.tasks import Task
from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.models import ClassifierConfig, LoadedClassifier, SequenceClassifier
from kashin_jax.models.tokenizer import (
    PairTokenizer,
    check_padding,
    check_vocabulary,
    load_pair_tokenizer,
)

__all__ = [
    "EvaluationSet",
    "classifier_outputs",
    "encode_checked",
    "load_classifier_tokenizer",
    "load_evaluation_sets",
    "score",
]


class EvaluationSet(NamedTuple):
    """A split that is scored.

    Attributes:
      split: Its name.
      labels: As in `Examples.labels`.
      batches: All examples, from short to long.
      num_truncated: Examples that were cut to the greatest length.
      num_skipped: Damaged rows of the file that were left out.
      source: Where the file is from.
      sha256: Of the file.
    """

    split: str
    labels: Num[np.ndarray, " n"]
    batches: Sequence[Batch]
    num_truncated: int
    num_skipped: int
    source: str
    sha256: str


def load_classifier_tokenizer(
    directory: Path, config: ClassifierConfig, max_length: int
) -> PairTokenizer:
    """The tokenizer of a classifier, checked against the model.

    Raises:
      CheckpointError: If it is missing or damaged, or not this model's.
      UsageError: If `max_length` exceeds the positions of the model.
    """
    if max_length > config.max_length:
        raise UsageError(
            f"`--max_length`={max_length} exceeds the {config.max_length} positions of "
            "the model; lower it."
        )
    tokenizer = load_pair_tokenizer(directory)
    check_vocabulary(tokenizer, config.vocab_size)
    check_padding(tokenizer, config.pad_token_id)
    return tokenizer


def encode_checked(
    tokenizer: PairTokenizer, examples: Any, config: ClassifierConfig, max_length: int
) -> EncodedExamples:
    """Encodes examples, and checks that the model knows the token types.

    Raises:
      CheckpointError: If the tokenizer marks sentences by types the model lacks.
    """
    encoded = encode_examples(tokenizer, examples, max_length)
    used, known = int(encoded.token_type_ids.max(initial=0)) + 1, config.type_vocab_size
    # The lookup of a type that the model lacks would give another one's vector.
    if known and used > known:
        raise CheckpointError(
            f"The tokenizer uses {used} token types, the model's `type_vocab_size` is "
            f"{known}; use the tokenizer files that came with this checkpoint."
        )
    return encoded


def load_evaluation_sets(
    task: Task,
    loaded: LoadedClassifier,
    *,
    data_dir: Path | None,
    max_length: int,
    tokens_per_batch: int,
) -> tuple[EvaluationSet, ...]:
    """Reads, tokenizes and batches the evaluation splits of a task.

    Raises:
      UsageError: If `max_length` does not suit the model.
      CheckpointError: If the tokenizer cannot be used, or is not the model's.
      DataError: If a file is missing or malformed.
    """
    config = loaded.config
    tokenizer = load_classifier_tokenizer(loaded.directory, config, max_length)
    sets = []
    for split in task.evaluation_splits:
        examples = load_examples(task, split, data_dir)
        encoded = encode_checked(tokenizer, examples, config, max_length)
        batches = bucket_batches(
            encoded, pad_id=config.pad_token_id, tokens_per_batch=tokens_per_batch
        )
        sets.append(
            EvaluationSet(
                split,
                examples.labels,
                batches,
                encoded.num_truncated,
                examples.num_skipped,
                examples.source,
                examples.sha256,
            )  # fmt: skip
        )
    return tuple(sets)


# Encoder and head apart: models that differ only in their heads, one per task, share
# the compilations of the encoder, one for each bucket.
@functools.partial(jax.jit, static_argnums=0)
def _first_states(
    graphdef: Any, state: Any, ids: Array, mask: Array, types: Array
) -> Float[Array, "b d"]:
    return nnx.merge(graphdef, state)(ids, mask, types)[:, 0]


def classifier_outputs(
    model: SequenceClassifier,
    evaluation_set: EvaluationSet,
    order: tuple[int, ...],
    *,
    progress: str | None = None,
) -> Float[np.ndarray, "n k"]:
    """Outputs for every example, columns in the order of the task's labels.

    Args:
      model: In evaluation mode, with dense or packed layers.
      evaluation_set: What is scored.
      order: From `output_order`.
      progress: Label of a progress bar; None for none.
    """
    graphdef, state = nnx.split(model.encoder)
    batches = tqdm(
        evaluation_set.batches, desc=progress, unit="batch", leave=False,
        disable=True if progress is None else None,
    )  # fmt: skip
    states = [
        np.asarray(
            _first_states(
                graphdef, state, batch.input_ids, batch.attention_mask,
                batch.token_type_ids,
            )
        )
        for batch in batches
    ]  # fmt: skip
    first = in_example_order(evaluation_set.batches, states)
    return np.asarray(model.classify(jax.device_put(first)))[:, list(order)]


def score(
    task: Task,
    sets: Sequence[EvaluationSet],
    outputs: Sequence[Float[np.ndarray, "n k"]],
) -> dict[str, float]:
    """All metrics of a task, in percent."""
    metrics: dict[str, float] = {}
    for one, found in zip(sets, outputs, strict=True):
        metrics |= glue_metrics(task, found, one.labels, split=one.split)
    return metrics
