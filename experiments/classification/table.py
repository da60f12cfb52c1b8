"""The GLUE table: one line per method and width, one column per task."""

import statistics
from collections.abc import Sequence
from typing import Any

from experiments.classification.tasks import Task
from experiments.common.methods import FULL_PRECISION
from experiments.common.tables import Column, Record, fixed, share

__all__ = ["glue_columns", "table_rows"]

_KEYS = ("method", "bits", "basis")
_MEANS = ("relative_error", "converged_share", "quantize_seconds")


def glue_columns(
    tasks: Sequence[Task], records: Sequence[Record]
) -> tuple[Column, ...]:
    """The columns for some tasks; bases are one only where there are several."""
    first = [Column("method", "method"), Column("bits", "bits")]
    if len({r["basis"] for r in records if r["basis"] is not None}) > 1:
        first.append(Column("basis", "basis"))
    return (
        *first,
        Column("stored_bits_per_weight", "bits/weight", fixed(3)),
        Column("seeds", "seeds"),
        *(Column(task.name, task.title) for task in tasks),
        Column("relative_error", "rel. sq. error", fixed(5)),
        Column("converged_share", "converged", share),
        Column("quantize_seconds", "seconds", fixed(1)),
    )


def table_rows(
    tasks: Sequence[Task], records: Sequence[Record]
) -> list[dict[str, Any]]:
    """Records of all tasks, metrics and seeds as the lines of a table.

    A cell has the task's metrics with a slash between them; of several seeds the mean
    and, behind ±, the standard deviation. Behind each line that the paper has, too,
    stands the paper's.
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in _KEYS), []).append(record)
    rows: list[dict[str, Any]] = []
    for key, group in groups.items():
        cells = {task.name: _cell(task, group, "value", 2) for task in tasks}
        seeds = {r["seed"] for r in group if r["seed"] is not None}
        rows.append({
            **dict(zip(_KEYS, key, strict=True)),
            **cells,
            "seeds": len(seeds) or None,
            "stored_bits_per_weight": _mean(group, "stored_bits_per_weight"),
            **{name: _mean(group, name) for name in _MEANS},
            "note": group[0]["note"],
        })  # fmt: skip
        published = {task.name: _cell(task, group, "published", 2) for task in tasks}
        if any(published.values()):
            rows.append({
                "method": f"{key[0]}, published",
                "bits": 32 if key[0] == FULL_PRECISION else key[1],
                **published,
                "note": _PAPER,
            })  # fmt: skip
    return rows


_PAPER = (
    "Table 3 of the paper (arXiv 2404.09737): a single run on the authors' own "
    "checkpoint."
)


def _cell(task: Task, group: Sequence[Record], field: str, digits: int) -> str | None:
    parts = []
    for metric in task.metrics:
        values = [
            r[field]
            for r in group
            if (r["task"], r["metric"]) == (task.name, metric) and r[field] is not None
        ]
        if not values:
            return None
        several = len(set(values)) > 1 or (len(values) > 1 and field == "value")
        spread = f"±{statistics.stdev(values):.1f}" if several else ""
        parts.append(f"{statistics.fmean(values):.{digits}f}{spread}")
    return " / ".join(parts)


def _mean(group: Sequence[Record], field: str) -> float | None:
    # One value per checkpoint and seed, however many tasks and metrics they have.
    runs = {(r["weights_sha256"], r["seed"]): r[field] for r in group}
    values = [value for value in runs.values() if value is not None]
    return statistics.fmean(values) if values else None
