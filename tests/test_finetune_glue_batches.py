"""The order of training examples and the batches cut from it."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.classification.encoding import EncodedExamples
from experiments.finetuning.batches import ShuffledIndices, TrainingSet, read_batch
from experiments.finetuning.config import FinetuneConfig


def _training_set(lengths, *, max_length):
    lengths = np.asarray(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.repeat(np.arange(len(lengths)) + 100, lengths).astype(np.int32)
    encoded = EncodedExamples(ids, ids % 2, offsets, max_length, 0)
    return TrainingSet(encoded, np.arange(len(lengths), dtype=np.int32), pad_id=7)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(0, 60), st.integers(1, 30), st.integers(0, 3))
def test_any_piece_of_the_stream_can_be_read_alone(count, start, length, seed):
    whole = ShuffledIndices(count, seed=seed).read(0, start + length)
    piece = ShuffledIndices(count, seed=seed).read(start, length)
    np.testing.assert_array_equal(piece, whole[start:])


def test_every_epoch_holds_each_example_once_in_an_order_of_its_own():
    orders = set()
    for seed in (0, 1):
        stream = ShuffledIndices(50, seed=seed)
        for epoch in (0, 1, 2):
            order = stream.read(50 * epoch, 50)
            assert sorted(order) == list(range(50))
            orders.add(tuple(order))
    assert len(orders) == 6


def test_batches_are_consecutive_and_padded_behind_the_tokens():
    lengths = [1, 33, 40, 5, 32, 64, 63, 2, 9, 10]
    data = _training_set(lengths, max_length=70)
    seen = []
    for step in range(5):
        stream = ShuffledIndices(10, seed=0)
        batch = read_batch(data, stream, step, size=4, parts=2)
        assert batch.targets.shape == (2, 2)
        for ids, mask, types, target in zip(
            *(a.reshape(4, *a.shape[2:]) for a in batch), strict=True
        ):
            length = lengths[target]
            np.testing.assert_array_equal(mask, np.arange(len(mask)) < length)
            np.testing.assert_array_equal(ids[:length], 100 + target)
            np.testing.assert_array_equal(types[:length], target % 2)
            assert (ids[length:] == 7).all() and not types[length:].any()
            seen.append(int(target))
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))


def test_widths_are_multiples_of_32_up_to_the_longest_that_is_allowed():
    for length, width in ((1, 32), (32, 32), (33, 64), (65, 70), (70, 70)):
        data = _training_set([length], max_length=70)
        batch = read_batch(data, ShuffledIndices(1, seed=0), 0, size=2, parts=1)
        assert batch.input_ids.shape == (1, 2, width)


def test_epochs_end_where_their_last_example_has_been_seen():
    config = FinetuneConfig(task="rte", out="o", epochs=2.5, batch_size=32)
    # 100 / 32 = 3.1, 200 / 32 = 6.3, 250 / 32 = 7.8
    assert config.epoch_ends(100) == {4: 1.0, 7: 2.0, 8: 2.5}
    assert config.steps(100) == 8
    # A training set smaller than a batch.
    assert config.epoch_ends(3) == {1: 2.5}
