"""From a configuration to a trained classifier in Hugging Face's layout."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jaxtyping import Float32, Int32
from tqdm import tqdm

from experiments.classification.data import Examples, load_examples
from experiments.classification.evaluation import (
    EvaluationSet,
    classifier_outputs,
    encode_checked,
    load_classifier_tokenizer,
    load_evaluation_sets,
    score,
)
from experiments.classification.quantized import copy_tokenizer, save_quantized
from experiments.classification.tasks import Task
from experiments.common.checkpoints import checkpoint_sha256
from experiments.common.results import environment_fields, read_jsonl
from experiments.finetuning.batches import (
    ShuffledIndices,
    TrainingSet,
    read_batch,
)
from experiments.finetuning.config import FinetuneConfig
from experiments.finetuning.model import Start, load_start, make_loss
from experiments.train.loop import LoopParts, LoopSettings, train
from experiments.train.optimizer import make_optimizer, warmup_linear
from experiments.train.step import (
    Params,
    TrainState,
    check_devices,
    init_state,
    make_trainer,
)
from experiments.train.stored import Panel, claim_directory, open_run, plot_log
from kashin_jax.io import write_json
from kashin_jax.models import save_classifier

__all__ = ["FinetuneResult", "finetune"]

# From parameters to metrics in percent.
Evaluate: TypeAlias = Callable[[Params], dict[str, float]]


def make_evaluator(start: Start, task: Task, sets: Sequence[EvaluationSet]) -> Evaluate:
    """Prepares the measurement that `experiments.glue` makes at full precision.

    Args:
      start: Puts models together and says which output is which label.
      task: What is scored.
      sets: Its splits.

    Returns:
      A function of the parameters that gives what `glue_metrics` does.
    """

    def evaluate(params: Params) -> dict[str, float]:
        model = start.evaluation(params, start.frozen)
        with jax.default_matmul_precision("highest"):
            outputs = [classifier_outputs(model, one, start.order) for one in sets]
        return score(task, sets, outputs)

    return evaluate


def export_classifier(start: Start, task: Task, params: Params, out: Path) -> None:
    """Writes the model in float32 and its tokenizer, in Hugging Face's layout.

    A quantized classifier is written as such, too: `hf` then holds what it decodes to.

    Raises:
      CheckpointError: If the directory cannot be written.
      NonFiniteError: If a weight is not finite; names it.
    """
    loaded = start.loaded
    model = start.evaluation(params, start.frozen)
    copy_tokenizer(loaded.directory, out / "hf")
    save_classifier(
        model, loaded.config, out / "hf", extra={"finetuning_task": task.name}
    )
    if start.packed is not None:
        save_quantized(
            out / "quantized",
            model,
            start.packed.tensors(params, start.frozen),
            loaded.config,
            tokenizer=loaded.directory,
            rules=start.packed.rules,
            seed=start.packed.seed,
            dtype=loaded.stored_dtype,
            # Rules and seed alone would promise the codebooks that they began with.
            extra={"finetuning_task": task.name, "refined": True},
        )


def write_metrics(
    config: FinetuneConfig,
    metrics: dict[str, float],
    num_examples: int,
    described: Mapping[str, Any],
) -> None:
    """Writes `metrics.json`, the sign that a run is finished.

    Args:
      config: The run.
      metrics: Of the final weights, in percent.
      num_examples: In the training set.
      described: Further fields.
    """
    content = {
        "task": config.task,
        "model": config.quantized or config.model,
        "seed": config.seed,
        "epochs": config.epochs,
        "steps": config.steps(num_examples),
        "training_examples": num_examples,
        "metrics": metrics,
        **described,
        **environment_fields(),
    }
    write_json(Path(config.out) / "metrics.json", content)


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
