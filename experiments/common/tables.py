"""Tables of records, for the terminal and for Markdown.

A missing value (absent or None) is a dash. A record's `note` becomes a footnote, marked
behind its first cell; equal notes share a mark.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = [
    "PERPLEXITY_COLUMNS",
    "Column",
    "Record",
    "aligned_table",
    "fixed",
    "increase",
    "markdown_table",
    "share",
]

Record = Mapping[str, Any]


class Column(NamedTuple):
    """How one field of the records is shown.

    Attributes:
      key: The field.
      title: Heading.
      show: Makes the text of a cell; never called for a missing value.
    """

    key: str
    title: str
    show: Callable[[Any], str] = str


def fixed(digits: int) -> Callable[[float], str]:
    """Shows so many decimals, and powers of ten from 10,000 on."""

    def show(value: float) -> str:
        is_large = math.isfinite(value) and abs(value) >= 1e4
        return f"{value:.2e}" if is_large else f"{value:.{digits}f}"

    return show


def increase(value: float) -> str:
    """Shows a difference, always with its sign."""
    text = fixed(2)(value)
    return text if text.startswith(("-", "nan")) else f"+{text}"


def share(value: float) -> str:
    """Shows a share of 1 in percent; 100 only if it is all."""
    return "100%" if value == 1 else f"{min(100 * value, 99.9):.1f}%"


PERPLEXITY_COLUMNS = (
    Column("method", "method"),
    Column("bits", "bits"),
    Column("stored_bits_per_weight", "bits/weight", fixed(3)),
    Column("model_bits_per_weight", "whole model", fixed(3)),
    Column("perplexity", "perplexity", fixed(2)),
    Column("increase", "increase", increase),
    Column("relative_error", "rel. sq. error", fixed(5)),
    Column("converged_share", "converged", share),
    Column("quantize_seconds", "seconds", fixed(1)),
)


class _Grid(NamedTuple):
    titles: list[str]
    cells: list[list[str]]
    is_number: list[bool]
    footnotes: list[str]


def _grid(records: Sequence[Record], columns: Sequence[Column]) -> _Grid:
    notes: list[str] = []
    cells = []
    for record in records:
        values = [record.get(column.key) for column in columns]
        row = [
            "-" if value is None else column.show(value)
            for column, value in zip(columns, values, strict=True)
        ]
        note = record.get("note")
        if note:
            if note not in notes:
                notes.append(note)
            row[0] += f" [{notes.index(note) + 1}]"
        cells.append([" ".join(cell.split()) for cell in row])
    is_number = [
        not any(isinstance(record.get(column.key), str) for record in records)
        for column in columns
    ]
    footnotes = [f"[{i}] {' '.join(note.split())}" for i, note in enumerate(notes, 1)]
    return _Grid([column.title for column in columns], cells, is_number, footnotes)


def aligned_table(records: Sequence[Record], columns: Sequence[Column]) -> str:
    """A table for the terminal: numbers to the right, footnotes below."""
    grid = _grid(records, columns)
    rows = [grid.titles, *grid.cells]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, grid.is_number, strict=True)
        ).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, *grid.footnotes])


def markdown_table(records: Sequence[Record], columns: Sequence[Column]) -> str:
    """A table for Markdown: numbers to the right, footnotes as a list below."""
    grid = _grid(records, columns)
    rules = ["---:" if right else "---" for right in grid.is_number]
    rows = [_escaped(grid.titles), rules, *map(_escaped, grid.cells)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    if grid.footnotes:
        lines += ["", *(f"- {note}" for note in grid.footnotes)]
    return "\n".join(lines)


def _escaped(cells: Sequence[str]) -> list[str]:
    return [cell.replace("|", "\\|") for cell in cells]
