"""How likely a model finds continuations of contexts, as benchmarks ask it.

A question is a context and a continuation, both as tokens. `score_continuations` makes
rows of them, a row for all whose tokens are the beginning of one another (the answers
of one token to one question are), pads rows to a few lengths and hands them to a
function, usually a jitted closure whose last step is `row_scores`. Nothing here knows a
model or a benchmark.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from kashin_jax.errors import DataError
from kashin_jax.progress import progress_bar

__all__ = [
    "Question",
    "RowScores",
    "Score",
    "ScoreRows",
    "count_cut",
    "padded_length",
    "row_scores",
    "score_continuations",
]

_SHORTEST = 32


class Question(NamedTuple):
    """A context and what may follow it.

    Attributes:
      context: Token ids, at least one.
      continuation: Token ids, at least one; only these are scored.
    """

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    """What a model says of a continuation.

    Attributes:
      log_likelihood: Natural logarithm of its probability, all tokens together.
      is_greedy: Whether each of its tokens is the likeliest one at its place.
    """

    log_likelihood: float
    is_greedy: bool


class RowScores(NamedTuple):
    """Scores of single tokens.

    Attributes:
      log_likelihoods: Natural logarithms.
      are_likeliest: Whether no token has a larger logit at that place, nor an earlier
        one the same.
    """

    log_likelihoods: Float32[Array, "b q"]
    are_likeliest: Bool[Array, "b q"]


ScoreRows = Callable[
    [Int32[np.ndarray, "b t"], Int32[np.ndarray, "b t"], Int32[np.ndarray, "b t"]],
    RowScores,
]


# `inline`: one program where it is called as it is, and no trace of it in others.
@partial(jax.jit, inline=True)
def row_scores(
    logits: Float[Array, "b t v"],
    positions: Int[Array, "b q"],
    targets: Int[Array, "b q"],
) -> RowScores:
    """Scores tokens at places of rows, of which a place may have several or none.

    Only the logits themselves have a vocabulary axis.

    Args:
      logits: Unnormalised, any float type; summed in float32.
      positions: Places in `[0, t)`, whose logits predict the token behind.
      targets: Tokens below the vocabulary size.
    """
    rows = jnp.arange(logits.shape[0])[:, None]
    log_totals = jax.nn.logsumexp(logits.astype(jnp.float32), axis=2)
    chosen = logits[rows, positions, targets].astype(jnp.float32)
    likeliest = jnp.argmax(logits, axis=2)[rows, positions]
    return RowScores(chosen - log_totals[rows, positions], likeliest == targets)


def score_continuations(
    score_rows: ScoreRows,
    questions: Sequence[Question],
    *,
    max_length: int,
    batch_size: int,
    progress: str | None = "continuations",
) -> list[Score]:
    """Scores continuations, longest first, in batches of rows of one padded length.

    A context that is too long loses its beginning. Rows are padded behind their end,
    which a causal model needs no mask for, to one of the lengths of `padded_length`: a
    jitted `score_rows` compiles once for each of them. Where rotary positions depend on
    the length of a text, that is the padded one.

    Args:
      score_rows: Called with rows `[b, t]`, positions and targets of the same shape, as
        `row_scores` takes them. Rows that a last batch lacks are zeros.
      questions: In any order.
      max_length: Tokens that the model may read at a time.
      batch_size: Rows per call of `score_rows`.
      progress: Label of the progress bar, see `progress_bar`; None for no bar.

    Returns:
      A score per question, in their order.

    Raises:
      DataError: If a context or a continuation is empty, or a continuation longer than
        `max_length`; the message says which question, counted from 0.
      ValueError: If `max_length` or `batch_size` is below 1.
    """
    if min(max_length, batch_size) < 1:
        raise ValueError(
            f"`max_length` and `batch_size` must be at least 1. Got {max_length} and "
            f"{batch_size}."
        )
    found: list[Score | None] = [None] * len(questions)
    batches = list(_batches(_rows(questions, max_length), max_length, batch_size))
    rows = sum(len(batch) for _, batch in batches)
    bar = progress_bar(rows, "rows", desc=progress) if progress else None
    try:
        for length, batch in batches:
            scores = score_rows(*_arrays(batch, length, batch_size))
            for index, score in _per_question(batch, *map(np.asarray, scores)):
                found[index] = score
            if bar is not None:
                bar.update(len(batch))
    finally:
        if bar is not None:
            bar.close()
    return [score for score in found if score is not None]


def padded_length(length: int, limit: int) -> int:
    """The shortest of 32, 48, 64, 96, 128, ... that holds a length, at most `limit`.

    At most a third is padding, behind the first; a limit of 2,048 makes 13 lengths.
    """
    power = max(_SHORTEST, 1 << (length - 1).bit_length())
    smaller = power * 3 // 4
    fits = smaller if length <= smaller and smaller > _SHORTEST else power
    return min(fits, limit)


def count_cut(questions: Sequence[Question], max_length: int) -> int:
    """How many lose the beginning of their context.

    Args:
      questions: As for `score_continuations`.
      max_length: As there; the last token of a continuation is not read.
    """
    return sum(len(q.context) + len(q.continuation) > max_length + 1 for q in questions)


class _Wanted(NamedTuple):
    # Question, place of the logits of its first token, and its tokens.
    question: int
    start: int
    targets: tuple[int, ...]


class _Row(NamedTuple):
    tokens: tuple[int, ...]
    wanted: list[_Wanted]


def _rows(questions: Sequence[Question], max_length: int) -> list[_Row]:
    """Rows that share what they can.

    In falling lexicographic order whatever extends a text stands right before it.
    """
    read = []
    for index, (context, continuation) in enumerate(questions):
        targets = tuple(continuation)
        _check(index, len(context), len(targets), max_length)
        tokens = (*context, *targets)[-(max_length + 1) :][:-1]
        wanted = _Wanted(index, len(tokens) - len(targets), targets)
        read.append((tokens, wanted))
    rows: list[_Row] = []
    # What a row is asked has to find room in an array of its padded length.
    room = 0
    for tokens, wanted in sorted(read, reverse=True):
        size = len(wanted.targets)
        if not rows or size > room or rows[-1].tokens[: len(tokens)] != tokens:
            rows.append(_Row(tokens, []))
            room = padded_length(len(tokens), max_length)
        rows[-1].wanted.append(wanted)
        room -= size
    return sorted(rows, key=lambda row: -len(row.tokens))


def _check(index: int, context: int, continuation: int, max_length: int) -> None:
    if not context or not continuation:
        part = "continuation" if context else "context"
        raise DataError(f"Question {index} has no tokens as its {part}; leave it out.")
    if continuation > max_length:
        raise DataError(
            f"The continuation of question {index} has {continuation} tokens; a model "
            f"that reads {max_length} at a time cannot score it: raise the context."
        )


def _batches(
    rows: Sequence[_Row], max_length: int, batch_size: int
) -> Iterator[tuple[int, list[_Row]]]:
    """Padded lengths, and at most `batch_size` rows of each."""
    by_length = groupby(rows, lambda row: padded_length(len(row.tokens), max_length))
    for length, group in by_length:
        same = list(group)
        for first in range(0, len(same), batch_size):
            yield length, same[first : first + batch_size]


def _arrays(
    batch: Sequence[_Row], length: int, batch_size: int
) -> tuple[Int32[np.ndarray, "b t"], ...]:
    tokens, positions, targets = np.zeros((3, batch_size, length), np.int32)
    for i, row in enumerate(batch):
        tokens[i, : len(row.tokens)] = row.tokens
        asked = [
            (start + j, target)
            for _, start, wanted in row.wanted
            for j, target in enumerate(wanted)
        ]
        positions[i, : len(asked)], targets[i, : len(asked)] = zip(*asked, strict=True)
    return tokens, positions, targets


def _per_question(
    batch: Sequence[_Row],
    log_likelihoods: Float32[np.ndarray, "b q"],
    are_likeliest: Bool[np.ndarray, "b q"],
) -> Iterator[tuple[int, Score]]:
    for i, row in enumerate(batch):
        end = 0
        for index, _, wanted in row.wanted:
            begin, end = end, end + len(wanted)
            total = math.fsum(log_likelihoods[i, begin:end].tolist())
            yield index, Score(total, bool(are_likeliest[i, begin:end].all()))
