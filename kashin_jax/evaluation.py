"""Perplexity of a language model on one long text, cut into windows.

Three steps, each usable alone: `make_windows` cuts the tokens and marks which of them
are predicted where, `score_windows` runs a model over the windows and hands back one
negative log likelihood per window, `perplexity` turns these into one number, and
`bits_per_byte` into one that other tokenizers' can be compared with. Nothing
here knows a model: it arrives as a function, usually a jitted closure whose last step
is `window_nll`.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Float64, Int, Int32, Int64

from kashin_jax.errors import DataError
from kashin_jax.progress import progress_bar

__all__ = [
    "ScoredBatch",
    "Weighting",
    "Windows",
    "bits_per_byte",
    "count_new",
    "count_scored",
    "make_windows",
    "perplexity",
    "score_windows",
    "window_nll",
]


class Windows(NamedTuple):
    """A text cut into windows of one length.

    Attributes:
      tokens: Token ids; places behind the end of the text hold 0. A causal model needs
        no mask for them, since they only follow the real tokens.
      scored: Whether token `j` of window `i` is a predicted target. Never true for the
        first token of a window; true at most once for each token of the text.
      num_new: Tokens of the window that are in no earlier window, its first included.
      num_bytes: UTF-8 bytes of text that the scored tokens stand for; None if unknown.
    """

    tokens: Int32[np.ndarray, "w t"]
    scored: Bool[np.ndarray, "w t"]
    num_new: Int32[np.ndarray, " w"]
    num_bytes: Int64[np.ndarray, " w"] | None = None


Weighting = Callable[[Windows], Int[np.ndarray, " w"]]


class ScoredBatch(NamedTuple):
    """Finished windows, in order and without gaps.

    Attributes:
      first: Index of the window that `nlls[0]` belongs to.
      nlls: Negative log likelihood of each window, summed over its scored tokens, nats.
    """

    first: int
    nlls: Float64[np.ndarray, " n"]


def make_windows(
    tokens: Int[np.ndarray, " n"],
    *,
    context: int,
    stride: int | None = None,
    drop_last: bool,
    token_bytes: Int[np.ndarray, " n"] | None = None,
) -> Windows:
    """Cuts a text into windows of `context` tokens that begin every `stride` tokens.

    Without a stride (or with `stride == context`) the windows do not overlap and all
    but the first token of each is predicted, as in the tables of GPTQ. With a smaller
    stride they overlap as in the fixed-length recipe of Hugging Face, and a token is
    predicted only in the first window that holds it.

    Args:
      tokens: The whole text, special tokens included.
      context: Window length, at least 2.
      stride: Distance between the first tokens of neighbouring windows, in
        `[1, context]`; `context` when not given.
      drop_last: Whether a window that would run past the end of the text is dropped
        (GPTQ does so) or kept, filled up and masked.
      token_bytes: Bytes of text that each token stands for, for `bits_per_byte`.

    Returns:
      The windows, at least one. A last window without a token to predict is left out.

    Raises:
      DataError: If the text is empty, has a single token, or is shorter than the
        context while `drop_last` is set.
      ValueError: If `context` or `stride` is out of range.
    """
    stride = context if stride is None else stride
    num_tokens = tokens.size
    _check_cut(num_tokens, context=context, stride=stride, drop_last=drop_last)
    beyond_first = max(num_tokens - context, 0)
    count = 1 + (beyond_first // stride if drop_last else -(-beyond_first // stride))
    begins = stride * np.arange(count)
    ends = np.minimum(begins + context, num_tokens)
    previous_ends = np.concatenate([[0], ends[:-1]])
    offsets = np.arange(context)
    positions = begins[:, None] + offsets[None, :]
    inside = positions < ends[:, None]
    scored = inside & (positions >= previous_ends[:, None]) & (offsets[None, :] > 0)
    index = np.minimum(positions, num_tokens - 1)
    padded = np.where(inside, tokens[index], 0)
    useful = scored.any(axis=1)
    num_new = ends - previous_ends
    num_bytes = None
    if token_bytes is not None:
        num_bytes = np.where(scored, token_bytes[index], 0).sum(axis=1, dtype=np.int64)
    return Windows(
        padded.astype(np.int32)[useful],
        scored[useful],
        num_new.astype(np.int32)[useful],
        None if num_bytes is None else num_bytes[useful],
    )


def _check_cut(num_tokens: int, *, context: int, stride: int, drop_last: bool) -> None:
    if context < 2:
        raise ValueError(f"`context` must be at least 2. Got context={context}.")
    if not 1 <= stride <= context:
        raise ValueError(
            f"`stride` must lie in [1, context={context}]. Got stride={stride}."
        )
    if num_tokens < 2:
        raise DataError(
            f"`tokens` must hold at least 2 tokens, one to predict the other from. "
            f"Got {num_tokens}; give a longer text."
        )
    if drop_last and num_tokens < context:
        raise DataError(
            f"`tokens` must fill one window of context={context} when the last partial "
            f"window is dropped. Got {num_tokens}; give a longer text or a smaller "
            "context."
        )


# `inline`: one program where it is called as it is, and no trace of it in others.
@partial(jax.jit, inline=True)
def window_nll(
    logits: Float[Array, "b t v"],
    tokens: Int[Array, "b t"],
    scored: Bool[Array, "b t"],
) -> Float32[Array, " b"]:
    """Sums the negative log likelihood of the scored tokens of each window.

    The logits at place `j` predict token `j + 1`; `scored[:, 0]` is ignored, as nothing
    predicts it. Only the logits themselves have a vocabulary axis: no array of log
    probabilities is formed, and the shift by one is done on targets, not on logits.

    Args:
      logits: Unnormalised, any float type; summed in float32.
      tokens: Below the vocabulary size. A larger id gives NaN, not an error.
      scored: Tokens to count.

    Returns:
      Nats per window, 0 for a window without scored tokens.
    """
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    counted = jnp.pad(scored[:, 1:], ((0, 0), (0, 1)))
    chosen = jnp.take_along_axis(logits, targets[:, :, None], axis=2)[:, :, 0]
    log_total = jax.nn.logsumexp(logits.astype(jnp.float32), axis=2)
    losses = log_total - chosen.astype(jnp.float32)
    return jnp.sum(jnp.where(counted, losses, 0.0), axis=1)


def score_windows(
    nll_fn: Callable[[np.ndarray, np.ndarray], Array],
    windows: Windows,
    *,
    batch_size: int,
    start: int = 0,
    progress: str | None = "windows",
) -> Iterator[ScoredBatch]:
    """Runs a model over the windows, batch by batch.

    Every batch has `batch_size` windows, so that a jitted `nll_fn` compiles once: the
    last one repeats its final window and the repetitions are dropped. Consume what is
    yielded as it comes to be able to resume from there.

    Args:
      nll_fn: Called with `tokens[b, t]` and `scored[b, t]`, returns nats per window.
      windows: As made by `make_windows`.
      batch_size: Windows per call of `nll_fn`.
      start: First window to score; earlier ones are taken to be finished.
      progress: Label of the progress bar, see `progress_bar`; None for no bar.

    Returns:
      An iterator of finished batches; `nll_fn` is called as it is advanced.

    Raises:
      ValueError: If `batch_size` or `start` is out of range, or `nll_fn` returns
        another shape than one number per window.
    """
    count = windows.tokens.shape[0]
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1. Got {batch_size}.")
    if not 0 <= start <= count:
        raise ValueError(f"`start` must lie in [0, {count}]. Got start={start}.")

    def batches() -> Iterator[ScoredBatch]:
        shown = partial(progress_bar, count, "windows", initial=start, desc=progress)
        with contextlib.nullcontext() if progress is None else shown() as bar:
            for first in range(start, count, batch_size):
                size = min(batch_size, count - first)
                index = np.minimum(np.arange(first, first + batch_size), count - 1)
                nlls = np.asarray(nll_fn(windows.tokens[index], windows.scored[index]))
                if nlls.shape != (batch_size,):
                    raise ValueError(
                        f"`nll_fn` must return one number per window, shape "
                        f"({batch_size},). Got {nlls.shape}."
                    )
                if bar is not None:
                    bar.update(size)
                yield ScoredBatch(first, nlls[:size].astype(np.float64))

    return batches()


def count_scored(windows: Windows) -> Int[np.ndarray, " w"]:
    """Weighs a window by its predicted tokens: the usual perplexity per token."""
    return windows.scored.sum(axis=1)


def count_new(windows: Windows) -> Int[np.ndarray, " w"]:
    """Weighs a window by its new tokens, as the 2024 paper does on LAMBADA.

    A first window of `t` tokens has `t - 1` predictions and weight `t`, so this differs
    from `count_scored` only where a window predicts nothing for its first new token.

    References:
      Merkulov et al. (2024), arXiv:2404.09737, evaluation on LAMBADA; an earlier form
      of the fixed-length perplexity recipe of Hugging Face.
    """
    return windows.num_new


def perplexity(
    window_nlls: Float[np.ndarray, " w"],
    windows: Windows,
    *,
    weigh: Weighting = count_scored,
) -> float:
    """Turns the windows' negative log likelihoods into one perplexity.

    `exp(sum(weight * mean loss of the window) / sum(weight))` in float64. With
    `count_scored` the weights cancel the means: the total over the number of
    predictions.

    Args:
      window_nlls: Nats per window, summed over its scored tokens; one per window.
      windows: The windows they belong to, all of them.
      weigh: `count_scored`, or `count_new` for the 2024 paper's formula.

    Returns:
      At least 1 for a proper model, `inf` for a destroyed one beyond float64, NaN if a
      loss is NaN.

    Raises:
      ValueError: If there is not exactly one value per window.
    """
    scored = count_scored(windows)
    _check_nlls(window_nlls, windows)
    weights = weigh(windows)
    means = window_nlls.astype(np.float64) / scored
    with np.errstate(over="ignore"):
        return float(np.exp(np.sum(means * weights) / np.sum(weights)))


def bits_per_byte(
    window_nlls: Float[np.ndarray, " w"], windows: Windows
) -> float | None:
    """The information in a byte of the text: it does not depend on the tokenizer.

    Negative log likelihood of all scored tokens, in bits, over the UTF-8 bytes of the
    text that they stand for. Tokens that nothing predicts, the first of every window,
    count on neither side.

    Args:
      window_nlls: Nats per window, summed over its scored tokens; one per window.
      windows: The windows they belong to, made with `token_bytes`.

    Returns:
      Bits; None if the scored tokens stand for no byte.

    Raises:
      ValueError: If there is not exactly one value per window, or the windows were
        made without `token_bytes`.
    """
    _check_nlls(window_nlls, windows)
    if windows.num_bytes is None:
        raise ValueError("`windows` know no bytes; give `make_windows` `token_bytes`.")
    total = int(windows.num_bytes.sum())
    nats = float(np.sum(window_nlls.astype(np.float64)))
    return nats / np.log(2).item() / total if total else None


def _check_nlls(window_nlls: Float[np.ndarray, " _"], windows: Windows) -> None:
    count = windows.tokens.shape[0]
    if window_nlls.shape != (count,):
        raise ValueError(
            f"`window_nlls` must hold one value for each of {count} windows. "
            f"Got shape {window_nlls.shape}."
        )
