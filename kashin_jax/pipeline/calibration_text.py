"""The text of a calibration, tokenized as the model reads it."""

import dataclasses

import numpy as np
from jaxtyping import Int32

from kashin_jax.io import Checkpoint
from kashin_jax.models.bert import ClassifierConfig
from kashin_jax.models.context import context_of
from kashin_jax.models.registry import find_architecture
from kashin_jax.models.tokenizer import (
    check_padding,
    check_vocabulary,
    load_pair_tokenizer,
    load_tokenizer,
)
from kashin_jax.pipeline.calibrated_checkpoint import check_runs, is_encoder
from kashin_jax.pipeline.calibration import Calibration, calibration_windows
from kashin_jax.pipeline.calibration_examples import CalibrationExamples

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


def calibration_text(
    source: Checkpoint, text: str, count: int
) -> CalibrationText | CalibrationExamples:
    """Tokenizes a text for windows as long as a model was trained at.

    A classifier, or its encoder, reads every line as an example of its own, with the
    tokens that begin and end one, or as several where it is too long. A tab parts a
    line into a pair of texts.

    Args:
      source: The model's checkpoint, with its tokenizer.
      text: What is read.
      count: Tokens to use.

    Raises:
      UsageError: If the model does not run here, or `count` is less than two windows.
      CheckpointError: If the tokenizer cannot be read, or is another model's.
      DataError: If the text is shorter.
    """
    check_runs(source, takes_encoders=True)
    if is_encoder(source):
        return _examples(source, text, count)
    return _tokens(source, text, count)


def _examples(source: Checkpoint, text: str, count: int) -> CalibrationExamples:
    config = ClassifierConfig.from_dict(source.config, "config.json")
    tokenizer = load_pair_tokenizer(source.directory)
    check_vocabulary(tokenizer, config.vocab_size)
    check_padding(tokenizer, config.pad_token_id)
    length = context_of(source.directory, config.max_length)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    texts = [line for line in lines if "\t" not in line]
    pairs = [line.split("\t", 1) for line in lines if "\t" in line]
    encoded = tokenizer.encode_pieces(texts, max_length=length)
    if pairs:
        encoded += tokenizer.encode(*zip(*pairs, strict=True), max_length=length)
    found = CalibrationExamples(
        examples=encoded, pad_id=config.pad_token_id, count=count
    )
    found.calibration(0)
    return found


def _tokens(source: Checkpoint, text: str, count: int) -> CalibrationText:
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
