"""Tables for a terminal."""

from collections.abc import Iterable, Sequence

__all__ = ["aligned"]


def aligned(rows: Sequence[Iterable[str]], *, left: int) -> str:
    """Rows as lines, the first `left` columns flush left and the others flush right."""
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)
