"""What one name of `--only` makes, and how it comes to the disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.common.results import (
    atomic_path,
    environment_fields,
    merge_records,
    write_results,
)
from experiments.common.tables import Column, Record

__all__ = ["Artifact", "write_artifact"]


class Artifact(NamedTuple):
    """Numbers, with a picture or a table of them or both.

    Attributes:
      title: What is shown.
      records: The numbers, one JSON line each.
      figure: A matplotlib figure; None for a table alone.
      columns: Of the Markdown table; none for a figure alone.
      facts: Sentences to print, and to set above the table.
    """

    title: str
    records: Sequence[Record]
    figure: Any = None
    columns: Sequence[Column] = ()
    facts: Sequence[str] = ()


def write_artifact(
    artifact: Artifact, out: Path, name: str, command: str, **setting: Any
) -> list[Path]:
    """Writes NAME.png, NAME.svg and NAME.md, as far as there are such, and the numbers.

    Each file is replaced in one step; last the records are merged into NAME.jsonl.

    Args:
      artifact: What was made.
      out: An existing directory.
      name: Of `RESULT_FILES`.
      command: What makes it again, shown in the Markdown file.
      **setting: Fields of every record: what the numbers depend on.
    """
    written = []
    if artifact.figure is not None:
        pictures = [out / f"{name}.png", out / f"{name}.svg"]
        for path in pictures:
            _save(artifact.figure, path)
        written += pictures
    records = [
        {**record, **setting, **environment_fields()} for record in artifact.records
    ]
    if artifact.columns:
        written += write_results(
            out, name, records, artifact.columns, title=artifact.title,
            facts=artifact.facts, command=command,
        )  # fmt: skip
    else:
        written.append(merge_records(out, name, records))
    return written


def _save(figure: Any, path: Path) -> None:
    from matplotlib import rc_context

    # Equal pictures are equal files: no date, and no random names inside an SVG.
    is_svg = path.suffix == ".svg"
    with rc_context({"svg.hashsalt": path.stem}), atomic_path(path) as temporary:
        figure.savefig(
            temporary, bbox_inches="tight", pad_inches=0.08,
            metadata={"Date": None} if is_svg else None,
        )  # fmt: skip
