"""From a configuration to an exported checkpoint."""

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flax import nnx

from experiments.common.results import (
    atomic_path,
    environment_fields,
    merge_records,
    prepare_output,
    read_jsonl,
)
from experiments.train.bpe import (
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
    vocabulary_size,
)
from experiments.train.checkpoints import claim_directory
from experiments.train.config import TrainConfig
from experiments.train.corpus import (
    Corpus,
    ShuffledStream,
    TextSource,
    corpus_fingerprint,
    load_corpus,
)
from experiments.train.language_model import (
    init_params,
    loop_settings,
    make_loss,
    model_graph,
    read_windows,
    recipe_optimizer,
    recipe_schedule,
)
from experiments.train.loop import LoopParts, train
from experiments.train.runlog import Panel, plot_log
from experiments.train.step import check_devices, init_state, make_trainer
from experiments.train.stored import open_run
from experiments.train.validation import make_validator
from kashin_jax.errors import DataError
from kashin_jax.models.loading import save_opt

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["RunResult", "run"]

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
    with atomic_path(directory / "asset.json") as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
