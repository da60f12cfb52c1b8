"""A run as it lies on the disk."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jax.sharding import Sharding

from experiments.train.checkpoints import Checkpoints
from experiments.train.runlog import RunLog
from experiments.train.step import TrainState

__all__ = ["StoredRun", "open_run"]


class StoredRun(NamedTuple):
    """Where a run stands, and what it goes on writing to.

    Attributes:
      state: The newest on disk, or the fresh one.
      checkpoints: In `checkpoints/`.
      log: In `log.jsonl`.
    """

    state: TrainState
    checkpoints: Checkpoints
    log: RunLog


@contextlib.contextmanager
def open_run(out: Path, fresh: TrainState, placement: Sharding) -> Iterator[StoredRun]:
    """Opens the directory of a run; a context.

    Args:
      out: As claimed by `claim_directory`.
      fresh: State of a run that has not been saved yet.
      placement: Where the leaves of the state shall live.

    Raises:
      UsageError: If the directory cannot be written.
      CheckpointError: If the newest checkpoint is damaged.
      DataError: If the log is damaged.
    """
    checkpoints = Checkpoints(out / "checkpoints")
    try:
        state = checkpoints.restore_latest(fresh, placement)
        log = RunLog(out / "log.jsonl", done_steps=int(state.step))
        yield StoredRun(state, checkpoints, log)
    finally:
        checkpoints.close()
