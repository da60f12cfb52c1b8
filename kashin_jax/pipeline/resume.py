"""What an unfinished run leaves behind, so that it goes on and never meets another.

A run writes into a directory of its own. Who the directory belongs to stands in a
hidden file, as a fingerprint of everything that the result depends on; a shard that is
there is finished; and what was lost in it stands in a hidden file beside it. Packed
tensors of a shard that is not finished are kept in hidden files of their own.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.io import (
    Checkpoint,
    PlannedTensor,
    TensorFile,
    make_directory,
    open_safetensors,
    open_shard,
    read_json,
    write_json,
    write_stored,
)
from kashin_jax.pipeline.report import (
    REPORT_NAME,
    LayerReport,
    read_report,
    write_report,
)
from kashin_jax.pipeline.rules import Rules, rules_to_json
from kashin_jax.tensors import QuantizedTensor
from kashin_jax.version import library_version

fcntl: Any
try:
    import fcntl
except ImportError:  # elsewhere than on Unix two runs are not kept apart
    fcntl = None

__all__ = [
    "Fingerprint",
    "KeptNumbers",
    "claimed_directory",
    "fingerprint",
    "finished_run",
    "forget_tensors",
    "join_parts",
    "keep_directory",
    "keep_tensor",
    "kept_numbers",
    "kept_tensor",
    "release_directory",
    "remove_parts",
    "write_part",
]

_STATE = ".kashin_quantize.json"

_IN_WORDS = ("seed", "shards", "versions")
"""Parts that are no digests."""


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Identifies a run, so that it goes on where it was and meets no other.

    Attributes:
      parts: By a name that messages use, as numbers or digests.
    """

    parts: Mapping[str, str]

    @property
    def digest(self) -> str:
        """The hash of all parts."""
        return _digest(dict(self.parts))

    def to_json(self) -> dict[str, Any]:
        """The content of the hidden file."""
        return {"fingerprint": self.digest, "parts": dict(self.parts)}

    def differences(self, state: Mapping[str, Any]) -> str:
        """What differs from the run of a hidden file, in words."""
        parts = state.get("parts")
        if not isinstance(parts, dict):
            return f"another fingerprint ({str(state.get('fingerprint'))[:12]})"
        found = []
        for name in {**self.parts, **parts}:
            mine, theirs = self.parts.get(name), parts.get(name)
            if mine != theirs:
                is_said = name in _IN_WORDS
                found.append(
                    f"other {name}" + (f" ({theirs}, not {mine})" if is_said else "")
                )
        return " and ".join(found) or "another fingerprint"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def fingerprint(
    source: Checkpoint,
    rules: Rules,
    seed: int,
    shard_bytes: int,
    tensors: Sequence[PlannedTensor],
    budget: int | float | None = None,
    learned: Mapping[str, str] | None = None,
) -> Fingerprint:
    """Everything that the bytes of the result depend on.

    Of the source it sees names, sizes, times of change and headers: hashing the data
    would read all of it once more.

    Args:
      source: What is quantized.
      rules: How.
      seed: Seeds everything random.
      shard_bytes: Most bytes of data in a file.
      tensors: What the rules of this version came to.
      budget: Stored bits per weight, where widths follow from it.
      learned: By name digests of what else decides.
    """
    files = []
    for name, file in source.files.items():
        status = file.path.stat()
        entries = [(key, *spec) for key, spec in file.specs.items()]
        files.append([name, status.st_size, status.st_mtime_ns, entries])
    return Fingerprint({
        **(learned or {}),
        "weights": _digest([files, dict(source.config)]),
        "rules": _digest([
            rules_to_json(rules),
            *([] if budget is None else [f"budget {budget!r}"]),
            [tensor.name for tensor in tensors if tensor.description],
        ]),
        "seed": f"{seed}",
        "shards": f"{shard_bytes} bytes",
        "versions": f"kashin_jax {library_version()}, "
        f"jax {jax.__version__}, {jax.default_backend()}",
    })  # fmt: skip


def finished_run(directory: Path, run: Fingerprint) -> dict[str, LayerReport] | None:
    """The reports of a finished run of this fingerprint; None if there is no such run.

    Raises:
      UsageError: If another run was finished and kept there.
      CheckpointError: If its files are damaged.
    """
    state = _state(directory)
    if not state.get("finished"):
        return None
    where, remedy = f"{directory}: holds a finished run", "Name another directory"
    _check_owner(state, run, where, f"{remedy}, or replace it by `--force`")
    seconds = state.get("layers", {})
    return {
        name: report.with_seconds(seconds.get(name, {}))
        for name, report in read_report(directory / REPORT_NAME).items()
    }


@contextlib.contextmanager
def claimed_directory(
    directory: Path, run: Fingerprint, replace: str | None = None
) -> Iterator[None]:
    """Reserves a directory for one run, or finds it reserved for it by an earlier try.

    What a killed process left half-written is removed. While the block lasts no other
    process can have the directory; a process that dies lets it go.

    Args:
      directory: Made where there is none.
      run: Whose it is to be.
      replace: What to remove from it first: a `finished` run, or an `unfinished` one.

    Raises:
      UsageError: If it is another run's, or in use, or holds something else.
    """
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory}: is a file; name a directory.")
    make_directory(directory)
    with _locked(directory):
        _claim(directory, run, replace)
        yield


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Holds the lock of a directory, which the system lets go with the process."""
    if fcntl is None:  # pragma: no cover
        yield
        return
    # The directory itself: no file of ours is left behind by a process that dies.
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UsageError(
            f"{directory}: another process is writing there; wait until it is done, or "
            "name another directory."
        ) from None
    except OSError:
        # Some network drives have no locks.
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def _claim(directory: Path, run: Fingerprint, replace: str | None) -> None:
    state = _state(directory)
    if state and not state.get("finished"):
        if replace != "unfinished":
            where = f"{directory}: holds an unfinished run"
            remedy = "Repeat its command, or remove what it did by `--restart`"
            _check_owner(state, run, where, remedy)
            _remove(directory.rglob(".*.partial"))
            return
        _empty(directory)
    # Killed before it could say whose directory this is.
    _remove(directory.glob(f".{_STATE}.*.partial"))
    if replace == "finished" and (directory / REPORT_NAME).exists():
        _empty(directory)
    if any(path.name != _STATE for path in directory.iterdir()) or (
        state and state.get("finished") and replace != "finished"
    ):
        raise UsageError(
            f"{directory}: is not empty; name a directory that does not exist."
        )
    write_json(directory / _STATE, run.to_json())


def _empty(directory: Path) -> None:
    """Removes a run; one that is killed in between belongs to nobody."""
    write_json(directory / _STATE, {"fingerprint": "removed"})
    for path in list(directory.iterdir()):
        if path.name == _STATE:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def release_directory(directory: Path) -> None:
    """Marks the run as finished, and forgets which one it was."""
    (directory / _STATE).unlink(missing_ok=True)


def keep_directory(
    directory: Path, run: Fingerprint, reports: Mapping[str, LayerReport]
) -> None:
    """Marks the run as finished and lets `finished_run` recognize it."""
    seconds = {name: report.seconds_to_json() for name, report in reports.items()}
    content = {"finished": True, "layers": seconds}
    write_json(directory / _STATE, run.to_json() | content)


def write_part(directory: Path, shard: str, reports: Mapping[str, LayerReport]) -> None:
    """Writes the reports of a shard, before the shard itself appears."""
    write_report(_part(directory, shard), reports, with_seconds=True)


def join_parts(directory: Path, shards: Sequence[str]) -> dict[str, LayerReport]:
    """Makes the report of its parts, unless an earlier run did; returns all reports.

    Raises:
      CheckpointError: If part of it was removed or changed.
    """
    path, joined = directory / REPORT_NAME, dict[str, LayerReport]()
    if not all(_part(directory, shard).exists() for shard in shards):
        joined = read_report(path)
    else:
        for shard in shards:
            joined |= read_report(_part(directory, shard))
        write_report(path, joined)
    remove_parts(directory, shards)
    return joined


def remove_parts(directory: Path, shards: Sequence[str]) -> None:
    """Removes the reports of single shards."""
    for shard in shards:
        _part(directory, shard).unlink(missing_ok=True)


def keep_tensor(
    directory: Path,
    planned: PlannedTensor,
    tensor: QuantizedTensor,
    report: LayerReport,
) -> None:
    """Keeps a packed tensor until its shard is whole."""
    path = _kept(directory, planned.name)
    # Before the tensor appears: one without its report is none.
    write_part(directory, path.name, {planned.name: report})
    with open_shard(path, [planned]) as writer:
        write_stored(writer, planned.name, tensor)


def kept_tensor(
    directory: Path, planned: PlannedTensor
) -> tuple[TensorFile, LayerReport] | None:
    """A packed tensor that an earlier run kept, and its report; None without one.

    Raises:
      CheckpointError: If it was changed.
    """
    path = _kept(directory, planned.name)
    if not path.exists():
        return None
    report = read_report(_part(directory, path.name))[planned.name]
    return open_safetensors(path), report


class KeptNumbers(NamedTuple):
    """Numbers that took time to measure, in a hidden file until all work is done."""

    path: Path

    def load(self) -> list[float]:
        """Those of an interrupted run, in order.

        Raises:
          CheckpointError: If the file was changed.
        """
        if not self.path.exists():
            return []
        found = read_json(self.path).get("numbers")
        if not isinstance(found, list):
            raise CheckpointError(f"{self.path}: was changed; remove it.")
        return [float(each) for each in found]

    def append(self, number: float) -> None:
        """Keeps one more."""
        write_json(self.path, {"numbers": [*self.load(), number]})

    def forget(self) -> None:
        """Removes them all."""
        self.path.unlink(missing_ok=True)


def kept_numbers(directory: Path) -> KeptNumbers:
    """Where a run in a directory keeps what it measured."""
    return KeptNumbers(directory / ".sensitivities.json")


def forget_tensors(directory: Path, shard: Iterable[PlannedTensor]) -> None:
    """Removes what was kept for a shard that is whole."""
    for planned in shard:
        path = _kept(directory, planned.name)
        path.unlink(missing_ok=True)
        _part(directory, path.name).unlink(missing_ok=True)


def _kept(directory: Path, name: str) -> Path:
    # Names of tensors may be longer than those of files, and hold anything.
    return directory / f".kept-{hashlib.sha256(name.encode()).hexdigest()[:24]}"


def _part(directory: Path, shard: str) -> Path:
    return directory / f".{shard}.report.jsonl"


def _check_owner(
    state: Mapping[str, Any], run: Fingerprint, where: str, remedy: str
) -> None:
    if state.get("fingerprint") != run.digest:
        raise UsageError(f"{where} with {run.differences(state)}. {remedy}.")


def _state(directory: Path) -> dict[str, Any]:
    """Content of the hidden file; empty where there is none."""
    path = directory / _STATE
    return read_json(path) if path.exists() else {}


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        path.unlink(missing_ok=True)
