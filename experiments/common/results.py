"""Results on disk: records as JSON lines, a Markdown table, nothing half-written.

A record is a mapping, one per row of a table; `tables` prints it. It holds its whole
configuration, and a file of `result_files` has one record for each: a run replaces the
records that it has measured again and leaves the others. JSON has no infinity and no
NaN: they are written as the strings `inf`, `-inf`, `nan`, and read back as numbers.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import tempfile
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import kashin_jax
from experiments.common.result_files import RESULT_FILES
from experiments.common.tables import Column, Record, markdown_table
from kashin_jax.errors import DataError, UsageError
from kashin_jax.io import atomic_path

__all__ = [
    "WrittenResults",
    "append_jsonl",
    "environment_fields",
    "merge_records",
    "prepare_output",
    "read_jsonl",
    "record_key",
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


def earlier_records(out: Path, names: Iterable[str]) -> list[Record]:
    """Records of files of results, each file once."""
    files = dict.fromkeys(out / f"{name}.jsonl" for name in names)
    return [record for file in files for record in read_jsonl(file)]


def start_work(out: Path, config: Any, *, leaving: Iterable[str] = ()) -> Path:
    """The directory of a run's unfinished work, `OUT/work/HASH`, made if it is not.

    Work of another state of the library is not gone on with.

    Args:
      out: As returned by `prepare_output`.
      config: The dataclass of the program's flags.
      leaving: Flags besides `--out` that change nothing that is kept there.
    """
    fields = dataclasses.asdict(config)
    known = {k: fields[k] for k in sorted(fields) if k not in ("out", *leaving)}
    text = to_json({"program": type(config).__name__, "code": _code_digest(), **known})
    work = out / "work" / hashlib.sha256(text.encode()).hexdigest()[:12]
    work.mkdir(parents=True, exist_ok=True)
    return work


@functools.cache
def _code_digest() -> str:
    """A hash of the library's source."""
    root = Path(kashin_jax.__file__).parent
    found = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return found.hexdigest()


def remove_work(work: Path) -> None:
    """Removes what `start_work` made, once the run is finished."""
    shutil.rmtree(work)
    # Other runs have theirs there, or begin.
    with contextlib.suppress(OSError):
        work.parent.rmdir()


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


def record_key(record: Record, fields: Sequence[str]) -> tuple[Hashable, ...]:
    """What tells a record from the others of its file: these fields, in this order.

    A field that is absent counts as null, and numbers are compared as numbers.
    """
    values = (_plain(record.get(field)) for field in fields)
    return tuple(
        json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else value
        for value in values
    )


def merge_records(directory: Path, name: str, records: Iterable[Record]) -> Path:
    """Puts records into a result file: in place of their like, else at the end.

    A record without a `date` gets the current one, in UTC. Programs that write to one
    directory at the same time wait for each other, so that none loses a row.

    Args:
      directory: As returned by `prepare_output`.
      name: Of `RESULT_FILES`.
      records: What was measured.

    Returns:
      The file, replaced in one step.

    Raises:
      DataError: If it is damaged.
    """
    path, fields = directory / f"{name}.jsonl", RESULT_FILES[name].key
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    with _locked(directory):
        merged = {record_key(old, fields): old for old in read_jsonl(path)}
        for record in records:
            new = {**record, "date": record.get("date", today)}
            merged[record_key(new, fields)] = new
        write_jsonl(path, merged.values())
    return path


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    # The directory itself is locked: a lock file would stay behind.
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class WrittenResults(NamedTuple):
    """Where `write_results` put its files."""

    jsonl: Path
    markdown: Path


def write_results(
    directory: Path,
    name: str,
    records: Sequence[Record],
    columns: Sequence[Column],
    *,
    title: str,
    command: str,
    facts: Sequence[str] = (),
    rows: Sequence[Record] | None = None,
    appendix: str = "",
) -> WrittenResults:
    """Merges into `NAME.jsonl` and writes `NAME.md`, the table as a reader sees it.

    Args:
      directory: As returned by `prepare_output`.
      name: Of `RESULT_FILES`.
      records: What this run measured; `merge_records` says what becomes of them.
      columns: The columns of the Markdown table.
      title: Heading of the Markdown file.
      command: What reproduces the table, shown below the heading.
      facts: Sentences such as the protocol, shown as a list above the table.
      rows: Of the Markdown table; the records when None.
      appendix: Markdown shown below the table.

    Returns:
      The paths of the two files, each replaced in one step.
    """
    parts = [f"# {title}", f"```\n{command}\n```"]
    if facts:
        parts.append("\n".join(f"- {fact}" for fact in facts))
    parts.append(markdown_table(records if rows is None else rows, columns))
    if appendix:
        parts.append(appendix)
    jsonl, markdown = merge_records(directory, name, records), directory / f"{name}.md"
    with atomic_path(markdown) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return WrittenResults(jsonl, markdown)
