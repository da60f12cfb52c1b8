"""Results on disk: records as JSON lines, a Markdown table, nothing half-written.

A record is a flat mapping, one per row of a table; `experiments.tables` prints it.
JSON has no infinity and no NaN: they are written as the strings `inf`, `-inf`, `nan`,
and read back as numbers.
"""

import contextlib
import importlib.metadata
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.tables import Column, Record, markdown_table
from kashin_jax.errors import DataError, UsageError

__all__ = [
    "WrittenResults",
    "append_jsonl",
    "atomic_path",
    "environment_fields",
    "prepare_output",
    "read_jsonl",
    "remove_work",
    "start_work",
    "to_json",
    "write_jsonl",
    "write_results",
]

_NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def prepare_output(directory: str | Path) -> Path:
    """Makes the output directory and proves that it can be written, before any work.

    Raises:
      UsageError: If it cannot.
    """
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UsageError(
            f"`--out` {path} cannot be written ({error.strerror}); "
            "choose another directory."
        ) from error
    return path


def start_work(out: Path, stem: str) -> Path:
    """The directory of a run's unfinished work, `OUT/work/STEM`, made if it is not."""
    work = out / "work" / stem
    work.mkdir(parents=True, exist_ok=True)
    return work


def remove_work(work: Path) -> None:
    """Removes what `start_work` made, once the run is finished."""
    shutil.rmtree(work)
    if not any(work.parent.iterdir()):
        work.parent.rmdir()


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Lends a temporary path that becomes `path` if the block ends without an error.

    It keeps the suffix, by which some writers choose their format.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def environment_fields() -> dict[str, str]:
    """The fields of a record that say what computed it."""
    return {
        "kashin_jax_version": importlib.metadata.version("kashin_jax"),
        "jax_version": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }


def to_json(record: Record) -> str:
    """One line of strict JSON; NumPy and JAX values become plain numbers and lists."""
    return json.dumps(_plain(record), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_restored(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Reads the records of a file, without a last line that was cut off.

    Returns:
      The records in order; none if there is no such file.

    Raises:
      DataError: If any other line is not a JSON object.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        record = _parsed(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            raise DataError(
                f"`{path}` line {number} is not a JSON object; repair or delete it."
            )
    return records


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return _restored(record) if isinstance(record, dict) else None


def append_jsonl(path: Path, record: Record) -> None:
    """Adds one record and waits until it is on the disk.

    A line that an earlier, killed writer left unfinished is removed first. One writer
    at a time.
    """
    with path.open("a+b") as file:
        file.seek(0)
        content = file.read()
        tail = content[content.rfind(b"\n") + 1 :]
        if tail and _parsed(tail) is None:
            file.truncate(len(content) - len(tail))
        elif tail:
            file.write(b"\n")
        file.write(to_json(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def write_jsonl(path: Path, records: Iterable[Record]) -> None:
    """Writes all records at once, or leaves the file as it was."""
    lines = "".join(to_json(record) + "\n" for record in records)
    with atomic_path(path) as temporary:
        temporary.write_text(lines, encoding="utf-8")


class WrittenResults(NamedTuple):
    """Where `write_results` put its files."""

    jsonl: Path
    markdown: Path


def write_results(
    directory: Path,
    stem: str,
    records: Sequence[Record],
    columns: Sequence[Column],
    *,
    title: str,
    command: str,
    facts: Sequence[str] = (),
    rows: Sequence[Record] | None = None,
    appendix: str = "",
) -> WrittenResults:
    """Writes `STEM.jsonl`, all fields, and `STEM.md`, the table as a reader sees it.

    Args:
      directory: As returned by `prepare_output`.
      stem: File name without suffix.
      records: One per line of the JSON file.
      columns: The columns of the Markdown table.
      title: Heading of the Markdown file.
      command: What reproduces the table, shown below the heading.
      facts: Sentences such as the protocol, shown as a list above the table.
      rows: Of the Markdown table; the records when None.
      appendix: Markdown shown below the table.

    Returns:
      The paths of the two files, each replaced in one step.
    """
    paths = WrittenResults(directory / f"{stem}.jsonl", directory / f"{stem}.md")
    parts = [f"# {title}", f"```\n{command}\n```"]
    if facts:
        parts.append("\n".join(f"- {fact}" for fact in facts))
    parts.append(markdown_table(records if rows is None else rows, columns))
    if appendix:
        parts.append(appendix)
    write_jsonl(paths.jsonl, records)
    with atomic_path(paths.markdown) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return paths
