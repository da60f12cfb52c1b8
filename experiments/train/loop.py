"""The training loop: batches in, log lines and checkpoints out."""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Container, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import PyTree
from tqdm import tqdm

from experiments.train.step import Params, StepMetrics, Trainer, TrainState
from experiments.train.stored import Checkpoints, RunLog
from kashin_jax.errors import NonFiniteError

__all__ = ["LoopParts", "LoopSettings", "stop_signals", "train"]


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Yields an event that is set by the first SIGINT or SIGTERM.

    A step consumes its state, so an exception in the middle of one could not be
    followed by a checkpoint. A second signal acts as usual.
    """
    wish = threading.Event()
    # Python delivers signals to the main thread only; elsewhere there is none to catch.
    catches = threading.current_thread() is threading.main_thread()
    caught = (signal.SIGINT, signal.SIGTERM) if catches else ()
    usual: dict[int, Any] = {number: signal.getsignal(number) for number in caught}

    def note(number: int, frame: object) -> None:
        wish.set()
        signal.signal(number, usual[number])

    for number in caught:
        signal.signal(number, note)
    try:
        yield wish
    finally:
        for number in caught:
            signal.signal(number, usual[number])


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How far a call goes, and when it does what.

    Attributes:
      steps: Optimizer steps of the whole run.
      stop_after: Steps of this call; 0: to the end.
      log_every: Steps per line of the log.
      checkpoint_every: Steps between checkpoints.
      validate_at: Numbers of steps done after which to validate; the last step of a
        call is always one.
      unit: What speed is measured in, such as tokens.
      units_per_step: How many of it a batch has.
      warmup_flag: Named where a run diverges.
    """

    steps: int
    stop_after: int
    log_every: int
    checkpoint_every: int
    validate_at: Container[int]
    unit: str
    units_per_step: int
    warmup_flag: str


class LoopParts(NamedTuple):
    """What a run consists of, its state apart.

    Attributes:
      trainer: The compiled step.
      schedule: Learning rate of every step, for the log.
      read_batch: The batch of a step, counted from 0.
      checkpoints: Receives states.
      log: Receives measurements.
      validate: Measures parameters after so many steps, or `None`.
      has_converged: Whether the run shall end, asked before the first step and after
        measurements; `None`: never.
    """

    trainer: Trainer
    schedule: optax.Schedule
    read_batch: Callable[[int], PyTree[np.ndarray]]
    checkpoints: Checkpoints
    log: RunLog
    validate: Callable[[int, Params], dict[str, Any]] | None
    has_converged: Callable[[], bool] | None = None

    @property
    def is_over(self) -> bool:
        """Whether measurements say that nothing is left to do."""
        return self.has_converged is not None and self.has_converged()


class _Meter:
    """Measurements since the last log line, left on the device until they are read."""

    def __init__(self, settings: LoopSettings, parts: LoopParts, step: int):
        self._settings = settings
        self._log = parts.log
        self._schedule = parts.schedule
        self._pending: list[StepMetrics] = []
        self._logged_step = step
        self._logged_time = time.perf_counter()
        self._start = self._logged_time - parts.log.seconds
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
                f"last checkpoint in `--out={self._log.path.parent}` is kept. Lower "
                f"`--learning_rate` or raise `--{self._settings.warmup_flag}`, in "
                "another directory."
            )
        return means

    def write(self, step: int) -> float:
        """Logs the means and forgets them; returns the loss."""
        means, now = self.means(step), time.perf_counter()
        unit, units_per_step = self._settings.unit, self._settings.units_per_step
        new_units = (step - self._logged_step) * units_per_step
        training_seconds = now - self._logged_time - self._seconds_outside
        self._log.append(
            {
                "step": step,
                "loss": round(float(means.loss), 5),
                "grad_norm": round(float(means.grad_norm), 5),
                "learning_rate": float(f"{self._schedule(step - 1):.6g}"),
                unit: step * units_per_step,
                "seconds": round(now - self._start, 3),
                f"{unit}_per_second": round(new_units / training_seconds, 1),
            }
        )
        self._pending, self._seconds_outside = [], 0.0
        self._logged_step, self._logged_time = step, now
        return float(means.loss)


def train(settings: LoopSettings, parts: LoopParts, state: TrainState) -> TrainState:
    """Runs until all steps are done, `stop_after` of them, or a signal asks to stop.

    Args:
      settings: When to do what.
      parts: The parts of the run.
      state: Fresh or restored; consumed.

    Returns:
      The last state, which has been saved.

    Raises:
      NonFiniteError: If loss or gradient is not finite when a line or a checkpoint is
        due. Nothing is saved then.
    """
    step = int(state.step)
    end = min(settings.steps, step + (settings.stop_after or settings.steps))
    meter = _Meter(settings, parts, step)
    with stop_signals() as stop, _progress_bar(settings, step) as bar:
        stopping = step >= end or parts.is_over
        while not stopping:
            batch = jax.device_put(parts.read_batch(step), parts.trainer.batched)
            state, metrics = parts.trainer.step(state, batch)
            meter.add(metrics)
            step += 1
            bar.update()
            # Read once per step: a signal that comes later must not skip the save.
            stopping = step == end or stop.is_set()
            if step % settings.log_every == 0 or step in (1, settings.steps):
                bar.set_postfix(loss=f"{meter.write(step):.3f}")
            if parts.validate and (step in settings.validate_at or step == end):
                with meter.outside(step):
                    found = parts.validate(step, state.params)
                    parts.log.append({"step": step, **found})
                stopping = stopping or parts.is_over
            if stopping or step % settings.checkpoint_every == 0:
                with meter.outside(step):
                    parts.checkpoints.save(state)
    return state


def _progress_bar(settings: LoopSettings, step: int) -> tqdm:
    return tqdm(
        total=settings.steps, initial=step, desc="train", unit="step", disable=None
    )
