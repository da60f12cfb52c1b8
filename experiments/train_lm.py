r"""Trains a language model from plain text: an OPT, or a Llama, or a Llama from an OPT.

The defaults are the recipe of the embedded checkpoint opt-wiki-18m, which
`experiments/runs/train_opt_wiki.sh` repeats on a GPU. A smaller model on a
CPU, some twelve minutes on two idle cores (`results/train_lm.jsonl` has its curve):

    python -m experiments.train_lm --text_file=TEXT --out=DIRECTORY \
        --layers=2 --hidden_size=128 --heads=2 --ffn_dim=512 --max_positions=64 \
        --context=64 --steps=3600 --warmup_steps=120 --batch_size=16 --dtype=float32

With `--teacher=` the loss is the divergence from the predictions of another model of
the same tokenizer, and `--start=teacher` begins a Llama as a smaller copy of an OPT, as
far as it can be one (`experiments/train/transplant.py`). The embedded Llama is made so:
`python -m experiments.make_results --only=train_lm`.

The text is UTF-8. Documents are separated by empty lines (or `--separator`), shuffled
anew in every epoch and joined by `</s>`; tokens are kept in `--cache_dir`, so a large
text is tokenized once. Of an `--even_file` only every second document is trained on;
`asset.json` in `hf/` says so, and `--calibration=default` then takes the others.
`--out` receives

    log.jsonl     one object per `--log_every` steps: step, loss and grad_norm (means
                  since the line before), learning_rate, tokens, seconds (wall time of
                  the run, all included), tokens_per_second (since the line before,
                  without validation and checkpoints);
                  and one per `--eval_every` steps with the validation perplexity
    checkpoints/  the two newest states; the same command goes on from there and ends
                  with the weights of an uninterrupted run, bit for bit where the
                  device repeats itself bit for bit, as CPUs do
    loss.png      the loss curve
    hf/           the model in float16 with its tokenizer, for `load_language_model`,
                  `transformers` and `python -m experiments.opt_ppl --model=`; with
                  `--patience` the best one by validation, which also ends the run

Ctrl-C and SIGTERM save a checkpoint first. Exit code 0: finished; 1: text, tokenizer
or checkpoint unusable, or loss not finite; 2: wrong flag; 3: stopped, steps are left.
`--help` lists the flags.
"""

import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from jaxtyping import Array, Bool, Float, Int, PyTree

from experiments.common.checkpoints import checkpoint_sha256
from experiments.common.corpora import read_utf8
from experiments.common.flags import (
    run_program,
)
from experiments.common.results import (
    environment_fields,
    merge_records,
    prepare_output,
    read_jsonl,
)
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
from experiments.train.distill import distillation_loss, language_loss
from experiments.train.loop import LoopParts, train
from experiments.train.recipe import (
    TrainConfig,
    loop_settings,
    recipe_optimizer,
    recipe_schedule,
)
from experiments.train.step import (
    LossFn,
    Params,
    TrainState,
    check_devices,
    init_state,
    make_trainer,
)
from experiments.train.stored import (
    Panel,
    claim_directory,
    open_run,
    plot_log,
    write_asset,
)
from experiments.train.transplant import transplant
from kashin_jax.errors import DataError, UsageError
from kashin_jax.evaluation import (
    make_windows,
    perplexity,
    score_windows,
    window_nll,
)
from kashin_jax.models import (
    LoadedModel,
    OPTForCausalLM,
    load_language_model,
    save_model,
)
from kashin_jax.models.architecture import LanguageConfig
from kashin_jax.models.registry import ARCHITECTURES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "RunResult",
    "has_converged",
    "init_params",
    "main",
    "make_validator",
    "model_graph",
    "read_windows",
    "run",
]

Validate = Callable[[int, PyTree[Array]], dict[str, Any]]


def _build_model(config: TrainConfig, model_config: LanguageConfig) -> Any:
    rngs = nnx.Rngs(params=jax.random.fold_in(jax.random.key(config.seed), 0))
    model = ARCHITECTURES[config.architecture].model
    return model(model_config, rngs=rngs, dtype=config.compute_dtype)


def init_params(
    config: TrainConfig,
    model_config: LanguageConfig,
    placement: Sharding | None = None,
    teacher: OPTForCausalLM | None = None,
) -> Params:
    """First parameters; with no placement on the default device.

    Args:
      config: The run.
      model_config: Its architecture.
      placement: Where the parameters shall live.
      teacher: What they are copied from; by default they are random.
    """

    def init(given: OPTForCausalLM | None) -> Params:
        model = _build_model(config, model_config)
        if given is not None:
            key = jax.random.fold_in(jax.random.key(config.seed), 2)
            transplant(given, model, key)
        return nnx.state(model, nnx.Param)

    return nnx.jit(init, out_shardings=placement)(teacher)


def model_graph(
    config: TrainConfig, model_config: LanguageConfig, *, training: bool
) -> nnx.GraphDef:
    """The model without its parameters, with dropout on or off."""
    model = nnx.eval_shape(lambda: _build_model(config, model_config))
    if training:
        model.train()
    return nnx.split(model, nnx.Param)[0]


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


_BATCH_SIZE = 4


def make_validator(
    config: TrainConfig, graphdef: nnx.GraphDef, tokenizer: "Tokenizer"
) -> Validate | None:
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


class _Job(NamedTuple):
    # What a run is made of before it starts.
    config: TrainConfig
    out: Path
    tokenizer: "Tokenizer"
    model_config: LanguageConfig

    def export(self, params: Params) -> None:
        """Writes the model with its tokenizer, as `transformers` reads them."""
        graphdef = model_graph(self.config, self.model_config, training=False)
        model = nnx.merge(graphdef, params)
        save_model(model, self.model_config, self.out / "hf", dtype="float16")
        save_tokenizer(self.tokenizer, self.out / "hf")
        write_asset(
            self.out / "hf",
            name=self.out.name,
            context=self.config.context,
            even_files=tuple(map(Path, self.config.even_file)),
        )

    def keep_best(self, validate: Validate, log: Path) -> Validate:
        """The same measurement; a model that is the best so far is exported."""

        def measure(step: int, params: Params) -> dict[str, Any]:
            found = validate(step, params)
            losses = validation_losses(log, self.config)
            is_best = not losses or found["validation_loss"] < min(losses)
            if is_best and self.config.compares_at(step):
                self.export(params)
            return found

        return measure


def run(config: TrainConfig) -> RunResult:
    """Starts or resumes a run and exports its model once all steps are done.

    Leaves in `config.out`: `run.json`, `checkpoints/`, `log.jsonl`, and at the end
    `loss.png` and `hf/`, which `load_language_model` and `transformers` read.

    Raises:
      UsageError: If the batch does not divide over the devices, the model cannot start
        as its teacher, or a directory cannot be written.
      DataError: If a text is missing, damaged or too small.
      CheckpointError: If the tokenizer, the teacher or a checkpoint cannot be read, the
        teacher has another vocabulary, or the directory belongs to another run.
      NonFiniteError: If the loss is not finite; the last checkpoint stays.
    """
    out = Path(config.out)
    check_devices(config.batch_size, config.grad_accumulation)
    teacher = load_language_model(config.teacher) if config.teacher else None
    tokenizer, corpus = _prepare_text(config, out, teacher)
    job = _Job(config, out, tokenizer, config.model_config(vocabulary_size(tokenizer)))
    state, log = _train(job, corpus, teacher)
    steps = int(state.step)
    if steps < config.steps and not has_converged(log, config):
        return RunResult(steps, None)
    if not config.patience:
        job.export(state.params)
    plot_log(log, out / "loss.png", [_LOSSES], xscale="log")
    if config.results:
        _keep_log(config, log)
    return RunResult(steps, out / "hf")


def _train(
    job: _Job, corpus: Corpus, teacher: LoadedModel | None
) -> tuple[TrainState, Path]:
    """Trains as far as a call goes; returns the state and where the log is."""
    config = job.config
    graphdef = model_graph(config, job.model_config, training=False)
    optimizer = recipe_optimizer(config)
    loss_fn, frozen = _loss(job, teacher)
    trainer = make_trainer(loss_fn, optimizer, seed=config.seed, frozen=frozen)
    validate = make_validator(config, graphdef, job.tokenizer)
    first = _first(config, teacher)
    params = init_params(config, job.model_config, trainer.replicated, first)
    fresh = init_state(params, optimizer, trainer.replicated)
    stream = ShuffledStream(corpus, seed=config.seed)
    with open_run(job.out, fresh, trainer.replicated) as stored:
        log = stored.log.path
        if validate is not None and config.patience:
            validate = job.keep_best(validate, log)
        parts = LoopParts(
            trainer=trainer,
            schedule=recipe_schedule(config),
            read_batch=functools.partial(read_windows, config, stream),
            checkpoints=stored.checkpoints,
            log=stored.log,
            validate=validate,
            has_converged=functools.partial(has_converged, log, config),
        )
        return train(loop_settings(config), parts, stored.state), log


def _first(config: TrainConfig, teacher: LoadedModel | None) -> OPTForCausalLM | None:
    """The OPT to start as, if the run shall."""
    if teacher is None or config.start == "random":
        return None
    if not isinstance(teacher.model, OPTForCausalLM):
        raise UsageError(
            f"`--start=teacher` needs an OPT, and `--teacher={config.teacher}` is of "
            f"the architecture {teacher.config.model_type}; give `--start=random`."
        )
    return teacher.model


def _loss(job: _Job, teacher: LoadedModel | None) -> tuple[LossFn, PyTree[Array]]:
    """The loss, and what it needs that is not trained."""
    graphdef = model_graph(job.config, job.model_config, training=True)
    if teacher is None:
        return language_loss(graphdef), ()
    theirs, frozen = nnx.split(teacher.model)
    weight = job.config.teacher_weight
    return distillation_loss(graphdef, theirs, weight=weight), frozen


def validation_losses(log: Path, config: TrainConfig) -> list[float]:
    """The validation losses that an uninterrupted run has so far, in order."""
    return [
        record["validation_loss"]
        for record in read_jsonl(log)
        if "validation_loss" in record and config.compares_at(record["step"])
    ]


def has_converged(log: Path, config: TrainConfig) -> bool:
    """Whether the last `patience` validations were no better than one before them."""
    losses, patience = validation_losses(log, config), config.patience
    if not patience or len(losses) <= patience:
        return False
    return min(losses[-patience:]) >= min(losses[:-patience])


def _keep_log(config: TrainConfig, log: Path) -> None:
    fields = {"architecture": config.architecture, "config": config.record_fields()}
    fields |= environment_fields()
    records = [
        {"kind": "validation" if "validation_loss" in line else "training"}
        | line
        | fields
        for line in read_jsonl(log)
    ]
    merge_records(prepare_output(config.results), "train_lm", records)


def _prepare_text(
    config: TrainConfig, out: Path, teacher: LoadedModel | None
) -> tuple["Tokenizer", Corpus]:
    source = TextSource(
        tuple(map(Path, config.text_file)),
        config.separator,
        config.wikitext_spacing,
        config.seed,
        tuple(map(Path, config.even_file)),
    )
    own = out / "tokenizer"
    if not config.vocab_size:
        tokenizer = load_tokenizer(Path(config.tokenizer))
    elif own.is_dir():
        tokenizer = load_tokenizer(own)
    else:
        documents = source.documents()
        tokenizer = train_tokenizer(documents, vocab_size=config.vocab_size)
    identity = config.identity() | {
        "text_and_tokenizer": corpus_fingerprint(source, tokenizer)
    }
    if teacher is not None:
        _check_teacher(teacher, tokenizer, config)
        identity["teacher_sha256"] = checkpoint_sha256(teacher.directory)
    claim_directory(out, identity)
    if config.vocab_size:
        save_tokenizer(tokenizer, own)
    corpus = load_corpus(source, tokenizer, Path(config.cache_dir))
    if corpus.epoch_tokens <= config.context:
        raise DataError(
            f"`{source.files[0]}` has {corpus.epoch_tokens} tokens, too few for "
            f"one window; lower `--context`={config.context} or give more text."
        )
    return tokenizer, corpus


def _check_teacher(
    teacher: LoadedModel, tokenizer: "Tokenizer", config: TrainConfig
) -> None:
    theirs = load_tokenizer(teacher.directory)
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise UsageError(
            f"`--teacher={config.teacher}` has another tokenizer than the run; give "
            f"`--tokenizer={config.teacher}`."
        )
    if config.context > teacher.config.context_length:
        raise UsageError(
            f"`--context`={config.context} exceeds the teacher's "
            f"{teacher.config.context_length} positions; lower it."
        )


def _run(config: TrainConfig) -> int:
    result = run(config)
    if result.export is None:
        print(
            f"Stopped after {result.steps} of {config.steps} steps; the same command "
            "goes on from there."
        )
        return 3
    print(f"Finished after {result.steps} steps; the checkpoint is in {result.export}.")
    return 0


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_program("train_lm", __doc__, TrainConfig, _run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
