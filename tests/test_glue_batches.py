"""Batches of few shapes: nothing lost, nothing cut, everything back in order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.classification.encoding import (
    EncodedExamples,
    bucket_batches,
    in_example_order,
    pad_batch,
)

PAD = 9_999


def encoded_of(lengths, max_length):
    """Tokens that say whose they are: 100 times the example, plus the position."""
    tokens = [100 * i + j for i, n in enumerate(lengths) for j in range(n)]
    return EncodedExamples(
        input_ids=np.asarray(tokens, np.int32),
        token_type_ids=np.asarray([(t + 1) % 2 for t in tokens], np.int32),
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        max_length=max_length,
        num_truncated=0,
    )


lengths_of_examples = st.lists(st.integers(2, 40), max_size=60)
sizes = st.integers(1, 200)
multiples = st.integers(1, 17)


@settings(max_examples=100, deadline=None)
@given(lengths=lengths_of_examples, tokens=sizes, multiple=multiples)
def test_batches_hold_each_example_once_and_whole(lengths, tokens, multiple):
    encoded = encoded_of(lengths, 40)
    batches = bucket_batches(
        encoded, pad_id=PAD, tokens_per_batch=tokens, multiple=multiple
    )
    seen = []
    for batch in batches:
        for row, i in enumerate(batch.indices.tolist()):
            count = lengths[i] if i >= 0 else 0
            ids = [100 * i + j for j in range(count)]
            padding = batch.input_ids.shape[1] - count
            assert batch.input_ids[row].tolist() == ids + [PAD] * padding
            assert batch.attention_mask[row].tolist() == [1] * count + [0] * padding
            types = [(t + 1) % 2 for t in ids] + [0] * padding
            assert batch.token_type_ids[row].tolist() == types
        seen += batch.indices[batch.is_example].tolist()
    assert sorted(seen) == list(range(len(lengths)))


@settings(max_examples=100, deadline=None)
@given(lengths=lengths_of_examples, tokens=sizes, multiple=multiples)
def test_every_bucket_has_one_shape(lengths, tokens, multiple):
    batches = bucket_batches(
        encoded_of(lengths, 40), pad_id=0, tokens_per_batch=tokens, multiple=multiple
    )
    shapes = {batch.input_ids.shape for batch in batches}
    buckets = {min(40, -(-n // multiple) * multiple) for n in lengths}
    assert {width for _, width in shapes} == buckets and len(shapes) == len(buckets)
    for rows, width in shapes:
        assert rows == 1 or rows * width <= tokens
        assert (rows + 1) * width > tokens
    for batch in batches:
        assert {a.dtype for a in batch} == {np.dtype(np.int32)}
        assert batch.is_example[0]


@settings(max_examples=50, deadline=None)
@given(lengths=lengths_of_examples.filter(bool), tokens=sizes, data=st.data())
def test_outputs_come_back_in_the_order_of_the_examples(lengths, tokens, data):
    order = data.draw(st.permutations(range(len(lengths))))
    shapes = []
    for shuffled in (lengths, [lengths[i] for i in order]):
        batches = bucket_batches(
            encoded_of(shuffled, 40), pad_id=0, tokens_per_batch=tokens
        )
        # A model that answers with the length; NaN for what it was not asked.
        answers = [
            np.where(b.is_example, b.attention_mask.sum(1), np.nan)[:, None]
            for b in batches
        ]
        assert in_example_order(batches, answers)[:, 0].tolist() == shuffled
        shapes.append([b.input_ids.shape for b in batches])
    assert shapes[0] == shapes[1]


def test_a_bucket_has_one_shape_in_every_data_set():
    few = bucket_batches(encoded_of([3], 40), pad_id=0, tokens_per_batch=128)
    many = bucket_batches(encoded_of([9] * 9, 40), pad_id=0, tokens_per_batch=128)
    assert [b.input_ids.shape for b in few] == [(8, 16)]
    assert [b.input_ids.shape for b in many] == [(8, 16)] * 2


def test_no_example_is_cut_to_fit_a_batch():
    with pytest.raises(ValueError, match="`width`=4 is shorter than an example"):
        pad_batch(encoded_of([4, 5], 40), np.asarray([0, 1]), width=4, pad_id=0)


@pytest.mark.parametrize(("tokens", "multiple"), [(0, 16), (128, 0), (-1, 16)])
def test_batches_of_no_size_are_refused(tokens, multiple):
    with pytest.raises(ValueError, match=f"must be positive. Got {tokens} and "):
        bucket_batches(
            encoded_of([3], 40), pad_id=0, tokens_per_batch=tokens, multiple=multiple
        )


@pytest.mark.parametrize("count", [0, 1, 3])
def test_each_batch_needs_its_output(count):
    batches = bucket_batches(encoded_of([3, 20], 40), pad_id=0, tokens_per_batch=64)
    outputs = [np.zeros((4, 2), np.float32)] * count
    with pytest.raises(ValueError, match=f"one output for each. Got 2 and {count}"):
        in_example_order(batches, outputs)
