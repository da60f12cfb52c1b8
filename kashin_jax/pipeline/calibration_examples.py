"""Examples of a calibration: texts and pairs of texts, as a classifier reads them."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from kashin_jax.errors import DataError, UsageError
from kashin_jax.models.tokenizer import Encoded
from kashin_jax.pipeline.calibration import Calibration

__all__ = ["CalibrationExamples"]

# Counts of examples: their held-out eighth then leaves batches of eight at least. Of
# short texts there are many, and `calibration_windows` has a finer rule.
_MULTIPLES = (64, 8, 1)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CalibrationExamples:
    """Tokenized examples, and how many of their tokens are used.

    Attributes:
      examples: All of them, special tokens included.
      pad_id: The model's padding token.
      count: Most tokens used, padding not counted: whole examples, a multiple of 64 of
        them, of 8 where there are fewer.
    """

    examples: Sequence[Encoded]
    pad_id: int
    count: int

    def calibration(
        self, seed: int, weighting: str | None = None, is_asymmetric: bool = False
    ) -> Calibration:
        """Examples as padded windows, others for every seed.

        All are as long as the longest of the whole text, so that every seed runs the
        same compiled programs.

        Args:
          seed: Of the draw.
          weighting: None; see `Calibration`.
          is_asymmetric: See `Calibration`.

        Raises:
          UsageError: If `count` is less than two examples, or there is a `weighting`.
          DataError: If there are fewer tokens.
        """
        chosen = self._drawn(seed)
        width = max(len(each.input_ids) for each in self.examples)
        shape = len(chosen), width
        windows = np.full(shape, self.pad_id, np.int32)
        mask, types = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for row, each in enumerate(chosen):
            length = len(each.input_ids)
            windows[row, :length] = each.input_ids
            types[row, :length] = each.token_type_ids
            mask[row, :length] = 1
        return Calibration(
            windows=windows, mask=mask, token_types=types, weighting=weighting,
            is_asymmetric=is_asymmetric,
        )  # fmt: skip

    def _drawn(self, seed: int) -> list[Encoded]:
        order = np.random.default_rng(seed).permutation(len(self.examples))
        lengths = [len(self.examples[i].input_ids) for i in order]
        if sum(lengths) < self.count:
            raise DataError(
                f"The calibration text has {sum(lengths)} tokens in {len(lengths)} "
                f"examples, and {self.count} are asked for. Give a longer text, or ask "
                "for fewer tokens."
            )
        whole = int(np.searchsorted(np.cumsum(lengths), self.count, side="right"))
        if whole < 2:
            raise UsageError(
                f"Calibration needs two examples at least. Got {self.count} tokens, "
                f"and the first example has {lengths[0]}."
            )
        multiple = next(m for m in _MULTIPLES if whole >= m)
        return [self.examples[i] for i in order[: whole // multiple * multiple]]
