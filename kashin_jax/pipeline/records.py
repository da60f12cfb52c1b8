"""What was lost where: a record per quantized matrix, kept shard by shard."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kashin_jax.errors import CheckpointError
from kashin_jax.io import atomic_path

__all__ = ["REPORT_NAME", "join_parts", "read_report", "remove_parts", "write_part"]

REPORT_NAME = "quantization_report.jsonl"

Record = dict[str, Any]
# Deep nesting ends in a RecursionError, a huge integer in an OverflowError.
_FAULTS = (OSError, ValueError, LookupError, TypeError, RecursionError, OverflowError)


def write_part(directory: Path, shard: str, records: Sequence[Record]) -> None:
    """Writes the records of a shard, before the shard itself appears."""
    _write(_part(directory, shard), records)


def join_parts(directory: Path, shards: Sequence[str]) -> list[Record]:
    """Makes the report of its parts, unless an earlier run did; returns its records.

    Raises:
      CheckpointError: If part of it was removed or changed.
    """
    if all(_part(directory, shard).exists() for shard in shards):
        parts = [read_report(_part(directory, shard)) for shard in shards]
        _write(directory / REPORT_NAME, [record for part in parts for record in part])
    remove_parts(directory, shards)
    return read_report(directory / REPORT_NAME)


def remove_parts(directory: Path, shards: Sequence[str]) -> None:
    """Removes the records of single shards."""
    for shard in shards:
        _part(directory, shard).unlink(missing_ok=True)


def read_report(path: Path) -> list[Record]:
    """All records of a file.

    Raises:
      CheckpointError: If it is missing or damaged.
    """
    try:
        found = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for record in found:
            str(record["tensor"]), float(record["relative_squared_error"])
    except _FAULTS as error:
        raise CheckpointError(
            f"{path}: is missing or damaged ({type(error).__name__}); remove it, or "
            "quantize the original again."
        ) from error
    return found


def _part(directory: Path, shard: str) -> Path:
    return directory / f".{shard}.report.jsonl"


def _write(path: Path, records: Sequence[Record]) -> None:
    with atomic_path(path) as temporary:
        text = "".join(json.dumps(record) + "\n" for record in records)
        temporary.write_text(text, "utf-8")
