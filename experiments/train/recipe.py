"""The choices of a run that trains a language model, and what follows from them."""

import dataclasses
from pathlib import Path
from typing import Any

import optax
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
from experiments.common.text import ASSETS
from experiments.train.loop import LoopSettings
from experiments.train.optimizer import make_optimizer, warmup_cosine
from experiments.train.step import DTYPES
from kashin_jax.errors import UsageError
from kashin_jax.models import OPTConfig
from kashin_jax.models.architecture import LanguageConfig
from kashin_jax.models.registry import ARCHITECTURES

__all__ = ["TrainConfig", "loop_settings", "recipe_optimizer", "recipe_schedule"]

# Special tokens and bytes, of which every byte-level BPE of OPT consists at least.
_SMALLEST_BPE = 260
_ARCHITECTURES = ("opt", "llama")
# Those of an OPT tokenizer, which has no other start than its end.
_SPECIAL_TOKENS = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run; the defaults are the recipe of opt-wiki-18m. Meanings are in the flags.

    Raises:
      UsageError: If a value cannot work; the message names the flag.
    """

    text_file: tuple[str, ...] = flag(
        (),
        "UTF-8 text to train on; may be given several times.",
        is_repeated=True,
    )
    even_file: tuple[str, ...] = flag(
        (),
        "More such text, of which only every second document is trained on, the first "
        "included: the others are left for calibration.",
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
        str(ASSETS / "opt-wiki-18m"), "Directory with a tokenizer.json.", GIVEN
    )
    vocab_size: int = flag(
        0,
        "Train a byte-level BPE of this size on the text instead; 0: do not.",
        (lambda x: x == 0 or x >= _SMALLEST_BPE, f"0 or at least {_SMALLEST_BPE}"),
    )
    cache_dir: str = flag(
        ".cache/train_lm", "Directory for texts once tokenized.", GIVEN
    )

    architecture: str = flag(
        "opt",
        "Of the model: opt, or llama, which has tied embeddings.",
        (_ARCHITECTURES.__contains__, " or ".join(_ARCHITECTURES)),
    )
    layers: int = flag(8, "Blocks of the model.", POSITIVE_COUNT)
    hidden_size: int = flag(384, "Width of the residual stream.", POSITIVE_COUNT)
    heads: int = flag(6, "Attention heads per block.", POSITIVE_COUNT)
    kv_heads: int = flag(
        0, "Heads of keys and values of a Llama; 0: as many as others.", COUNT
    )
    ffn_dim: int = flag(1536, "Width inside the feed-forward parts.", POSITIVE_COUNT)
    max_positions: int = flag(1024, "Positions that the model has.", POSITIVE_COUNT)
    context: int = flag(
        512, "Tokens that one training window predicts.", POSITIVE_COUNT
    )
    dropout: float = flag(0.05, "Dropout rate of an OPT.", RATE)

    teacher: str = flag(
        "", "Directory or hub id of a language model to learn from, of that tokenizer."
    )
    teacher_weight: float = flag(
        0.9,
        "Share of the divergence from the teacher in the loss; the rest is that of the "
        "text.",
        SHARE,
    )
    start: str = flag(
        "random",
        "First weights: random, or teacher, for a Llama whose teacher is an OPT.",
        (("random", "teacher").__contains__, "random or teacher"),
    )

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
        "Type of activations, bfloat16 or float32; weights are float32.",
        (DTYPES.__contains__, " or ".join(DTYPES)),
    )
    seed: int = flag(0, "Seed of weights, dropout and order of documents.", COUNT)

    out: str = flag(
        "", "Directory of the run; an unfinished run in it is resumed.", GIVEN
    )
    results: str = flag(
        "", "Directory whose train_lm.jsonl receives the log; empty: none does."
    )
    log_every: int = flag(50, "Steps per line of log.jsonl.", POSITIVE_COUNT)
    checkpoint_every: int = flag(500, "Steps between checkpoints.", POSITIVE_COUNT)
    stop_after: int = flag(
        0, "Stop this call after so many steps; 0: at the end.", COUNT
    )
    eval_file: str = flag("", "Text whose perplexity is measured on the way.")
    eval_every: int = flag(
        500, "Steps between two measurements of that perplexity.", POSITIVE_COUNT
    )
    eval_tokens: int = flag(8192, "Tokens of that text to score; 0: all.", COUNT)
    patience: int = flag(
        0,
        "End after so many measurements without a better one, and keep the best "
        "model; 0: keep the last.",
        COUNT,
    )

    def __post_init__(self) -> None:
        check_flags(self)
        self._check_pairs()

    def _check_pairs(self) -> None:
        if not self.text_file and not self.even_file:
            raise UsageError("`--text_file` must be given.")
        if self.start == "teacher" and not (
            self.teacher and self.architecture == "llama"
        ):
            raise UsageError(
                "`--start=teacher` needs `--teacher` and `--architecture=llama`."
            )
        if self.patience and not self.eval_file:
            raise UsageError("`--patience` needs an `--eval_file` to measure on.")
        if self.heads % (self.kv_heads or self.heads):
            raise UsageError(
                f"`--kv_heads`={self.kv_heads} must divide `--heads`={self.heads}."
            )
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

    def compares_at(self, step: int) -> bool:
        """Whether `patience` counts the validation after so many steps.

        Not those at the end of a call that `stop_after` cut short, so that the run
        ends as it would have without.
        """
        return step % self.eval_every == 0 or step == self.steps

    def model_config(self, vocab_size: int) -> LanguageConfig:
        """The architecture, pre-norm with tied embeddings.

        An OPT has ReLU. A Llama has biases where it starts as an OPT, which has them.
        """
        if self.architecture == "opt":
            return OPTConfig(
                vocab_size=vocab_size,
                hidden_size=self.hidden_size,
                num_hidden_layers=self.layers,
                ffn_dim=self.ffn_dim,
                num_attention_heads=self.heads,
                max_position_embeddings=self.max_positions,
                dropout=self.dropout,
            )
        has_biases = self.start == "teacher"
        return ARCHITECTURES["llama"].config.from_dict(
            {
                "model_type": "llama",
                "vocab_size": vocab_size,
                "hidden_size": self.hidden_size,
                "intermediate_size": self.ffn_dim,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads or self.heads,
                "max_position_embeddings": self.max_positions,
                "attention_bias": has_biases,
                "mlp_bias": has_biases,
                "tie_word_embeddings": True,
                **_SPECIAL_TOKENS,
            },
            "the flags",
        )

    def record_fields(self) -> dict[str, Any]:
        """The choices that decide a log, files by their own name."""
        values = dataclasses.asdict(self)
        for name in ("tokenizer", "eval_file", "teacher"):
            values[name] = Path(values[name]).name
        for name in ("text_file", "even_file"):
            values[name] = [Path(file).name for file in values[name]]
        return {name: values[name] for name in values if name not in _NO_RECORD}

    def identity(self) -> dict[str, Any]:
        """The choices that decide the final weights, the text and tokenizer apart."""
        values = dataclasses.asdict(self)
        return {name: values[name] for name in values if name not in _NO_IDENTITY}


# Files are identified by their content.
_NO_IDENTITY = frozenset({
    "text_file", "even_file", "teacher", "separator", "wikitext_spacing", "tokenizer",
    "cache_dir", "out", "results", "log_every", "checkpoint_every", "stop_after",
    "eval_file", "eval_every", "eval_tokens",
})  # fmt: skip
_NO_RECORD = frozenset({
    "cache_dir", "out", "results", "grad_accumulation", "log_every",
    "checkpoint_every", "stop_after",
})  # fmt: skip


def recipe_schedule(config: TrainConfig) -> optax.Schedule:
    """Warm-up and cosine of a run."""
    return warmup_cosine(
        peak=config.learning_rate,
        warmup_steps=config.warmup_steps,
        steps=config.steps,
        final_fraction=config.final_fraction,
    )


def recipe_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW of a run."""
    return make_optimizer(
        recipe_schedule(config),
        weight_decay=config.weight_decay,
        clip=config.clip,
        beta1=config.beta1,
        beta2=config.beta2,
    )


def loop_settings(config: TrainConfig) -> LoopSettings:
    """When a run logs, saves, validates and stops."""
    return LoopSettings(
        steps=config.steps,
        stop_after=config.stop_after,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        validate_at=range(config.eval_every, config.steps + 1, config.eval_every),
        unit="tokens",
        units_per_step=config.batch_size * config.context,
        warmup_flag="warmup_steps",
    )
