"""Log likelihoods of continuations: rows that are shared, cut, padded and batched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from kashin_jax.continuations import (
    Question,
    count_cut,
    padded_length,
    row_scores,
    score_continuations,
)
from kashin_jax.errors import DataError

VOCAB = 7


def logits_of(tokens, library):
    """Depend on all tokens read so far and their places: no token can go missing."""
    places = library.arange(tokens.shape[1])[None, :]
    state = library.cumsum(tokens * (places % 5 + 1) + places, axis=1) % 997
    waves = state[:, :, None] * library.arange(1, VOCAB + 1)[None, None, :]
    return 4 * library.sin(waves.astype(library.float32))


@jax.jit
def score_rows(tokens, positions, targets):
    logits = logits_of(tokens, jnp)
    return row_scores(logits, positions, targets)


def expected(question, max_length):
    """One question alone, unpadded, in NumPy."""
    whole = [*question.context, *question.continuation][-max_length - 1 :]
    logits = logits_of(np.asarray([whole[:-1]]), np)[0].astype(np.float64)
    targets = np.asarray(question.continuation)
    logits = logits[-len(targets) :]
    found = scipy.special.log_softmax(logits, axis=1)[np.arange(len(targets)), targets]
    return found.sum(), bool((logits.argmax(axis=1) == targets).all())


def assert_scored(questions, max_length=64, batch_size=3, score=score_rows):
    found = score_continuations(
        score, questions, max_length=max_length, batch_size=batch_size, progress=None
    )
    assert len(found) == len(questions)
    for question, result in zip(questions, found, strict=True):
        value, is_greedy = expected(question, max_length)
        assert result.log_likelihood == pytest.approx(value, rel=1e-4, abs=1e-4)
        assert result.is_greedy == is_greedy


def texts(least, most):
    return st.lists(st.integers(0, VOCAB - 1), min_size=least, max_size=most)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(texts(1, 60), texts(1, 20)), max_size=12), st.integers(1, 4)
)  # fmt: skip
def test_scores_are_those_of_every_question_alone(pairs, batch_size):
    """Cut on the left where they are longer than 40 tokens."""
    questions = [Question(*pair) for pair in pairs]
    assert_scored(questions, max_length=40, batch_size=batch_size)


class Counted:
    """`score_rows` that counts rows with a question, and shapes."""

    def __init__(self):
        self.shapes, self.rows = [], 0

    def __call__(self, tokens, positions, targets):
        self.shapes.append(tokens.shape)
        self.rows += int(np.any(tokens != 0, axis=1).sum())
        return score_rows(tokens, positions, targets)


def test_answers_of_one_token_share_the_row_of_their_context():
    """A question of four such answers costs one row, and one that goes on the same."""
    context = [1, 2, 3, 4]
    questions = [Question(context, [answer]) for answer in range(4)]
    questions += [Question(context, [5, 6, 1]), Question([1, 2], [3])]
    counted = Counted()
    assert_scored(questions, score=counted)
    assert counted.rows == 1
    counted = Counted()
    assert_scored([*questions, Question([1, 3], [3])], score=counted)
    assert counted.rows == 2


def test_more_answers_than_a_row_has_room_for_take_another():
    questions = [Question([3, 1], [answer % VOCAB]) for answer in range(40)]
    counted = Counted()
    assert_scored(questions, score=counted)
    assert counted.rows == 2


def test_contexts_that_are_equal_once_cut_share_a_row():
    questions = [Question([first, *[2, 3] * 5], [4]) for first in range(5)]
    counted = Counted()
    assert_scored(questions, max_length=10, score=counted)
    assert counted.rows == 1
    assert count_cut(questions, 10) == 5
    assert count_cut(questions, 11) == 0


def test_shapes_are_few_and_batches_full():
    rng = np.random.default_rng(0)
    questions = [
        Question(rng.integers(1, VOCAB, size).tolist(), [1]) for size in range(1, 129)
    ]
    counted = Counted()
    assert_scored(questions, max_length=128, batch_size=16, score=counted)
    assert set(counted.shapes) == {(16, length) for length in (32, 48, 64, 96, 128)}
    assert len(counted.shapes) == 2 + 1 + 1 + 2 + 2


def test_padded_lengths_hold_every_length_and_waste_a_third_at_most():
    lengths = [padded_length(length, 2048) for length in range(1, 2049)]
    assert all(np.asarray(lengths) >= np.arange(1, 2049))
    assert all(np.asarray(lengths)[32:] * 2 <= np.arange(33, 2049) * 3)
    assert len(set(lengths)) == 13
    assert padded_length(40, 41) == 41 and padded_length(3, 20) == 20


@pytest.mark.parametrize(("question", "words"), [
    (Question([], [1]), "Question 1 has no tokens as its context"),
    (Question([1], []), "Question 1 has no tokens as its continuation"),
    (Question([1], [1] * 11), "continuation of question 1 has 11 tokens; a model"),
])  # fmt: skip
def test_what_cannot_be_scored_is_named_before_anything_is(question, words):
    counted = Counted()
    with pytest.raises(DataError, match=words):
        assert_scored([Question([1], [2]), question], max_length=10, score=counted)
    assert counted.shapes == []


def test_sizes_below_one_are_refused():
    for sizes in ({"max_length": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            assert_scored([Question([1], [2])], **sizes)
