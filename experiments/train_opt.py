r"""Trains a language model of OPT's architecture from plain text.

The defaults are the recipe of the embedded checkpoint opt-wiki-18m, which
`experiments/runs/train_opt_wiki.sh` repeats on a GPU. A smaller model on a
CPU, some twelve minutes on two idle cores (`results/train_opt.jsonl` has its curve):

    python -m experiments.train_opt --text_file=TEXT --out=DIRECTORY \
        --layers=2 --hidden_size=128 --heads=2 --ffn_dim=512 --max_positions=64 \
        --context=64 --steps=3600 --warmup_steps=120 --batch_size=16 --dtype=float32

The text is UTF-8. Documents are separated by empty lines (or `--separator`), shuffled
anew in every epoch and joined by `</s>`; tokens are kept in `--cache_dir`, so a large
text is tokenized once. `--out` receives

    log.jsonl     one object per `--log_every` steps: step, loss and grad_norm (means
                  since the line before), learning_rate, tokens, seconds (wall time of
                  the run, all included), tokens_per_second (since the line before,
                  without validation and checkpoints);
                  and one per `--eval_every` steps with the validation perplexity
    checkpoints/  the two newest states; the same command goes on from there and ends
                  with the weights of an uninterrupted run, bit for bit where the
                  device repeats itself bit for bit, as CPUs do
    loss.png      the loss curve
    hf/           the model in float16 with its tokenizer, for `load_opt`,
                  `transformers` and `python -m experiments.opt_ppl --model=`

Ctrl-C and SIGTERM save a checkpoint first. Exit code 0: finished; 1: text, tokenizer
or checkpoint unusable, or loss not finite; 2: wrong flag; 3: stopped, steps are left.
`--help` lists the flags.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from experiments.common.corpora import read_utf8
from experiments.common.flags import (
    COUNT,
    GIVEN,
    POSITIVE,
    POSITIVE_COUNT,
    RATE,
    SHARE,
    check_flags,
    flag,
    run_program,
)
from experiments.common.results import (
    environment_fields,
    merge_records,
    prepare_output,
    read_jsonl,
)
from experiments.common.text import ASSETS
from experiments.train.bpe import (
    end_of_text_id,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
    vocabulary_size,
)
from experiments.train.corpus import (
    Corpus,
    ShuffledStream,
    TextSource,
    corpus_fingerprint,
    load_corpus,
)
from experiments.train.loop import LoopParts, LoopSettings, train
from experiments.train.optimizer import make_optimizer, warmup_cosine
from experiments.train.step import (
    DTYPES,
    LossFn,
    Params,
    check_devices,
    init_state,
    make_trainer,
)
from experiments.train.stored import Panel, claim_directory, open_run, plot_log
from kashin_jax.errors import DataError, UsageError
from kashin_jax.evaluation import (
    make_windows,
    perplexity,
    score_windows,
    window_nll,
)
from kashin_jax.io import write_json
from kashin_jax.models import save_opt
from kashin_jax.models.opt import OPTConfig, OPTForCausalLM

if TYPE_CHECKING:
    from tokenizers import Tokenizer
if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "RunResult",
    "TrainConfig",
    "init_params",
    "loop_settings",
    "main",
    "make_loss",
    "make_validator",
    "model_graph",
    "read_windows",
    "recipe_optimizer",
    "recipe_schedule",
    "run",
]

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
        str(ASSETS / "opt-wiki-18m"), "Directory with a tokenizer.json.", GIVEN
    )
    vocab_size: int = flag(
        0,
        "Train a byte-level BPE of this size on the text instead; 0: do not.",
        (lambda x: x == 0 or x >= _SMALLEST_BPE, f"0 or at least {_SMALLEST_BPE}"),
    )
    cache_dir: str = flag(
        ".cache/train_opt", "Directory for texts once tokenized.", GIVEN
    )

    layers: int = flag(8, "Blocks of the model.", POSITIVE_COUNT)
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
        "Type of activations, bfloat16 or float32; weights are float32.",
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
    eval_every: int = flag(
        500, "Steps between two measurements of that perplexity.", POSITIVE_COUNT
    )
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


def _build_model(config: TrainConfig, model_config: OPTConfig) -> OPTForCausalLM:
    rngs = nnx.Rngs(params=jax.random.fold_in(jax.random.key(config.seed), 0))
    return OPTForCausalLM(model_config, rngs=rngs, dtype=config.compute_dtype)


def init_params(
    config: TrainConfig, model_config: OPTConfig, placement: Sharding | None = None
) -> Params:
    """Random parameters; with no placement on the default device."""

    def init() -> Params:
        return nnx.state(_build_model(config, model_config), nnx.Param)

    return jax.jit(init, out_shardings=placement)()


def model_graph(
    config: TrainConfig, model_config: OPTConfig, *, training: bool
) -> nnx.GraphDef:
    """The model without its parameters, with dropout on or off."""
    model = nnx.eval_shape(lambda: _build_model(config, model_config))
    if training:
        model.train()
    return nnx.split(model, nnx.Param)[0]


def make_loss(graphdef: nnx.GraphDef) -> LossFn:
    """Mean cross entropy of all but the first token of every window, in nats."""

    def loss_fn(
        params: Params,
        frozen: PyTree[Array],
        tokens: Int[Array, "b t"],
        key: Key[Array, ""],
    ) -> Float[Array, ""]:
        model = nnx.merge(graphdef, params)
        logits = model(tokens[:, :-1], rngs=nnx.Rngs(dropout=key))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.mean(losses)

    return loss_fn


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


def read_windows(
    config: TrainConfig, stream: ShuffledStream, step: int
) -> Int[np.ndarray, "a b t"]:
    """The windows of one step, each beginning with the last token of the one before.

    So every token of the stream is predicted exactly once.
    """
    predicted = config.batch_size * config.context
    tokens = stream.read(step * predicted, predicted + 1)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, config.context + 1)
    rows = windows[:: config.context]
    return rows.reshape(config.grad_accumulation, -1, config.context + 1)


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


_BATCH_SIZE = 4


def make_validator(
    config: TrainConfig, graphdef: nnx.GraphDef, tokenizer: "Tokenizer"
) -> Callable[[int, PyTree[Array]], dict[str, Any]] | None:
    """Prepares the measurement that `config.eval_file` asks for.

    The text is tokenized once, `</s>` in front, and cut into windows of
    `config.context` tokens that do not overlap; all but the first token of a window
    are predicted.

    Args:
      config: The run.
      graphdef: The model without its parameters, in evaluation mode.
      tokenizer: The run's.

    Returns:
      A function of step and parameters that returns what the log shall hold, or `None`
      where no file is given.

    Raises:
      DataError: If the text is missing, empty or not UTF-8.
      UsageError: If the context has no token to predict.
    """
    if not config.eval_file:
        return None
    if config.context < 2:
        raise UsageError("`--eval_file` needs a `--context` of at least 2.")
    ids = tokenizer.encode(read_utf8(Path(config.eval_file)), add_special_tokens=False)
    tokens = np.asarray([end_of_text_id(tokenizer), *ids.ids], np.int32)
    tokens = tokens[: config.eval_tokens or None]
    windows = make_windows(tokens, context=config.context, drop_last=False)

    @jax.jit
    def nll(
        params: PyTree[Array], tokens: Int[Array, "b t"], scored: Bool[Array, "b t"]
    ) -> Float[Array, " b"]:
        return window_nll(nnx.merge(graphdef, params)(tokens), tokens, scored)

    def validate(step: int, params: PyTree[Array]) -> dict[str, Any]:
        batches = score_windows(
            functools.partial(nll, params),
            windows,
            batch_size=min(_BATCH_SIZE, len(windows.tokens)),
            progress=None,
        )
        value = perplexity(np.concatenate([b.nlls for b in batches]), windows)
        return {
            "validation_loss": round(math.log(value), 5),
            "validation_perplexity": round(value, 4),
            "validation_predictions": int(windows.scored.sum()),
        }

    return validate


_LOSSES = Panel(
    "loss, nats per token",
    {"loss": ("-", "training"), "validation_loss": ("o--", "validation")},
)


class RunResult(NamedTuple):
    """How far a call came.

    Attributes:
      steps: Optimizer steps that the run has behind it.
      export: Directory of the exported checkpoint; `None` while steps are missing.
    """

    steps: int
    export: Path | None


def run(config: TrainConfig) -> RunResult:
    """Starts or resumes a run and exports its model once all steps are done.

    Leaves in `config.out`: `run.json`, `checkpoints/`, `log.jsonl`, and at the end
    `loss.png` and `hf/`, which `load_opt` and `transformers` read.

    Raises:
      UsageError: If the batch does not divide over the devices, or a directory cannot
        be written.
      DataError: If a text is missing, damaged or too small.
      CheckpointError: If the tokenizer or a checkpoint cannot be read, or the
        directory belongs to another run.
      NonFiniteError: If the loss is not finite; the last checkpoint stays.
    """
    out = Path(config.out)
    check_devices(config.batch_size, config.grad_accumulation)
    tokenizer, corpus = _prepare_text(config, out)
    model_config = config.model_config(vocabulary_size(tokenizer))
    graphdef = model_graph(config, model_config, training=False)
    loss_fn = make_loss(model_graph(config, model_config, training=True))
    optimizer = recipe_optimizer(config)
    trainer = make_trainer(loss_fn, optimizer, seed=config.seed)
    validate = make_validator(config, graphdef, tokenizer)
    params = init_params(config, model_config, trainer.replicated)
    fresh = init_state(params, optimizer, trainer.replicated)
    stream = ShuffledStream(corpus, seed=config.seed)
    with open_run(out, fresh, trainer.replicated) as stored:
        parts = LoopParts(
            trainer=trainer,
            schedule=recipe_schedule(config),
            read_batch=functools.partial(read_windows, config, stream),
            checkpoints=stored.checkpoints,
            log=stored.log,
            validate=validate,
        )
        state = train(loop_settings(config), parts, stored.state)
    steps = int(state.step)
    if steps < config.steps:
        return RunResult(steps, None)
    model = nnx.merge(graphdef, state.params)
    save_opt(model, model_config, out / "hf")
    save_tokenizer(tokenizer, out / "hf")
    _write_asset(out / "hf", config)
    plot_log(stored.log.path, out / "loss.png", [_LOSSES], xscale="log")
    if config.results:
        _keep_log(config, stored.log.path)
    return RunResult(steps, out / "hf")


def _keep_log(config: TrainConfig, log: Path) -> None:
    fields = {"config": config.record_fields(), **environment_fields()}
    records = [
        {"kind": "validation" if "validation_loss" in line else "training"}
        | line
        | fields
        for line in read_jsonl(log)
    ]
    merge_records(prepare_output(config.results), "train_opt", records)


def _prepare_text(config: TrainConfig, out: Path) -> tuple["Tokenizer", Corpus]:
    source = TextSource(
        tuple(map(Path, config.text_file)),
        config.separator,
        config.wikitext_spacing,
        config.seed,
    )
    own = out / "tokenizer"
    if not config.vocab_size:
        tokenizer = load_tokenizer(Path(config.tokenizer))
    elif own.is_dir():
        tokenizer = load_tokenizer(own)
    else:
        documents = source.documents()
        tokenizer = train_tokenizer(documents, vocab_size=config.vocab_size)
    fingerprint = corpus_fingerprint(source, tokenizer)
    claim_directory(out, config.identity() | {"text_and_tokenizer": fingerprint})
    if config.vocab_size:
        save_tokenizer(tokenizer, own)
    corpus = load_corpus(source, tokenizer, Path(config.cache_dir))
    if corpus.epoch_tokens <= config.context:
        raise DataError(
            f"`{config.text_file[0]}` has {corpus.epoch_tokens} tokens, too few for "
            f"one window; lower `--context`={config.context} or give more text."
        )
    return tokenizer, corpus


def _write_asset(directory: Path, config: TrainConfig) -> None:
    # Positions beyond the training context exist but are untrained; evaluations read
    # the length to use from here.
    content = {"name": Path(config.out).name, "trained_context": config.context}
    write_json(directory / "asset.json", content)


def _run(config: TrainConfig) -> int:
    result = run(config)
    if result.export is None:
        print(
            f"Stopped after {result.steps} of {config.steps} steps; the same command "
            "goes on from there."
        )
        return 3
    print(f"Finished {result.steps} steps; the checkpoint is in {result.export}.")
    return 0


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_program("train_opt", __doc__, TrainConfig, _run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
