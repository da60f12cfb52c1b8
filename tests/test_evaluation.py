"""Windows, negative log likelihoods and perplexities."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from kashin_jax.errors import DataError
from kashin_jax.evaluation import (
    bits_per_byte,
    count_new,
    make_windows,
    perplexity,
    score_windows,
    window_nll,
)

VOCAB = 11


def tokens_of(size, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, size).astype(np.int32)


def hugging_face_windows(num_tokens, max_length, stride):
    """`(begin, end, trg_len)` by the loop of the fixed-length perplexity guide."""
    windows, prev_end_loc = [], 0
    for begin_loc in range(0, num_tokens, stride):
        end_loc = min(begin_loc + max_length, num_tokens)
        windows.append((begin_loc, end_loc, end_loc - prev_end_loc))
        prev_end_loc = end_loc
        if end_loc == num_tokens:
            break
    return windows


def bigram_losses(tokens):
    """Loss of every token given the one before, float64; the first has none."""
    logits = np.random.default_rng(7).normal(size=(VOCAB, VOCAB)) * 3
    losses = -scipy.special.log_softmax(logits, axis=1)
    return np.concatenate([[np.nan], losses[tokens[:-1], tokens[1:]]])


@jax.jit
def bigram_nll(tokens, scored):
    logits = np.random.default_rng(7).normal(size=(VOCAB, VOCAB)) * 3
    return window_nll(jnp.asarray(logits, jnp.float32)[tokens], tokens, scored)


def score_all(windows, batch_size=3, nll_fn=bigram_nll):
    batches = score_windows(nll_fn, windows, batch_size=batch_size, progress=None)
    return np.concatenate([batch.nlls for batch in batches])


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 90), st.integers(2, 20), st.data())
def test_windows_are_those_of_the_hugging_face_recipe(num_tokens, context, data):
    stride = data.draw(st.integers(1, context))
    tokens = np.arange(num_tokens, dtype=np.int32) + 1
    windows = make_windows(tokens, context=context, stride=stride, drop_last=False)
    expected = hugging_face_windows(num_tokens, context, stride)
    # The recipe divides by zero at a last window of one token that nothing predicts.
    expected = [w for w in expected if w[2] > 1 or w[0] < w[1] - 1]
    assert windows.tokens.shape == (len(expected), context)
    for i, (begin, end, trg_len) in enumerate(expected):
        size = end - begin
        assert (windows.tokens[i, :size] == tokens[begin:end]).all()
        assert (windows.tokens[i, size:] == 0).all()
        scored = np.zeros(context, bool)
        scored[max(size - trg_len, 1) : size] = True
        assert (windows.scored[i] == scored).all()
        assert windows.num_new[i] == trg_len


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 90), st.integers(2, 20), st.booleans(), st.data())
def test_each_token_is_scored_at_most_once(num_tokens, context, drop_last, data):
    stride = data.draw(st.integers(1, context))
    drop_last = drop_last and num_tokens >= context
    # Each token is its own position, so that the windows tell which ones they score.
    positions = np.arange(num_tokens, dtype=np.int32)
    windows = make_windows(
        positions, context=context, stride=stride, drop_last=drop_last
    )
    scored = windows.tokens[windows.scored]
    assert len(set(scored.tolist())) == len(scored)
    if stride < context:
        assert sorted(scored) == list(range(1, 1 + len(scored)))
    if not drop_last and stride < context:
        assert len(scored) == num_tokens - 1


def test_windows_that_do_not_overlap_score_all_but_their_first_token():
    windows = make_windows(tokens_of(10), context=4, drop_last=False)
    assert windows.scored.sum(axis=1).tolist() == [3, 3, 1]
    assert windows.num_new.tolist() == [4, 4, 2]


def test_a_partial_window_is_dropped_only_on_request():
    kept = make_windows(tokens_of(10), context=4, drop_last=False)
    dropped = make_windows(tokens_of(10), context=4, drop_last=True)
    assert (len(kept.tokens), len(dropped.tokens)) == (3, 2)
    assert (kept.tokens[:2] == dropped.tokens).all()
    overlapping = make_windows(tokens_of(11), context=4, stride=2, drop_last=True)
    assert overlapping.tokens[-1].tolist() == tokens_of(11)[6:10].tolist()


def test_a_last_window_that_predicts_nothing_is_left_out():
    windows = make_windows(tokens_of(9), context=4, drop_last=False)
    assert len(windows.tokens) == 2
    assert windows.scored.any(axis=1).all()


@pytest.mark.parametrize(
    ("size", "options", "error", "message"),
    [
        (0, {"context": 4, "drop_last": False}, DataError, "at least 2 tokens"),
        (1, {"context": 4, "drop_last": False}, DataError, "Got 1; give a longer"),
        (3, {"context": 4, "drop_last": True}, DataError, "context=4 .*Got 3"),
        (9, {"context": 1, "drop_last": False}, ValueError, "Got context=1"),
        (9, {"context": 4, "stride": 0, "drop_last": False}, ValueError, "stride=0"),
        (9, {"context": 4, "stride": 5, "drop_last": False}, ValueError, "stride=5"),
    ],
)
def test_text_that_cannot_be_cut_is_refused(size, options, error, message):
    with pytest.raises(error, match=message):
        make_windows(tokens_of(size), **options)


@jax.jit
def optax_nll(logits, tokens, scored):
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1].astype(jnp.float32), tokens[:, 1:]
    )
    return jnp.sum(losses * scored[:, 1:].astype(jnp.float32), axis=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_window_nll_is_the_cross_entropy_of_the_scored_tokens(dtype):
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(3, 7, VOCAB)) * 4, dtype)
    tokens = jnp.asarray(rng.integers(0, VOCAB, (3, 7)), jnp.int32)
    scored = rng.random((3, 7)) < 0.6
    scored[:, 0] = False
    expected = optax_nll(logits, tokens, scored)
    assert np.allclose(window_nll(logits, tokens, scored), expected, rtol=1e-5)


def test_the_first_token_of_a_window_is_never_counted():
    logits = jnp.zeros((1, 4, VOCAB))
    tokens = jnp.ones((1, 4), jnp.int32)
    nll = window_nll(logits, tokens, jnp.ones((1, 4), bool))
    assert np.allclose(nll, 3 * np.log(VOCAB))
    assert window_nll(logits, tokens, jnp.zeros((1, 4), bool)) == 0.0


def test_padding_cannot_reach_the_result_even_as_nan():
    tokens = jnp.asarray([[1, 2, 3, 0, 0]], jnp.int32)
    scored = jnp.asarray([[False, True, True, False, False]])
    logits = np.random.default_rng(0).normal(size=(1, 5, VOCAB)).astype(np.float32)
    spoiled = logits.copy()
    spoiled[:, 2:] = np.nan
    logits, spoiled = jnp.asarray(logits), jnp.asarray(spoiled)
    assert window_nll(logits, tokens, scored) == window_nll(spoiled, tokens, scored)


def test_huge_logits_neither_overflow_nor_lose_the_difference():
    logits = jnp.full((1, 2, VOCAB), -1e30).at[0, 0, 3].set(1e30)
    scored = jnp.asarray([[False, True]])
    likely, unlikely = jnp.asarray([[0, 3]]), jnp.asarray([[0, 4]])
    assert window_nll(logits, likely, scored) == 0.0
    assert np.allclose(window_nll(logits, unlikely, scored), 2e30)


def test_a_token_outside_the_vocabulary_gives_nan_rather_than_a_number():
    tokens = jnp.asarray([[0, VOCAB]])
    nll = window_nll(jnp.zeros((1, 2, VOCAB)), tokens, jnp.asarray([[False, True]]))
    assert np.isnan(nll)


def test_no_second_array_of_the_size_of_the_logits_is_formed():
    shape = (2, 64, 8192)
    arguments = (
        jax.ShapeDtypeStruct(shape, jnp.float32),
        jax.ShapeDtypeStruct(shape[:2], jnp.int32),
        jax.ShapeDtypeStruct(shape[:2], jnp.bool_),
    )
    memory = jax.jit(window_nll).lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.1 * 4 * np.prod(shape)


@pytest.mark.parametrize("stride", [None, 1, 3, 5, 8])
@pytest.mark.parametrize("size", [8, 41, 43])
def test_perplexity_of_a_bigram_model_is_that_of_its_scored_tokens(size, stride):
    tokens = tokens_of(size)
    windows = make_windows(tokens, context=8, stride=stride, drop_last=False)
    losses = bigram_losses(tokens)
    starts = set(range(0, size, 8)) if stride in (None, 8) else {0}
    expected = np.exp(np.mean([losses[i] for i in range(size) if i not in starts]))
    assert np.isclose(perplexity(score_all(windows), windows), expected, rtol=1e-5)


@pytest.mark.parametrize(("context", "stride"), [(8, 3), (8, 8), (20, 5)])
def test_weighing_by_new_tokens_is_the_formula_of_the_paper(context, stride):
    tokens = tokens_of(43)
    losses = bigram_losses(tokens)
    total, end_loc = 0.0, 0
    for begin_loc, end_loc, trg_len in hugging_face_windows(43, context, stride):
        targets = losses[max(end_loc - trg_len, begin_loc + 1) : end_loc]
        total += targets.mean() * trg_len
    windows = make_windows(tokens, context=context, stride=stride, drop_last=False)
    value = perplexity(score_all(windows), windows, weigh=count_new)
    assert np.isclose(value, np.exp(total / end_loc), rtol=1e-5)


def test_uniform_predictions_have_the_perplexity_of_the_vocabulary():
    windows = make_windows(tokens_of(50), context=16, stride=5, drop_last=False)
    uniform = lambda tokens, scored: window_nll(
        jnp.zeros((*tokens.shape, VOCAB)), jnp.asarray(tokens), jnp.asarray(scored)
    )
    nlls = score_all(windows, nll_fn=uniform)
    assert np.isclose(perplexity(nlls, windows), VOCAB, rtol=1e-6)
    assert np.isclose(perplexity(nlls, windows, weigh=count_new), VOCAB, rtol=1e-6)


@pytest.mark.parametrize(
    ("nlls", "expected"),
    [
        ([1.0, 7e3], np.inf),
        ([1.0, np.inf], np.inf),
        ([1.0, np.nan], np.nan),
        ([0.0, 0.0], 1.0),
    ],
)
def test_a_destroyed_model_has_an_honest_perplexity(nlls, expected):
    windows = make_windows(tokens_of(8), context=4, drop_last=False)
    value = perplexity(np.asarray(nlls), windows)
    assert np.array_equal(value, expected, equal_nan=True)


def test_perplexity_refuses_scores_of_only_some_windows():
    windows = make_windows(tokens_of(12), context=4, drop_last=False)
    with pytest.raises(ValueError, match="each of 3 windows. Got shape \\(2,\\)"):
        perplexity(np.zeros(2), windows)


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_scores_do_not_depend_on_the_batch_size(batch_size):
    windows = make_windows(tokens_of(60), context=8, stride=8, drop_last=False)
    at_once = bigram_nll(windows.tokens, windows.scored)
    assert np.allclose(score_all(windows, batch_size), at_once, rtol=1e-6)


def test_one_compilation_serves_all_batches():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def nll_fn(tokens, scored):
        assert tokens.shape == (3, 8)
        return jnp.sum(jnp.where(scored, tokens, 0), axis=1).astype(jnp.float32)

    windows = make_windows(tokens_of(60), context=8, drop_last=False)
    nlls = score_all(windows, batch_size=3, nll_fn=nll_fn)
    assert (nlls == (windows.tokens * windows.scored).sum(axis=1)).all()
    assert nlls.dtype == np.float64


@pytest.mark.parametrize("start", range(9))
def test_scoring_resumed_at_a_window_gives_the_same_scores_from_there(start):
    windows = make_windows(tokens_of(64), context=8, drop_last=False)
    batches = list(
        score_windows(bigram_nll, windows, batch_size=3, start=start, progress=None)
    )
    firsts = [batch.first for batch in batches]
    assert firsts == list(range(start, 8, 3))
    nlls = [nll for batch in batches for nll in batch.nlls]
    assert np.allclose(nlls, score_all(windows)[start:], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1. Got 0"),
        ({"batch_size": 1, "start": -1}, "start=-1"),
        ({"batch_size": 1, "start": 4}, "start=4"),
    ],
)
def test_scoring_refuses_bad_options_before_it_starts(options, message):
    windows = make_windows(tokens_of(12), context=4, drop_last=False)
    with pytest.raises(ValueError, match=message):
        score_windows(bigram_nll, windows, **options)


def test_a_function_that_returns_one_number_per_batch_is_refused():
    windows = make_windows(tokens_of(12), context=4, drop_last=False)
    with pytest.raises(ValueError, match=r"shape \(2,\). Got \(\)"):
        score_all(windows, batch_size=2, nll_fn=lambda t, s: jnp.zeros(()))


@pytest.mark.parametrize(("context", "stride"), [(8, None), (8, 3), (20, 5)])
def test_bits_per_byte_count_what_is_predicted_and_nothing_else(context, stride):
    """Tokens of 0 to 4 bytes: the first of a window is on neither side."""
    tokens = tokens_of(43)
    sizes = np.random.default_rng(5).integers(0, 5, 43)
    windows = make_windows(
        tokens, context=context, stride=stride, drop_last=False, token_bytes=sizes
    )
    starts = set(range(0, 43, context)) if stride is None else {0}
    scored = [i for i in range(43) if i not in starts]
    nats = np.sum(bigram_losses(tokens)[scored])
    expected = nats / np.log(2) / sizes[scored].sum()
    found = bits_per_byte(score_all(windows), windows)
    assert np.isclose(found, expected, rtol=1e-5)


def test_bits_per_byte_need_bytes():
    windows = make_windows(tokens_of(9), context=8, drop_last=False)
    with pytest.raises(ValueError, match="give `make_windows` `token_bytes`"):
        bits_per_byte(score_all(windows), windows)
    nothing = make_windows(
        tokens_of(9), context=8, drop_last=False, token_bytes=np.zeros(9, np.int32)
    )
    assert bits_per_byte(score_all(nothing), nothing) is None
    with pytest.raises(ValueError, match="one value for each of 1 windows"):
        bits_per_byte(np.zeros(2), nothing)
