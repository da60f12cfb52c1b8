"""How far long work is: a bar on a terminal, a line a minute where there is none."""

import sys
from typing import Any

from tqdm import tqdm

__all__ = ["SECONDS_BETWEEN_LINES", "progress_bar"]

SECONDS_BETWEEN_LINES = 60
"""At least so many pass between two lines, and before the first."""

_LINE = "{desc}{percentage:3.0f}% of {total_fmt} {unit}, {elapsed}<{remaining}{postfix}"


def progress_bar(
    total: int, unit: str, *, initial: int = 0, desc: str | None = None
) -> Any:
    """A `tqdm` on standard error, to be used in `with`.

    Without a terminal, as in a job's log, it writes lines: none for work that is done
    within a minute, and afterwards one a minute, as far as parts of the work end.

    Args:
      total: Amount of work.
      unit: What is counted, `weights` say; large numbers are abbreviated.
      initial: What was done before, which the rate leaves out.
      desc: Stands in front.
    """
    shared: dict[str, Any] = {"total": total, "initial": initial, "desc": desc}
    shared |= {"unit": unit, "unit_scale": True}
    if sys.stderr.isatty():
        return tqdm(**shared, leave=False)
    pause = SECONDS_BETWEEN_LINES
    lines: Any = _Lines(sys.stderr)
    return _Rare(**shared, file=lines, mininterval=pause, delay=pause, bar_format=_LINE)


class _Rare(tqdm):
    """A bar that is drawn when its time has come, and not for another name."""

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        super().set_postfix_str(s, refresh=False)


class _Lines:
    """A stream on which every state of a bar is a line of its own."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.encoding = stream.encoding

    def write(self, text: str) -> None:
        if line := text.strip():
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        self._stream.flush()
