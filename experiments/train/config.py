"""All choices of a training run, each a command-line flag of the same name."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from experiments.common.flags import (
    COUNT,
    GIVEN,
    POSITIVE,
    POSITIVE_COUNT,
    RATE,
    SHARE,
    check_flags,
    flag,
)
from kashin_jax.errors import UsageError
from kashin_jax.models.opt import OPTConfig

__all__ = ["DTYPES", "TrainConfig"]

_ASSETS = Path(__file__).resolve().parents[1] / "assets"
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
# Special tokens and bytes, of which every byte-level BPE of OPT consists at least.
_SMALLEST_BPE = 260


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run; the defaults are the recipe of opt-wiki-18m. Meanings are in the flags.

    Raises:
      UsageError: If a value cannot work; the message names the flag.
    """

    text_file: tuple[str, ...] = flag(
        (),
        "UTF-8 text to train on; may be given several times.",
        GIVEN,
        is_repeated=True,
    )
    separator: str = flag(
        "", "Line between two documents; the default is an empty line."
    )
    wikitext_spacing: float = flag(
        0.0,
        "Share of the documents to rewrite in WikiText's spacing; the recipe: 0.8.",
        SHARE,
    )
    tokenizer: str = flag(
        str(_ASSETS / "opt-wiki-18m"), "Directory with a tokenizer.json.", GIVEN
    )
    vocab_size: int = flag(
        0,
        "Train a byte-level BPE of this size on the text instead; 0: do not.",
        (lambda x: x == 0 or x >= _SMALLEST_BPE, f"0 or at least {_SMALLEST_BPE}"),
    )
    cache_dir: str = flag(
        ".cache/train_opt", "Directory for texts once tokenized.", GIVEN
    )

    layers: int = flag(8, "Blocks.", POSITIVE_COUNT)
    hidden_size: int = flag(384, "Width of the residual stream.", POSITIVE_COUNT)
    heads: int = flag(6, "Attention heads per block.", POSITIVE_COUNT)
    ffn_dim: int = flag(1536, "Width inside the feed-forward parts.", POSITIVE_COUNT)
    max_positions: int = flag(1024, "Positions that the model has.", POSITIVE_COUNT)
    context: int = flag(
        512, "Tokens that one training window predicts.", POSITIVE_COUNT
    )
    dropout: float = flag(0.05, "Dropout rate.", RATE)

    steps: int = flag(9000, "Optimizer steps of the whole run.", POSITIVE_COUNT)
    batch_size: int = flag(192, "Windows per optimizer step.", POSITIVE_COUNT)
    grad_accumulation: int = flag(
        1, "Parts into which a batch is cut for memory.", POSITIVE_COUNT
    )
    learning_rate: float = flag(2e-3, "Peak learning rate.", POSITIVE)
    warmup_steps: int = flag(300, "Steps of linear warm-up.", COUNT)
    final_fraction: float = flag(
        0.05, "Last learning rate of the cosine, as a fraction of the peak.", SHARE
    )
    weight_decay: float = flag(0.1, "Decoupled weight decay of matrices.", COUNT)
    beta1: float = flag(0.9, "AdamW's decay of the mean gradient.", RATE)
    beta2: float = flag(0.95, "AdamW's decay of the mean squared gradient.", RATE)
    clip: float = flag(1.0, "Largest global norm of the gradient.", POSITIVE)
    dtype: str = flag(
        "bfloat16",
        "Of activations, bfloat16 or float32; weights are float32.",
        (DTYPES.__contains__, " or ".join(DTYPES)),
    )
    seed: int = flag(0, "Seed of weights, dropout and order of documents.", COUNT)

    out: str = flag(
        "", "Directory of the run; an unfinished run in it is resumed.", GIVEN
    )
    results: str = flag(
        "", "Directory whose train_opt.jsonl receives the log; empty: none does."
    )
    log_every: int = flag(50, "Steps per line of log.jsonl.", POSITIVE_COUNT)
    checkpoint_every: int = flag(500, "Steps between checkpoints.", POSITIVE_COUNT)
    stop_after: int = flag(
        0, "Stop this call after so many steps; 0: at the end.", COUNT
    )
    eval_file: str = flag("", "Text whose perplexity is measured on the way.")
    eval_every: int = flag(500, "Steps between these measurements.", POSITIVE_COUNT)
    eval_tokens: int = flag(8192, "Tokens of that text to score; 0: all.", COUNT)

    def __post_init__(self) -> None:
        check_flags(self)
        self._check_pairs()

    def _check_pairs(self) -> None:
        if self.hidden_size % self.heads:
            raise UsageError(
                f"`--heads`={self.heads} must divide `--hidden_size`="
                f"{self.hidden_size}."
            )
        if self.context > self.max_positions:
            raise UsageError(
                f"`--context`={self.context} exceeds `--max_positions`="
                f"{self.max_positions}; lower the one or raise the other."
            )
        if self.batch_size % self.grad_accumulation:
            raise UsageError(
                f"`--grad_accumulation`={self.grad_accumulation} must divide "
                f"`--batch_size`={self.batch_size}."
            )
        if self.warmup_steps >= self.steps:
            raise UsageError(
                f"`--warmup_steps`={self.warmup_steps} must be below `--steps`="
                f"{self.steps}."
            )

    @property
    def compute_dtype(self) -> DTypeLike:
        """Dtype of activations."""
        return DTYPES[self.dtype]

    def model_config(self, vocab_size: int) -> OPTConfig:
        """The architecture; pre-norm, ReLU and tied embeddings as in OPT."""
        return OPTConfig(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            ffn_dim=self.ffn_dim,
            num_attention_heads=self.heads,
            max_position_embeddings=self.max_positions,
            dropout=self.dropout,
        )

    def record_fields(self) -> dict[str, Any]:
        """The choices that decide a log, files by their own name."""
        values = dataclasses.asdict(self)
        for name in ("tokenizer", "eval_file"):
            values[name] = Path(values[name]).name
        values["text_file"] = [Path(file).name for file in self.text_file]
        return {name: values[name] for name in values if name not in _NO_RECORD}

    def identity(self) -> dict[str, Any]:
        """The choices that decide the final weights, the text and tokenizer apart."""
        values = dataclasses.asdict(self)
        return {name: values[name] for name in values if name not in _NO_IDENTITY}


# Files are identified by their content.
_NO_IDENTITY = frozenset({
    "text_file", "separator", "wikitext_spacing", "tokenizer", "cache_dir", "out",
    "results", "log_every", "checkpoint_every", "stop_after", "eval_file", "eval_every",
    "eval_tokens",
})  # fmt: skip
_NO_RECORD = frozenset({
    "cache_dir", "out", "results", "grad_accumulation", "log_every",
    "checkpoint_every", "stop_after",
})  # fmt: skip
