"""Perplexity on held-out text while training."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from experiments.common.corpora import read_utf8
from experiments.train.bpe import end_of_text_id
from experiments.train.config import TrainConfig
from kashin_jax.errors import UsageError
from kashin_jax.evaluation import (
    make_windows,
    perplexity,
    score_windows,
    window_nll,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["make_validator"]

_BATCH_SIZE = 4


def make_validator(
    config: TrainConfig, graphdef: nnx.GraphDef, tokenizer: "Tokenizer"
) -> Callable[[int, PyTree[Array]], dict[str, Any]] | None:
    """Prepares the measurement that `config.eval_file` asks for.

    The text is tokenized once, `</s>` in front, and cut into windows of
    `config.context` tokens that do not overlap; all but the first token of a window
    are predicted.

    Args:
      config: The run.
      graphdef: The model without its parameters, in evaluation mode.
      tokenizer: The run's.

    Returns:
      A function of step and parameters that returns what the log shall hold, or `None`
      where no file is given.

    Raises:
      DataError: If the text is missing, empty or not UTF-8.
      UsageError: If the context has no token to predict.
    """
    if not config.eval_file:
        return None
    if config.context < 2:
        raise UsageError("`--eval_file` needs a `--context` of at least 2.")
    ids = tokenizer.encode(read_utf8(Path(config.eval_file)), add_special_tokens=False)
    tokens = np.asarray([end_of_text_id(tokenizer), *ids.ids], np.int32)
    tokens = tokens[: config.eval_tokens or None]
    windows = make_windows(tokens, context=config.context, drop_last=False)

    @jax.jit
    def nll(
        params: PyTree[Array], tokens: Int[Array, "b t"], scored: Bool[Array, "b t"]
    ) -> Float[Array, " b"]:
        return window_nll(nnx.merge(graphdef, params)(tokens), tokens, scored)

    def validate(step: int, params: PyTree[Array]) -> dict[str, Any]:
        batches = score_windows(
            functools.partial(nll, params),
            windows,
            batch_size=min(_BATCH_SIZE, len(windows.tokens)),
            progress=None,
        )
        value = perplexity(np.concatenate([b.nlls for b in batches]), windows)
        return {
            "validation_loss": round(math.log(value), 5),
            "validation_perplexity": round(value, 4),
            "validation_predictions": int(windows.scored.sum()),
        }

    return validate
