"""The data of a run, as token ids of its model."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from experiments.classification.data import Examples, load_examples
from experiments.classification.evaluation import (
    EvaluationSet,
    encode_checked,
    load_classifier_tokenizer,
    load_evaluation_sets,
)
from experiments.common.quantized_layers import checkpoint_sha256
from experiments.finetuning.batches import TrainingSet
from experiments.finetuning.config import FinetuneConfig
from experiments.finetuning.model import Start

__all__ = ["RunData", "load_data"]


class RunData(NamedTuple):
    """Token ids of all splits, and what they come from.

    Attributes:
      training: What is learnt from.
      evaluation: What is scored.
      identity: Hashes that decide the final weights.
      notes: What a user should know about the data, one sentence each.
    """

    training: TrainingSet
    evaluation: tuple[EvaluationSet, ...]
    identity: dict[str, str]
    notes: tuple[str, ...]

    @property
    def num_examples(self) -> int:
        """Size of the training set."""
        return len(self.training.targets)


def load_data(config: FinetuneConfig, start: Start) -> RunData:
    """Reads and tokenizes the training set and the evaluation splits of the task.

    Raises:
      UsageError: If `max_length` exceeds the positions of the model or leaves no room
        for text.
      CheckpointError: If the tokenizer cannot be read, or is not the model's.
      DataError: If a file is missing or malformed.
    """
    task, loaded = config.glue_task, start.loaded
    data_dir = Path(config.data_dir) if config.data_dir else None
    tokenizer = load_classifier_tokenizer(
        loaded.directory, loaded.config, config.max_length
    )
    examples = load_examples(task, "train", data_dir)
    encoded = encode_checked(tokenizer, examples, loaded.config, config.max_length)
    targets = _targets(examples, start.order)
    notes = [f"{len(targets)} training examples ({examples.source})."]
    if encoded.num_truncated:
        notes.append(
            f"{encoded.num_truncated} of them were cut to {config.max_length} tokens."
        )
    if examples.num_skipped:
        notes.append(f"{examples.num_skipped} damaged rows were left out.")
    return RunData(
        training=TrainingSet(encoded, targets, loaded.config.pad_token_id),
        evaluation=load_evaluation_sets(
            task,
            loaded,
            data_dir=data_dir,
            max_length=config.max_length,
            tokens_per_batch=config.eval_batch_size * config.max_length,
        ),
        identity={
            "model_sha256": checkpoint_sha256(loaded.directory),
            "data_sha256": examples.sha256,
        },
        notes=tuple(notes),
    )


def _targets(
    examples: Examples, order: tuple[int, ...]
) -> Int32[np.ndarray, " n"] | Float32[np.ndarray, " n"]:
    if examples.labels.dtype == np.float32:
        return examples.labels
    return np.asarray(order, np.int32)[examples.labels]
