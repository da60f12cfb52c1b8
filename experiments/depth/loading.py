"""The models and texts that the flags of the depth study name."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.classification.checkpoints import load_task_bench, resolve_tasks
from experiments.classification.rows import GlueBench, TaskBench
from experiments.classification.tasks import Task
from experiments.common.flag_values import short_model_name
from experiments.common.perplexity import Bench
from experiments.common.quantized_layers import checkpoint_sha256
from experiments.common.results import environment_fields
from experiments.common.text import (
    EvaluationText,
    default_context,
    load_text,
    parse_max_tokens,
    trained_context,
)
from experiments.depth.config import DepthConfig
from experiments.depth.subjects import Subject, glue_subject, language_subject
from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.models.loading import LoadedModel, load_opt
from kashin_jax.models.tokenizer import check_vocabulary, load_tokenizer

__all__ = ["Inputs", "choose_glue_tasks", "load_inputs", "make_subjects"]

_WINDOWS = 4
_BATCH_TOKENS = 1024


def choose_glue_tasks(config: DepthConfig) -> tuple[Task, ...]:
    """The tasks that are scored; none where GLUE is not asked for.

    Raises:
      UsageError: If a task is unknown, or none is named and none can be derived.
      CheckpointError: If the classifier cannot be found.
      DataError: If `--data_dir` is not a folder.
    """
    if "glue" not in config.metrics:
        return ()
    with _about_glue_model():
        return resolve_tasks(config.glue_model, config.tasks, config.data_path)[0]


@contextlib.contextmanager
def _about_glue_model() -> Iterator[None]:
    """Complaints about a classifier name the flag of `experiments.glue`, not ours."""
    try:
        yield
    except (UsageError, CheckpointError) as error:
        message = str(error).replace("`--model=", "`--glue_model=")
        raise type(error)(message) from error


class Inputs(NamedTuple):
    """What the metrics need, read and checked; None or empty where none needs it."""

    language: LoadedModel | None
    text: EvaluationText | None
    tasks: tuple[TaskBench, ...]


def load_inputs(config: DepthConfig, tasks: Sequence[Task]) -> Inputs:
    """Reads models and texts; `tasks` are those of `choose_glue_tasks`.

    Raises:
      UsageError: If a flag does not fit a model.
      CheckpointError: If a model or its tokenizer cannot be used.
      DataError: If a text or a task's file cannot be used.
    """
    language = load_opt(config.model) if config.needs_language_model else None
    text = None if language is None else _text(config, language)
    with _about_glue_model():
        benches = tuple(
            load_task_bench(
                task, config.glue_model, labels=(), data_dir=config.data_path,
                max_length=config.max_length, tokens_per_batch=_BATCH_TOKENS,
            )
            for task in tasks
        )  # fmt: skip
    return Inputs(language, text, benches)


def make_subjects(config: DepthConfig, inputs: Inputs, work: Path) -> list[Subject]:
    """The models with their metrics; unfinished work goes to `work`."""
    subjects = []
    if inputs.language is not None and inputs.text is not None:
        name = short_model_name(config.model)
        fields = {**inputs.text.record_fields(), **environment_fields()}
        bench = Bench(
            loaded=inputs.language, text=inputs.text, work=work,
            identity={"model": name, **fields},
            weights_sha256=checkpoint_sha256(inputs.language.directory),
            batch_size=_WINDOWS,
        )  # fmt: skip
        subjects.append(language_subject(bench, config.metrics))
    if inputs.tasks:
        name = short_model_name(config.glue_model)
        fields = {"max_length": config.max_length, **environment_fields()}
        identity = {"model": name, **fields}
        subjects.append(
            glue_subject(GlueBench(tasks=inputs.tasks, work=work, identity=identity))
        )
    return subjects


def _text(config: DepthConfig, loaded: LoadedModel) -> EvaluationText:
    tokenizer = load_tokenizer(loaded.directory)
    check_vocabulary(tokenizer, loaded.config.vocab_size)
    limit = loaded.config.max_position_embeddings
    own = min(trained_context(loaded.directory) or limit, limit)
    return load_text(
        config.dataset,
        tokenizer,
        context=default_context(config.dataset, own),
        text_file=config.text_file or None,
        max_tokens=parse_max_tokens(config.max_tokens),
        data_dir=config.data_path,
    )
