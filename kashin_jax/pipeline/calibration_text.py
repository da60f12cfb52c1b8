"""The text of a calibration, tokenized as the language model reads it."""

import dataclasses

import numpy as np
from jaxtyping import Int32

from kashin_jax.io import Checkpoint
from kashin_jax.models.context import context_of
from kashin_jax.models.registry import find_architecture
from kashin_jax.models.tokenizer import check_vocabulary, load_tokenizer
from kashin_jax.pipeline.calibrated_checkpoint import check_runs
from kashin_jax.pipeline.calibration import Calibration, calibration_windows

__all__ = ["CalibrationText", "calibration_text"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CalibrationText:
    """A tokenized text, and how much of it is used.

    Attributes:
      tokens: All of it.
      context: Tokens of a window.
      count: Tokens used, in whole windows.
    """

    tokens: Int32[np.ndarray, " n"]
    context: int
    count: int

    def calibration(
        self, seed: int, weighting: str | None = None, is_asymmetric: bool = False
    ) -> Calibration:
        """Windows of the text, others for every seed.

        Args:
          seed: Of the draw.
          weighting: See `Calibration`.
          is_asymmetric: See `Calibration`.

        Raises:
          UsageError: If `count` is less than two windows.
          DataError: If the text is shorter.
        """
        windows = calibration_windows(
            self.tokens, context=self.context, count=self.count, seed=seed
        )
        return Calibration(
            windows=windows, weighting=weighting, is_asymmetric=is_asymmetric
        )


def calibration_text(source: Checkpoint, text: str, count: int) -> CalibrationText:
    """Tokenizes a text for windows as long as a model was trained at.

    Args:
      source: The model's checkpoint, with its tokenizer.
      text: What is read.
      count: Tokens to use.

    Raises:
      UsageError: If the model does not run here, has another vocabulary, or `count` is
        less than two windows.
      DataError: If the text is shorter.
    """
    check_runs(source)
    tokenizer = load_tokenizer(source.directory)
    architecture = find_architecture(source.config, f"{source.directory}/config.json")
    config = architecture.config.from_dict(source.config, "config.json")
    check_vocabulary(tokenizer, config.vocab_size)
    found = CalibrationText(
        tokens=tokenizer.encode(text),
        context=context_of(source.directory, config.context_length),
        count=count,
    )
    found.calibration(0)
    return found
