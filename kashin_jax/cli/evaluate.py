"""`kashin eval`: the perplexity of a text, or the scores of benchmarks."""

import contextlib
import difflib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kashin_jax.cli.harness import HarnessModel, template_model
from kashin_jax.errors import DataError, UsageError
from kashin_jax.evaluation import (
    bits_per_byte,
    make_windows,
    perplexity,
    score_windows,
    window_nll,
)
from kashin_jax.models.context import own_context
from kashin_jax.models.loading import LoadedModel
from kashin_jax.models.tokenizer import (
    Tokenizer,
    bos_token,
    check_vocabulary,
    load_tokenizer,
    with_bos,
)
from kashin_jax.pipeline import inspect_checkpoint, load_quantized
from kashin_jax.pipeline.table import aligned
from kashin_jax.version import library_version

__all__ = ["language_model", "read_text", "run_eval"]

# What flags belong to: a text, or tasks.
_OF_TEXT = ("max_tokens", "stride")
_OF_TASKS = ("tasks_dir", "num_fewshot", "limit")
# Resamplings for the standard error of metrics without a formula. The harness's own
# 100,000 take minutes on LAMBADA; these tell the error itself to 2 per cent.
_RESAMPLINGS = 1000


def language_model(src: str) -> LoadedModel:
    """Loads a language model, quantized or not.

    Raises:
      UsageError: If it is a classifier.
    """
    loaded = load_quantized(src)
    if not isinstance(loaded, LoadedModel):
        raise UsageError(f"{src}: is a classifier; name a language model.")
    return loaded


def run_eval(
    src: str,
    *,
    text: str | None,
    tasks: str | None,
    context: int | None,
    batch_size: int,
    bos: str,
    as_json: bool,
    **flags: Any,
) -> int:
    """Prints the perplexity of a language model on a text, or its scores on tasks."""
    wrong = _OF_TASKS if tasks is None else _OF_TEXT
    if given := [name for name in wrong if flags[name] is not None]:
        other = "--tasks" if tasks is None else "--text"
        raise UsageError(f"`--{given[0].replace('_', '-')}` belongs to `{other}`.")
    harness = None if tasks is None else _harness()
    loaded = language_model(src)
    tokenizer = load_tokenizer(loaded.directory, bos=bos)
    check_vocabulary(tokenizer, loaded.config.vocab_size)
    limit = loaded.config.context_length
    length = context or own_context(loaded)
    if not 2 <= length <= limit:
        raise UsageError(
            f"`--context` must lie in [2, {limit}] for this model. Got {length}."
        )
    if tasks is not None:
        model = HarnessModel(
            loaded=loaded, tokenizer=tokenizer, max_length=length, batch_size=batch_size
        )
        found = _scores(
            harness, template_model(model), tasks, **{f: flags[f] for f in _OF_TASKS}
        )
    else:
        found = _perplexity(
            loaded, tokenizer, Path(text or ""), length, batch_size,
            **{f: flags[f] for f in _OF_TEXT},
        )  # fmt: skip
    found |= {"context": length, "bos_token": bos_token(tokenizer)}
    if as_json:
        print(
            json.dumps(
                {"model": src, **_sizes(loaded), **found}, indent=2, default=float
            )
        )
    else:
        print(_described(found, loaded))
    return 0


def _sizes(loaded: LoadedModel) -> dict[str, Any]:
    """What the checkpoint stores; weights that are not packed count as they are."""
    found = inspect_checkpoint(loaded.directory, verify=False)
    return {
        "bits_per_weight": found.bits_per_weight,
        "model_bits_per_weight": found.model_bits_per_weight,
        "disk_bytes": found.disk_bytes,
        "kashin_jax_version": library_version(),
    }


def _described(found: Mapping[str, Any], loaded: LoadedModel) -> str:
    begins = f"begins with {found['bos_token'] or 'no token of its own'}"
    cut = f"context {found['context']}, {begins}"
    if "tasks" not in found:
        information = found["bits_per_byte"]
        bits = "-" if information is None else f"{information:.4f}"
        stride = f"stride {found['stride']}, " if found["stride"] else ""
        return (
            f"{found['perplexity']!r} perplexity, {bits} bits per byte, "
            f"{found['predictions']} predictions, {stride}{cut}"
        )
    bits = _sizes(loaded)["model_bits_per_weight"]
    return f"{_score_table(found)}\n{bits:.3f} bits each weight, {cut}"


def _perplexity(
    loaded: LoadedModel,
    tokenizer: Tokenizer,
    text: Path,
    context: int,
    batch_size: int,
    *,
    max_tokens: int | None,
    stride: int | None,
) -> dict[str, Any]:
    if stride is not None and stride > context:
        raise UsageError(f"`--stride`={stride} must not exceed the context, {context}.")
    ids, num_bytes = with_bos(tokenizer, read_text(text))
    windows = make_windows(
        ids[:max_tokens],
        context=context,
        stride=stride,
        drop_last=False,
        token_bytes=num_bytes[:max_tokens],
    )
    graphdef, state = nnx.split(loaded.model)
    batches = score_windows(
        lambda ids, scored: _nll(graphdef, state, ids, scored),
        windows,
        batch_size=batch_size,
    )
    nlls = np.concatenate([batch.nlls for batch in batches])
    return {
        "perplexity": float(perplexity(nlls, windows)),
        "bits_per_byte": bits_per_byte(nlls, windows),
        "predictions": int(windows.scored.sum()),
        "bytes": None if windows.num_bytes is None else int(windows.num_bytes.sum()),
        "stride": stride,
    }


def read_text(path: Path) -> str:
    """A UTF-8 text; DataError if it is none."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error.reason}).") from error


@jax.jit(static_argnums=0)
def _nll(
    graphdef: Any, state: Any, tokens: Int[Array, "b t"], scored: Bool[Array, "b t"]
) -> Float[Array, " b"]:
    return window_nll(nnx.merge(graphdef, state)(tokens), tokens, scored)


def _harness() -> Any:
    """The harness's evaluator; it is imported before a model is loaded.

    Raises:
      UsageError: If it is not installed.
    """
    try:
        from lm_eval import evaluator
    except ImportError as error:
        raise UsageError(
            f"`--tasks` needs lm-evaluation-harness ({error}); "
            "run: pip install 'kashin_jax[eval]'"
        ) from error
    return evaluator


def _scores(
    harness: Any,
    model: Any,
    tasks: str,
    *,
    tasks_dir: str | None,
    num_fewshot: int | None,
    limit: int | None,
) -> dict[str, Any]:
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    # What the harness prints of its progress is no result.
    with contextlib.redirect_stdout(sys.stderr), _one_process():
        found = harness.simple_evaluate(
            model,
            tasks=names,
            task_manager=_tasks(names, tasks_dir),
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=False,
            bootstrap_iters=_RESAMPLINGS,
        )
    results = {**found["results"], **found.get("groups", {})}
    return {
        "tasks": results,
        "num_fewshot": found["n-shot"],
        "limit": limit,
        "samples": found["n-samples"],
        "task_versions": found["versions"],
        "lm_eval_version": found["lm_eval_version"],
    }


def _tasks(names: Sequence[str], folder: str | None) -> Any:
    """The tasks of a folder if it has all of them, else with the harness's own.

    Those are 13,000 files, which take seconds to list.
    """
    from lm_eval.tasks import TaskManager

    if folder is not None:
        if not Path(folder).is_dir():
            raise UsageError(f"`--tasks-dir`: {folder} is no directory.")
        manager = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(manager.all_subtasks):
            return manager
    manager = TaskManager(include_path=folder)
    if unknown := [name for name in names if name not in manager.task_index]:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks)
        hint = (
            f"near it are {', '.join(near)}" if near else "`lm-eval ls tasks` has all"
        )
        raise UsageError(f"`--tasks`: there is no task `{unknown[0]}`; {hint}.")
    return manager


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Keeps the harness from forking, which a process with JAX's threads must not."""
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _score_table(found: Mapping[str, Any]) -> str:
    """A row per task, filter and metric."""
    rows = [["task", "metric", "shots", "samples", "value", "error"]]
    for task, metrics in found["tasks"].items():
        samples = found["samples"].get(task, {}).get("effective", "-")
        for name, value in metrics.items():
            metric, comma, kind = name.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            rows.append([
                task, metric if kind == "none" else f"{metric}, {kind}",
                str(found["num_fewshot"].get(task, "-")), str(samples),
                f"{value:.4f}" if isinstance(value, float) else str(value),
                f"{error:.4f}" if isinstance(error, float) else "-",
            ])  # fmt: skip
    return aligned(rows, left=2)
