"""From a configuration to a trained classifier in Hugging Face's layout."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from experiments.common.results import read_jsonl
from experiments.finetuning.batches import ShuffledIndices, read_batch
from experiments.finetuning.config import FinetuneConfig
from experiments.finetuning.export import export_classifier, write_metrics
from experiments.finetuning.model import Start, load_start, make_loss
from experiments.finetuning.prepare import RunData, load_data
from experiments.finetuning.validation import Evaluate, make_evaluator
from experiments.train.checkpoints import claim_directory
from experiments.train.loop import LoopParts, LoopSettings, train
from experiments.train.optimizer import make_optimizer, warmup_linear
from experiments.train.runlog import Panel, plot_log
from experiments.train.step import (
    Params,
    TrainState,
    check_devices,
    init_state,
    make_trainer,
)
from experiments.train.stored import open_run

__all__ = ["FinetuneResult", "finetune"]


class FinetuneResult(NamedTuple):
    """How far a call came.

    Attributes:
      steps: Optimizer steps that the run has behind it.
      total: Optimizer steps of the whole run.
      metrics: Of the final weights, in percent; None while steps are missing.
    """

    steps: int
    total: int
    metrics: dict[str, float] | None


def finetune(config: FinetuneConfig) -> FinetuneResult:
    """Starts or resumes a run and exports its model once all steps are done.

    Leaves in `config.out`: `run.json`, `checkpoints/`, `log.jsonl`, and at the end
    `hf/`, which `load_classifier` and `transformers` read, `loss.png`, and, last of
    all, `metrics.json`; of a quantized classifier `quantized/`, too.

    Raises:
      UsageError: If a flag does not fit the model or the devices, or the directory
        cannot be written.
      DataError: If data are missing or malformed.
      CheckpointError: If the model, its tokenizer or a checkpoint cannot be used, or
        the directory belongs to another run.
      NonFiniteError: If the loss is not finite; the last checkpoint stays.
    """
    check_devices(config.batch_size, config.grad_accumulation)
    start = load_start(config)
    data = load_data(config, start)
    out = Path(config.out)
    claim_directory(out, config.identity() | data.identity)
    print(" ".join(data.notes))
    total = config.steps(data.num_examples)
    evaluate = make_evaluator(start, config.glue_task, data.evaluation)
    described = _described(start, evaluate)
    state = _train(config, start, data, evaluate)
    if (steps := int(state.step)) < total:
        return FinetuneResult(steps, total, None)
    log = out / "log.jsonl"
    names = config.glue_task.metrics
    found = [r for r in read_jsonl(log) if r["step"] == steps and names[0] in r]
    metrics = found[-1] if found else evaluate(state.params)
    metrics = {name: metrics[name] for name in names}
    export_classifier(start, config.glue_task, state.params, out)
    curves = {name: ("o-", name) for name in names}
    loss = Panel("training loss", {"loss": ("-", config.task)})
    plot_log(log, out / "loss.png", [loss, Panel("dev metric, percent", curves)])
    write_metrics(config, metrics, data.num_examples, described)
    return FinetuneResult(steps, total, metrics)


def _described(start: Start, evaluate: Evaluate) -> dict[str, Any]:
    """What a quantized classifier is, and its metrics before any step."""
    if start.packed is None:
        return {}
    # Before training, which consumes the parameters.
    return {"quantized": start.packed.described, "before": evaluate(start.params)}


def _train(
    config: FinetuneConfig, start: Start, data: RunData, evaluate: Evaluate
) -> TrainState:
    total = config.steps(data.num_examples)
    schedule = warmup_linear(
        peak=config.learning_rate,
        warmup_steps=int(config.warmup_fraction * total),
        steps=total,
    )
    # Centroids and scales are matrices to the optimizer, and must not shrink.
    decay = 0.0 if config.quantized else config.weight_decay
    optimizer = make_optimizer(schedule, weight_decay=decay, clip=config.clip)
    is_regression = config.glue_task.is_regression
    loss_fn = make_loss(start.training, is_regression=is_regression)
    trainer = make_trainer(loss_fn, optimizer, seed=config.seed, frozen=start.frozen)
    fresh = init_state(start.params, optimizer, trainer.replicated)
    stream = ShuffledIndices(data.num_examples, seed=config.seed)
    size, num_parts = config.batch_size, config.grad_accumulation
    epoch_ends = config.epoch_ends(data.num_examples)
    with open_run(Path(config.out), fresh, trainer.replicated) as stored:
        parts = LoopParts(
            trainer=trainer,
            schedule=schedule,
            read_batch=lambda step: read_batch(
                data.training, stream, step, size=size, parts=num_parts
            ),
            checkpoints=stored.checkpoints,
            log=stored.log,
            validate=_validator(evaluate, epoch_ends, size / data.num_examples),
        )
        return train(_settings(config, total, epoch_ends), parts, stored.state)


def _settings(
    config: FinetuneConfig, total: int, epoch_ends: dict[int, float]
) -> LoopSettings:
    return LoopSettings(
        steps=total,
        stop_after=config.stop_after,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        validate_at=epoch_ends,
        unit="examples",
        units_per_step=config.batch_size,
        warmup_flag="warmup_fraction",
    )


def _validator(
    evaluate: Evaluate, epoch_ends: dict[int, float], epochs_per_step: float
) -> Callable[[int, Params], dict[str, Any]]:
    def validate(step: int, params: Params) -> dict[str, Any]:
        metrics = evaluate(params)
        epoch = epoch_ends.get(step, round(step * epochs_per_step, 3))
        values = ", ".join(f"{name} {value:.2f}" for name, value in metrics.items())
        # `print` would break the progress bar.
        tqdm.write(f"epoch {epoch:g}: {values}")
        return {"epoch": epoch, **metrics}

    return validate
