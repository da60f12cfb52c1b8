"""All choices of a fine-tuning run, each a command-line flag of the same name."""

import dataclasses
import math
from typing import Any

from jax.typing import DTypeLike

from experiments.classification.tasks import GLUE_TASKS, TASKS, Task
from experiments.common.flags import (
    COUNT,
    GIVEN,
    POSITIVE,
    POSITIVE_COUNT,
    RATE,
    check_flags,
    flag,
)
from experiments.common.text import ASSETS
from experiments.train.step import DTYPES
from kashin_jax.errors import UsageError

__all__ = ["STORED", "FinetuneConfig"]

STORED = "stored"
"""The value of `--head` that means the only head of a checkpoint."""

_TASK = (lambda x: x in GLUE_TASKS, f"one of {', '.join(GLUE_TASKS)}")
_DROPOUT = (lambda x: x == -1 or 0 <= x < 1, "-1 or in [0, 1)")
_DECAY = (lambda x: 0 <= x < math.inf, "at least 0 and finite")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """A run; meanings are in the flags.

    Raises:
      UsageError: If a value cannot work; the message names the flag.
    """

    task: str = flag("", f"One of {', '.join(GLUE_TASKS)}.", _TASK)
    model: str = flag(
        str(ASSETS / "minilm-glue"),
        "Encoder or classifier: directory or hub id.",
        GIVEN,
    )
    quantized: str = flag(
        "",
        "Quantized classifier, of `experiments.glue --save=` or `kashin quantize`, in "
        "place of --model: codes stay; centroids, scales, biases and norms are "
        "trained, without weight decay.",
    )
    head: str = flag(
        "",
        "Head to start from: a name, for checkpoints with several, or "
        f"`{STORED}` for the only one; the default draws a fresh one.",
    )
    labels: tuple[str, ...] = flag(
        (), "Label of each output of such a head, where it has only generic names."
    )
    data_dir: str = flag(
        "", "Folder with RTE/train.tsv and so on; the rest is downloaded from the hub."
    )
    max_length: int = flag(128, "Longest sequence in tokens.", POSITIVE_COUNT)

    epochs: float = flag(3.0, "Passes over the training set.", POSITIVE)
    batch_size: int = flag(32, "Examples per optimizer step.", POSITIVE_COUNT)
    grad_accumulation: int = flag(
        1, "Parts into which a batch is cut for memory.", POSITIVE_COUNT
    )
    learning_rate: float = flag(2e-5, "Peak learning rate.", POSITIVE)
    warmup_fraction: float = flag(
        0.1, "Share of the steps in which the learning rate rises.", RATE
    )
    weight_decay: float = flag(
        0.01, "Decoupled weight decay of matrices, embeddings among them.", _DECAY
    )
    clip: float = flag(1.0, "Largest global norm of the gradient.", POSITIVE)
    dropout: float = flag(-1.0, "Dropout rate; -1: the checkpoint's.", _DROPOUT)
    dtype: str = flag(
        "float32",
        "Type of activations in training, bfloat16 or float32; weights are float32.",
        (DTYPES.__contains__, " or ".join(DTYPES)),
    )
    seed: int = flag(0, "Seed of the head, dropout and order of examples.", COUNT)

    out: str = flag(
        "", "Directory of the run; an unfinished run in it is resumed.", GIVEN
    )
    log_every: int = flag(50, "Steps per line of log.jsonl.", POSITIVE_COUNT)
    checkpoint_every: int = flag(500, "Steps between checkpoints.", POSITIVE_COUNT)
    stop_after: int = flag(
        0, "Stop this call after so many steps; 0: at the end.", COUNT
    )
    eval_batch_size: int = flag(
        32, "Longest sequences per forward pass on dev data.", POSITIVE_COUNT
    )

    def __post_init__(self) -> None:
        check_flags(self)
        if self.batch_size % self.grad_accumulation:
            raise UsageError(
                f"`--grad_accumulation`={self.grad_accumulation} must divide "
                f"`--batch_size`={self.batch_size}."
            )
        if self.labels and not self.head:
            raise UsageError(
                "`--labels` describes a stored head; name it by `--head` too."
            )
        if self.quantized and self.head:
            raise UsageError(
                "`--quantized` comes with its head; leave `--head` and `--labels` out."
            )

    @property
    def glue_task(self) -> Task:
        """The task that is learnt."""
        return TASKS[self.task]

    @property
    def compute_dtype(self) -> DTypeLike:
        """Dtype of activations in training."""
        return DTYPES[self.dtype]

    def steps(self, num_examples: int) -> int:
        """Optimizer steps in which every example has been seen `epochs` times."""
        return self._steps_of(self.epochs, num_examples)

    def epoch_ends(self, num_examples: int) -> dict[int, float]:
        """Number of steps after which each epoch, and the run, is over."""
        whole = range(1, int(self.epochs) + 1)
        ends = {self._steps_of(epoch, num_examples): float(epoch) for epoch in whole}
        return ends | {self.steps(num_examples): self.epochs}

    def _steps_of(self, epochs: float, num_examples: int) -> int:
        return math.ceil(epochs * num_examples / self.batch_size)

    def identity(self) -> dict[str, Any]:
        """The choices that decide the final weights, model and data apart."""
        values = dataclasses.asdict(self)
        return {name: values[name] for name in values if name not in _NO_IDENTITY}


# Model and data are identified by their content.
_NO_IDENTITY = frozenset({
    "model", "quantized", "data_dir", "out", "log_every", "checkpoint_every",
    "stop_after", "eval_batch_size",
})  # fmt: skip
