"""The log of a run, one JSON object per line, and its picture."""

from pathlib import Path
from typing import Any

from experiments.results import append_jsonl, atomic_path, read_jsonl, write_jsonl

__all__ = ["RunLog", "plot_losses"]


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


def plot_losses(log: Path, picture: Path) -> None:
    """Draws training and validation loss against the step, on a logarithmic axis."""
    from matplotlib.figure import Figure

    records = read_jsonl(log)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    series = {"loss": ("-", "training"), "validation_loss": ("o--", "validation")}
    for name, (style, label) in series.items():
        points = [(r["step"], r[name]) for r in records if name in r]
        if points:
            axes.plot(*zip(*points, strict=True), style, markersize=4, label=label)
    axes.set_xscale("log")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats per token")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, dpi=150)
