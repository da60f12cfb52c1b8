"""Rows and scores of a run that may be killed: what is finished is not done again."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float64

from experiments.common.results import append_jsonl, read_jsonl, to_json
from experiments.common.tables import Record
from kashin_jax.errors import DataError, UsageError
from kashin_jax.evaluation import ScoredBatch, Windows, score_windows
from kashin_jax.io import atomic_path

__all__ = ["FinishedRecords", "PartialScores", "remembered", "score_resumably"]


@dataclasses.dataclass(frozen=True)
class PartialScores:
    """A JSON-lines file of finished windows, bound to one evaluation.

    The first line holds the fingerprint, each further line a batch of windows. A line
    that a killed writer left unfinished is ignored, and removed by the next `append`.

    Attributes:
      path: The file; made by the first `append`.
      fingerprint: Everything the scores depend on: weights, method, text, windows,
        versions, device. Compared as JSON.
    """

    path: Path
    fingerprint: Record

    @classmethod
    def in_directory(cls, directory: Path, fingerprint: Record) -> "PartialScores":
        """Names the file after the fingerprint, so that evaluations never meet."""
        fields = repr(sorted(_fields(fingerprint)))
        digest = hashlib.sha256(fields.encode()).hexdigest()[:20]
        return cls(directory / f"{digest}.jsonl", fingerprint)

    def load(self) -> Float64[np.ndarray, " n"]:
        """The scores of the finished windows, from the first on, in nats.

        Raises:
          UsageError: If the file belongs to another evaluation.
          DataError: If it is damaged.
        """
        records = read_jsonl(self.path)
        if records:
            self._check_fingerprint(records[0])
        nlls: list[float] = []
        for record in records[1:]:
            batch = record.get("nlls")
            if record.get("first") != len(nlls) or not isinstance(batch, list):
                raise DataError(
                    f"`{self.path}` has no scores for window {len(nlls)}; delete it to "
                    "start this evaluation again."
                )
            nlls += batch
        return np.asarray(nlls, np.float64)

    def append(self, batch: ScoredBatch) -> None:
        """Stores a batch that follows the ones stored before."""
        if not read_jsonl(self.path):
            append_jsonl(self.path, {"fingerprint": self.fingerprint})
        append_jsonl(self.path, batch._asdict())

    def _check_fingerprint(self, header: dict[str, Any]) -> None:
        ours, theirs = _fields(self.fingerprint), _fields(header.get("fingerprint"))
        if ours != theirs:
            keys = sorted({key for key, _ in ours ^ theirs})
            raise UsageError(
                f"`{self.path}` holds scores of another evaluation (different: "
                f"{', '.join(keys)}); delete it or choose another --out."
            )


def _fields(fingerprint: Any) -> set[tuple[str, str]]:
    if not isinstance(fingerprint, Mapping):
        return set()
    return {(key, to_json({key: value})) for key, value in fingerprint.items()}


def score_resumably(
    nll_fn: Callable[[np.ndarray, np.ndarray], Array],
    windows: Windows,
    store: PartialScores,
    *,
    batch_size: int,
    progress: str | None = "windows",
) -> Float64[np.ndarray, " w"]:
    """Scores all windows, beginning behind those that the store has.

    Args:
      nll_fn: As for `score_windows`.
      windows: As for `score_windows`.
      store: Where finished batches are read from and written to.
      batch_size: As for `score_windows`; may differ from that of the earlier run.
      progress: As for `score_windows`.

    Returns:
      Nats per window.

    Raises:
      UsageError: If the store belongs to another evaluation.
      DataError: If the store is damaged or has more windows than there are.
    """
    count = windows.tokens.shape[0]
    nlls = store.load()
    if nlls.size > count:
        raise DataError(
            f"`{store.path}` holds {nlls.size} windows of {count}; delete it."
        )
    parts = [nlls]
    for batch in score_windows(
        nll_fn, windows, batch_size=batch_size, start=nlls.size, progress=progress
    ):
        store.append(batch)
        parts.append(batch.nlls)
    return np.concatenate(parts)


class FinishedRecords:
    """Records that are not measured twice: of a result file, and of an unfinished run.

    Two are the same if all fields agree that say what is measured, by what and with
    what: model, data, every choice, versions and device.
    """

    def __init__(self, path: Path, earlier: Iterable[Record] = ()):
        """Reads what the unfinished run has.

        Args:
          path: A JSON-lines file of the run; made by the first `add`.
          earlier: What a result file has.

        Raises:
          DataError: If the file is damaged.
        """
        self._path = path
        self._known = [*earlier, *read_jsonl(path)]

    def find(self, identity: Record) -> list[dict[str, Any]]:
        """The records that have these fields, and perhaps others."""
        plain = json.loads(to_json(identity))
        return [dict(r) for r in self._known if plain.items() <= r.items()]

    def add(self, *records: Record) -> None:
        """Keeps records that are finished; they are on disk when this returns."""
        for record in records:
            append_jsonl(self._path, record)
        self._known += records


def remembered(
    directory: Path,
    fingerprint: Record,
    shape: tuple[int, ...],
    compute: Callable[[], np.ndarray],
) -> np.ndarray:
    """Reads an array if it is finished; else computes and keeps it.

    Args:
      directory: Where the files are; it must exist.
      fingerprint: Everything that the array depends on; names the file.
      shape: Of the array.
      compute: Makes it.
    """
    digest = hashlib.sha256(to_json(fingerprint).encode()).hexdigest()[:32]
    path = directory / f"{digest}.npy"
    if path.exists():
        try:
            found = np.load(path, allow_pickle=False)
        # What a damaged header raises depends on the version of Python.
        except Exception:
            # By a full disk, say: computed again and replaced.
            found = np.zeros(())
        if found.shape == shape:
            return found
    outputs = compute()
    # NumPy would add a suffix to a path.
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, outputs, allow_pickle=False)
    return outputs
