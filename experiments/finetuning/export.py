"""What a finished run leaves behind."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.classification.quantized import copy_tokenizer, save_quantized
from experiments.classification.tasks import Task
from experiments.common.results import atomic_path, environment_fields
from experiments.finetuning.config import FinetuneConfig
from experiments.finetuning.model import Start
from experiments.train.step import Params
from kashin_jax.models.classifier_loading import save_classifier

__all__ = ["export_classifier", "write_metrics"]


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
    with atomic_path(Path(config.out) / "metrics.json") as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
