"""The text that rows are calibrated with: a file, or the embedded one."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from experiments.common.corpora import ASSETS, read_utf8
from kashin_jax.models.tokenizer import Tokenizer
from kashin_jax.pipeline import Calibration, calibration_windows

__all__ = ["DEFAULT", "CalibrationText", "load_calibration"]

DEFAULT = "default"
"""The split of `wiki_vital` for calibration, which shares no article with the test."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CalibrationText:
    """A tokenized text, and how much of it is used.

    Attributes:
      name: Of the text, as results have it.
      tokens: All of it.
      context: Tokens of a window.
      count: Tokens used.
      text_sha256: Of its UTF-8 bytes.
    """

    name: str
    tokens: Int32[np.ndarray, " n"]
    context: int
    count: int
    text_sha256: str

    def calibration(self, seed: int) -> Calibration:
        """Windows of the text, others for every seed.

        Raises:
          UsageError: If `count` is less than two windows.
          DataError: If the text is shorter.
        """
        windows = calibration_windows(
            self.tokens, context=self.context, count=self.count, seed=seed
        )
        return Calibration(windows=windows)

    def record_fields(self) -> dict[str, Any]:
        """The fields of a result that say what it was calibrated with."""
        return {
            "calibration": self.name,
            "calibration_tokens": self.count,
            "calibration_sha256": self.text_sha256,
        }


def load_calibration(
    given: str, tokenizer: Tokenizer, *, context: int, count: int
) -> CalibrationText:
    """Reads and tokenizes the text of `--calibration`; checks that it is long enough.

    Args:
      given: A UTF-8 file, or `DEFAULT`.
      tokenizer: Of the model.
      context: Tokens of a window.
      count: Tokens to use.

    Raises:
      UsageError: If `count` is less than two windows.
      DataError: If the file is missing, empty, malformed or too short.
    """
    is_default = given == DEFAULT
    path = ASSETS / "wiki_vital/calibration.txt" if is_default else Path(given)
    text = read_utf8(path)
    found = CalibrationText(
        name="wiki_vital/calibration" if is_default else f"text_file:{path.name}",
        tokens=tokenizer.encode(text),
        context=context,
        count=count,
        text_sha256=hashlib.sha256(text.encode("utf-8")).hexdigest(),
    )
    found.calibration(0)
    return found
