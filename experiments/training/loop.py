"""The training loop: batches in, log lines and checkpoints out."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int, PyTree
from tqdm import tqdm

from experiments.training.checkpoints import Checkpoints
from experiments.training.config import TrainConfig
from experiments.training.corpus import ShuffledStream
from experiments.training.optimizer import make_schedule
from experiments.training.runlog import RunLog
from experiments.training.signals import stop_signals
from experiments.training.step import StepMetrics, Trainer, TrainState
from kashin_jax.errors import NonFiniteError

__all__ = ["LoopParts", "read_batch", "train"]


class LoopParts(NamedTuple):
    """What a run consists of, its state apart.

    Attributes:
      trainer: The compiled step.
      stream: Tokens.
      checkpoints: Receives states.
      log: Receives measurements.
      validate: Measures parameters on held-out text, or `None`.
    """

    trainer: Trainer
    stream: ShuffledStream
    checkpoints: Checkpoints
    log: RunLog
    validate: Callable[[PyTree[Array]], dict[str, Any]] | None


def read_batch(
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


class _Meter:
    """Measurements since the last log line, left on the device until they are read."""

    def __init__(self, config: TrainConfig, log: RunLog, step: int):
        self._config = config
        self._log = log
        self._schedule = make_schedule(config)
        self._pending: list[StepMetrics] = []
        self._logged_step = step
        self._logged_time = time.perf_counter()
        self._start = self._logged_time - log.seconds
        self._seconds_outside = 0.0

    def add(self, metrics: StepMetrics) -> None:
        self._pending.append(metrics)

    @contextlib.contextmanager
    def outside(self, step: int) -> Iterator[None]:
        """Leaves what is done inside out of the speed; first waits for the steps."""
        if self._pending:
            self.means(step)
        begin = time.perf_counter()
        yield
        self._seconds_outside += time.perf_counter() - begin

    def means(self, step: int) -> StepMetrics:
        """Waits for the device; raises NonFiniteError if anything diverged."""
        values = jax.device_get(self._pending)
        means = StepMetrics(*(np.mean(column) for column in zip(*values, strict=True)))
        if not all(map(math.isfinite, means)):
            raise NonFiniteError(
                f"The loss or its gradient stopped being finite by step {step}; the "
                f"last checkpoint in `--out={self._config.out}` is kept. Lower "
                "`--learning_rate` or raise `--warmup_steps`, in another directory."
            )
        return means

    def write(self, step: int) -> float:
        """Logs the means and forgets them; returns the loss."""
        means, now = self.means(step), time.perf_counter()
        window_tokens = self._config.batch_size * self._config.context
        new_tokens = (step - self._logged_step) * window_tokens
        training_seconds = now - self._logged_time - self._seconds_outside
        self._log.append(
            {
                "step": step,
                "loss": round(float(means.loss), 5),
                "grad_norm": round(float(means.grad_norm), 5),
                "learning_rate": float(f"{self._schedule(step - 1):.6g}"),
                "tokens": step * window_tokens,
                "seconds": round(now - self._start, 3),
                "tokens_per_second": round(new_tokens / training_seconds, 1),
            }
        )
        self._pending, self._seconds_outside = [], 0.0
        self._logged_step, self._logged_time = step, now
        return float(means.loss)


def train(config: TrainConfig, parts: LoopParts, state: TrainState) -> TrainState:
    """Runs until all steps are done, `stop_after` of them, or a signal asks to stop.

    Args:
      config: The run.
      parts: Its parts.
      state: Fresh or restored; consumed.

    Returns:
      The last state, which has been saved.

    Raises:
      NonFiniteError: If loss or gradient is not finite when a line or a checkpoint is
        due. Nothing is saved then.
    """
    step = int(state.step)
    end = min(config.steps, step + (config.stop_after or config.steps))
    meter = _Meter(config, parts.log, step)
    with stop_signals() as stop, _progress_bar(config, step) as bar:
        stopping = step >= end
        while not stopping:
            batch = read_batch(config, parts.stream, step)
            state, metrics = parts.trainer.step(
                state, jax.device_put(batch, parts.trainer.batched)
            )
            meter.add(metrics)
            step += 1
            bar.update()
            # Read once per step: a signal that comes later must not skip the save.
            stopping = step == end or stop.is_set()
            if step % config.log_every == 0 or step in (1, config.steps):
                bar.set_postfix(loss=f"{meter.write(step):.3f}")
            if parts.validate and (step % config.eval_every == 0 or step == end):
                with meter.outside(step):
                    parts.log.append({"step": step, **parts.validate(state.params)})
            if stopping or step % config.checkpoint_every == 0:
                with meter.outside(step):
                    parts.checkpoints.save(state)
    return state


def _progress_bar(config: TrainConfig, step: int) -> tqdm:
    return tqdm(
        total=config.steps, initial=step, desc="train", unit="step", disable=None
    )
