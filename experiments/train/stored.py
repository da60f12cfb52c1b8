"""A run as it lies on the disk: whose directory it is, its checkpoints and its log."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Sharding
from jaxtyping import Array

from experiments.common.plots import save_picture
from experiments.common.results import append_jsonl, read_jsonl, write_jsonl
from experiments.train.step import TrainState
from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.io import hash_file, write_json

__all__ = [
    "Checkpoints",
    "Panel",
    "RunLog",
    "StoredRun",
    "claim_directory",
    "open_run",
    "plot_log",
    "write_asset",
]


def write_asset(
    directory: Path, *, name: str, context: int, even_files: Sequence[Path]
) -> None:
    """Writes what later programs must know of how an exported model was trained.

    Args:
      directory: Of the model; receives `asset.json`.
      name: Of the model.
      context: Tokens of a window. Positions beyond exist but are untrained.
      even_files: Texts of which every second document was trained on, so that the
        others are left for calibration; named by their hashes.
    """
    content: dict[str, Any] = {"name": name, "trained_context": context}
    if even_files:
        seen = {hash_file(file): file.name for file in even_files}
        content["even_documents_of"] = seen
    write_json(directory / "asset.json", content)


def claim_directory(out: Path, identity: dict[str, Any]) -> None:
    """Makes `out` the directory of a run, or checks that it is already.

    Args:
      out: Created where it does not exist.
      identity: What decides the final weights; kept in `run.json`.

    Raises:
      UsageError: If `out` cannot be written.
      CheckpointError: If `out` belongs to a run with another identity, or its
        `run.json` cannot be read.
    """
    path = out / "run.json"
    # As it comes back from the file, where tuples are lists.
    identity = json.loads(json.dumps(identity))
    try:
        out.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _check_identity(out, json.loads(path.read_text("utf-8")), identity)
        write_json(path, identity)
    except OSError as error:
        raise UsageError(
            f"`--out={out}` cannot be written ({error.strerror}); choose another "
            "directory."
        ) from error
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"`{path}` is damaged ({error}); choose another `--out`."
        ) from error


def _check_identity(out: Path, found: Any, identity: dict[str, Any]) -> None:
    if not isinstance(found, dict):
        raise CheckpointError(f"`{out}/run.json` is damaged; choose another `--out`.")
    for name in sorted(identity.keys() | found.keys()):
        if found.get(name) != identity.get(name):
            raise CheckpointError(
                f"`--out={out}` holds a run with `{name}`={found.get(name)}, not "
                f"{identity.get(name)}; give that run's flags or another directory."
            )


class Checkpoints:
    """The newest states of one run, on disk, with checksums of their files.

    Leaves are stored under their paths, so a checkpoint can be read without the
    classes of this program.
    """

    def __init__(self, directory: Path, *, keep: int = 2):
        """Opens a directory, which is made if it is missing.

        Raises:
          UsageError: If it cannot be written.
        """
        import orbax.checkpoint as ocp

        self._args = ocp.args
        self._directory = directory
        self._checksums = directory.with_name(f"{directory.name}.sha256.json")
        # A state that is being saved must not be donated to the next step, hence no
        # saving in the background.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False
        )
        try:
            self._manager = ocp.CheckpointManager(directory.resolve(), options=options)
        except OSError as error:
            raise UsageError(
                f"`{directory}` cannot be written ({error.strerror}); choose another "
                "`--out`."
            ) from error

    def save(self, state: TrainState) -> None:
        """Writes a state, unless the newest one on disk is as many steps old."""
        step = int(state.step)
        if step == self._manager.latest_step():
            return
        self._manager.save(step, args=self._args.StandardSave(_named_leaves(state)))
        known = self._read_checksums() | {str(step): self._checksum(step)}
        kept = {str(step): known.get(str(step)) for step in self._manager.all_steps()}
        write_json(self._checksums, kept)

    def restore_latest(self, state: TrainState, placement: Sharding) -> TrainState:
        """Reads the newest state.

        Args:
          state: Of the same run; returned where nothing has been saved yet.
          placement: Where the leaves shall live.

        Raises:
          CheckpointError: If the newest checkpoint is damaged.
        """
        if (step := self._manager.latest_step()) is None:
            return state
        # Checked here and not left to Orbax, which starts a task for every leaf and
        # prints pages about each one that fails. A process that was killed between
        # saving and checksum leaves a whole checkpoint without one.
        checksum = self._read_checksums().get(str(step))
        if checksum not in (None, self._checksum(step)):
            raise CheckpointError(
                f"`{self._directory / str(step)}` is damaged; remove it to go on from "
                "an earlier step."
            )
        wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement)
            for name, leaf in _named_leaves(state).items()
        }
        found = self._manager.restore(step, args=self._args.StandardRestore(wanted))
        return jax.tree.unflatten(
            jax.tree.structure(state), [found[name] for name in wanted]
        )

    def close(self) -> None:
        """Lets go of the directory."""
        self._manager.close()

    def _checksum(self, step: int) -> str:
        digest = hashlib.sha256()
        directory = self._directory / str(step)
        for path in sorted(directory.rglob("*")):
            digest.update(str(path.relative_to(directory)).encode() + b"\0")
            if path.is_file():
                with open(path, "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def _read_checksums(self) -> dict[str, str]:
        try:
            return json.loads(self._checksums.read_text("utf-8"))
        except FileNotFoundError:
            return {}
        except json.JSONDecodeError as error:
            raise CheckpointError(
                f"`{self._checksums}` is damaged; remove it to trust the checkpoints."
            ) from error


def _named_leaves(state: TrainState) -> dict[str, Array]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in leaves
    }


class RunLog:
    """A log file that continues where the resumed checkpoint stands.

    Attributes:
      path: The file.
      seconds: Time that the kept lines account for.
    """

    def __init__(self, path: Path, *, done_steps: int):
        """Opens a log and drops what was logged after the checkpoint.

        Args:
          path: Made where it does not exist.
          done_steps: Steps that the resumed state has behind it.

        Raises:
          DataError: If the file is not a log.
        """
        self.path = path
        kept = [r for r in read_jsonl(path) if r["step"] <= done_steps]
        self.seconds = max((r.get("seconds", 0.0) for r in kept), default=0.0)
        write_jsonl(path, kept)

    def append(self, record: dict[str, Any]) -> None:
        """Adds one line; it is on disk when this returns."""
        append_jsonl(self.path, record)


class Panel(NamedTuple):
    """One pair of axes of a picture.

    Attributes:
      ylabel: What is measured, with its unit.
      series: Name of a field of the log to its style and label, in matplotlib's terms.
    """

    ylabel: str
    series: Mapping[str, tuple[str, str]]


def plot_log(
    log: Path, picture: Path, panels: Sequence[Panel], *, xscale: str = "linear"
) -> None:
    """Draws fields of a log against the step, in panels beside each other."""
    from matplotlib.figure import Figure

    records = read_jsonl(log)
    figure = Figure(figsize=(7 * len(panels), 4.5), layout="constrained")
    columns = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(columns, panels, strict=True):
        for name, (style, label) in panel.series.items():
            points = [(r["step"], r[name]) for r in records if name in r]
            if points:
                axes.plot(*zip(*points, strict=True), style, markersize=4, label=label)
        axes.set_xscale(xscale)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(panel.ylabel)
        axes.grid(which="both", alpha=0.3)
        if axes.lines:
            axes.legend()
    save_picture(figure, picture, bbox_inches=None, dpi=150)


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
