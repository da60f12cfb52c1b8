"""Examples of tasks: from the user's files, else the embedded ones, else the hub.

Files are UTF-8 tables split on tabs alone: quotes are literal, as in GLUE's own
release. Texts are kept to the last space, which byte-level tokenizers see.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from experiments.classification.tasks import TASKS, Columns, Task, label_key
from experiments.common.corpora import (
    ASSETS,
    HubTable,
    check_data_dir,
    hub_table,
    read_utf8,
)
from kashin_jax.errors import DataError, UsageError

__all__ = ["EMBEDDED", "Examples", "embedded_tasks", "has_files", "load_examples"]

EMBEDDED = ASSETS

_REPOSITORY = "nyu-mll/glue"
# Known damage is far rarer; more of it means that the user's file is another's.
_MOST_DAMAGED = 1e-3


class Examples(NamedTuple):
    """A split of a task, in the order of its file.

    Attributes:
      first: The texts, or the first texts of pairs.
      second: The second texts; None for a task of single texts.
      labels: Classes in the order of `Task.labels`, scores or ratings.
      source: `data_dir:RTE/dev.tsv`, `embedded` or the hub's repository.
      sha256: Of the file's bytes; of the rows as JSON lines if they are the hub's.
      num_skipped: Damaged rows left out, see `Task.has_damaged_rows`.
    """

    first: tuple[str, ...]
    second: tuple[str, ...] | None
    labels: Int32[np.ndarray, " n"] | Float32[np.ndarray, " n"]
    source: str
    sha256: str
    num_skipped: int = 0


class _Row(NamedTuple):
    # "`RTE/dev.tsv` line 7", the beginning of every message about the row.
    where: str
    first: str
    second: str | None
    label: str


def embedded_tasks() -> tuple[str, ...]:
    """Names of the tasks whose evaluation files come with the repository."""
    return tuple(name for name, task in TASKS.items() if has_files(task, EMBEDDED))


def has_files(task: Task, folder: Path) -> bool:
    """Whether a folder has all evaluation files of a task, in a layout we know."""
    return any(
        all((folder / place / f"{s}.tsv").is_file() for s in task.evaluation_splits)
        for place in _places(task)
    )


def _places(task: Task) -> tuple[str, ...]:
    """Where a task may lie in a folder; `glue/` leaves room for other texts beside."""
    names = (task.folder, task.name)
    return (*names, *(f"glue/{name}" for name in names))


def load_examples(task: Task, split: str, data_dir: Path | None = None) -> Examples:
    """Reads a split, in GLUE's own layout or in the plain one.

    Args:
      task: What to read.
      split: `train`, or one of `task.evaluation_splits`.
      data_dir: Holds a folder named as GLUE's or as the task (`RTE/dev.tsv` or
        `rte/dev.tsv`), itself or in `glue/`. What it lacks is embedded or asked of the
        hub.

    Returns:
      All examples of the split.

    Raises:
      UsageError: If the split has no public labels.
      DataError: If the file cannot be found or read, or a row is malformed; the
        message names the file and the line.
    """
    if split not in task.splits:
        raise UsageError(
            f"{task.title} has labels for {', '.join(task.splits)}. "
            f"Got `split`={split}; name one of those."
        )
    found = _find(task, f"{split}.tsv", data_dir)
    if found is None:
        return _from_hub(task, split, data_dir)
    path, source = found
    return _from_file(task, path, source)


def _find(task: Task, file: str, data_dir: Path | None) -> tuple[Path, str] | None:
    check_data_dir(data_dir)
    if data_dir is not None:
        for folder in _places(task):
            if (data_dir / folder / file).is_file():
                return data_dir / folder / file, f"data_dir:{folder}/{file}"
    path = EMBEDDED / task.folder / file
    return (path, "embedded") if path.is_file() else None


def _from_file(task: Task, path: Path, source: str) -> Examples:
    text = read_utf8(path)
    sha256 = hashlib.sha256(text.encode("utf-8")).hexdigest()
    lines = text.removeprefix("\ufeff").removesuffix("\n").split("\n")
    table = [line.removesuffix("\r").split("\t") for line in lines]
    header, columns = _layout(task, path, table[0])
    # Lines are counted from 1, as editors do.
    numbered = list(enumerate(table, 1))
    if header is table[0]:
        del numbered[0]
    sound = [(n, cells) for n, cells in numbered if len(cells) == len(header)]
    skipped = len(numbered) - len(sound)
    if skipped > (_MOST_DAMAGED * len(numbered) if task.has_damaged_rows else 0):
        _report_damage(path, header, numbered)
    if not sound:
        raise DataError(f"`{path}` holds no examples; restore the file.")
    places = [header.index(name) for name in columns if name is not None]
    rows = (
        _row(f"`{path}` line {n}", [cells[i] for i in places]) for n, cells in sound
    )
    examples = _collect(task, rows, source, sha256, blank_is_text=task.has_damaged_rows)
    return examples._replace(num_skipped=skipped)


def _layout(
    task: Task, path: Path, line: Sequence[str]
) -> tuple[Sequence[str], Columns]:
    lacking = [[c for c in cs if c and c not in line] for cs in task.layouts]
    for columns, absent in zip(task.layouts, lacking, strict=True):
        if not absent:
            return line, columns
    if task.header is not None:
        return task.header, task.layouts[0]
    absent = min(lacking, key=len)
    columns = task.layouts[lacking.index(absent)]
    needed = ", ".join(f"`{name}`" for name in columns if name)
    raise DataError(
        f"`{path}` line 1 has no column `{absent[0]}`; {task.title} needs a header "
        f"line, split by tabs, with {needed}."
    )


def _report_damage(
    path: Path, header: Sequence[str], numbered: list[tuple[int, list[str]]]
) -> None:
    line, cells = next((n, c) for n, c in numbered if len(c) != len(header))
    raise DataError(
        f"`{path}` line {line} has {len(cells)} cells instead of {len(header)}; lines "
        "are split on tabs alone, quotes are literal: restore the file."
    )


def _row(where: str, cells: Sequence[str]) -> _Row:
    *texts, label = cells
    return _Row(where, texts[0], texts[1] if len(texts) > 1 else None, label)


def _from_hub(task: Task, split: str, data_dir: Path | None) -> Examples:
    file = f"{task.folder}/{split}.tsv"
    if task.hub_columns is None:
        raise DataError(f"`{EMBEDDED / file}` is missing; restore it.")
    table = hub_table(
        _REPOSITORY,
        task.name,
        split.replace("dev", "validation"),
        [name for name in task.hub_columns if name is not None],
        missing=str(data_dir / file) if data_dir is not None else file,
    )
    _check_hub_labels(task, task.hub_columns.label, table)
    rows = [
        _row(f"`{_REPOSITORY}` {task.name} {split} row {i}", [*texts, str(label)])
        for i, (*texts, label) in enumerate(zip(*table.columns, strict=True))
    ]
    lines = "".join(json.dumps(row[1:]) + "\n" for row in rows)
    sha256 = hashlib.sha256(lines.encode("utf-8")).hexdigest()
    # Nobody can mend the hub's rows, and published numbers include them as they are.
    return _collect(task, rows, _REPOSITORY, sha256, blank_is_text=True)


def _check_hub_labels(task: Task, column: str, table: HubTable) -> None:
    feature = table.features.get(column)
    names = tuple(getattr(feature, "names", task.labels))
    if names != task.labels:
        raise DataError(
            f"`{_REPOSITORY}` {task.name} has the labels {', '.join(names)} instead of "
            f"{', '.join(task.labels)}; give GLUE's own files by `--data_dir`."
        )


def _collect(
    task: Task, rows: Iterable[_Row], source: str, sha256: str, *, blank_is_text: bool
) -> Examples:
    is_class = task.score_range is None and task.rating_range is None
    first, second, labels = [], [], []
    for row in rows:
        for text in (row.first, row.second):
            if text is not None and not text.strip() and not blank_is_text:
                raise DataError(f"{row.where} has an empty text; restore the row.")
        first.append(row.first)
        second.append(row.second or "")
        labels.append(_parse_label(task, row))
    return Examples(
        first=tuple(first),
        second=tuple(second) if task.is_pair else None,
        labels=np.asarray(labels, np.int32 if is_class else np.float32),
        source=source,
        sha256=sha256,
    )


def _parse_label(task: Task, row: _Row) -> float:
    cell = row.label.strip()
    if task.rating_range is not None:
        return _parse_rating(task, cell, row.where)
    if cell in ("-1", "-1.0"):
        raise DataError(
            f"{row.where} has the label -1: hidden, as in GLUE's test sets; "
            "give a split with labels."
        )
    if task.score_range is not None:
        return _parse_score(task.score_range, cell, row.where)
    numbers = [str(i) for i in range(len(task.labels))]
    if cell in numbers:
        return numbers.index(cell)
    if label_key(cell) in task.labels:
        return task.labels.index(label_key(cell))
    names = ", ".join(f"{i} ({name})" for i, name in enumerate(task.labels))
    raise DataError(
        f"{row.where} has the label {cell!r}; {task.title} knows {names}: "
        "correct the row."
    )


def _parse_rating(task: Task, cell: str, where: str) -> float:
    assert task.rating_range is not None
    rating = _parse_score(task.rating_range, cell, where)
    if rating == 0:
        raise DataError(
            f"{where} has the rating 0, neither {task.labels[0]} nor {task.labels[1]}; "
            "leave the row out."
        )
    return rating


def _parse_score(score_range: tuple[float, float], cell: str, where: str) -> float:
    low, high = score_range
    try:
        score = float(cell)
    except ValueError:
        score = math.nan
    if not low <= score <= high:
        raise DataError(
            f"{where} has the score {cell!r}, not a number from {low:g} to {high:g}; "
            "correct the row."
        )
    return score
