"""The log of a run, one JSON object per line, and its picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.common.results import (
    append_jsonl,
    atomic_path,
    read_jsonl,
    write_jsonl,
)

__all__ = ["Panel", "RunLog", "plot_log"]


class RunLog:
    """A log file that continues where the resumed checkpoint stands.

    Attributes:
      path: The file.
      seconds: Time that the kept lines account for.
    """

    def __init__(self, path: Path, *, done_steps: int):
        """Opens a log and drops what was logged after the checkpoint.

        Args:
          path: Made where it does not exist.
          done_steps: Steps that the resumed state has behind it.

        Raises:
          DataError: If the file is not a log.
        """
        self.path = path
        kept = [r for r in read_jsonl(path) if r["step"] <= done_steps]
        self.seconds = max((r.get("seconds", 0.0) for r in kept), default=0.0)
        write_jsonl(path, kept)

    def append(self, record: dict[str, Any]) -> None:
        """Adds one line; it is on disk when this returns."""
        append_jsonl(self.path, record)


class Panel(NamedTuple):
    """One pair of axes of a picture.

    Attributes:
      ylabel: What is measured, with its unit.
      series: Name of a field of the log to its style and label, in matplotlib's terms.
    """

    ylabel: str
    series: Mapping[str, tuple[str, str]]


def plot_log(
    log: Path, picture: Path, panels: Sequence[Panel], *, xscale: str = "linear"
) -> None:
    """Draws fields of a log against the step, in panels beside each other."""
    from matplotlib.figure import Figure

    records = read_jsonl(log)
    figure = Figure(figsize=(7 * len(panels), 4.5), layout="constrained")
    columns = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(columns, panels, strict=True):
        for name, (style, label) in panel.series.items():
            points = [(r["step"], r[name]) for r in records if name in r]
            if points:
                axes.plot(*zip(*points, strict=True), style, markersize=4, label=label)
        axes.set_xscale(xscale)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(panel.ylabel)
        axes.grid(which="both", alpha=0.3)
        if axes.lines:
            axes.legend()
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, dpi=150)
