"""Training batches: seeded epochs as one stream, padded to few lengths."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Int32

from experiments.classification.encoding import EncodedExamples, pad_batch

__all__ = ["ShuffledIndices", "TrainBatch", "TrainingSet", "read_batch"]

# Every other length would be one more compilation.
_MULTIPLE = 32


class TrainBatch(NamedTuple):
    """Rows of `a` parts, padded on the right to one length.

    Attributes:
      input_ids: Tokens, then padding.
      attention_mask: 1 for tokens, 0 for padding.
      token_type_ids: Which text of a pair a token is from.
      targets: Output that shall be the largest, or the value of a regression.
    """

    input_ids: Int32[np.ndarray, "a b t"]
    attention_mask: Int32[np.ndarray, "a b t"]
    token_type_ids: Int32[np.ndarray, "a b t"]
    targets: Int32[np.ndarray, "a b"] | Float32[np.ndarray, "a b"]


class TrainingSet(NamedTuple):
    """What batches are cut from.

    Attributes:
      encoded: Token ids of all examples.
      targets: As in `TrainBatch`, of all examples.
      pad_id: The model's padding token.
    """

    encoded: EncodedExamples
    targets: Int32[np.ndarray, " n"] | Float32[np.ndarray, " n"]
    pad_id: int


class ShuffledIndices:
    """An endless stream of epochs, each a permutation of `0, ..., count - 1`.

    Any piece can be read alone; epochs read in turn are drawn once.
    """

    def __init__(self, count: int, *, seed: int):
        """Starts at epoch 0."""
        self._count = count
        self._seed = seed
        self._epoch, self._order = 0, self._permutation(0)

    def read(self, start: int, length: int) -> Int[np.ndarray, " length"]:
        """Elements `start, ..., start + length - 1` of the stream."""
        pieces = []
        while length > 0:
            epoch, position = divmod(start, self._count)
            if epoch != self._epoch:
                self._epoch, self._order = epoch, self._permutation(epoch)
            piece = self._order[position : position + length]
            pieces.append(piece)
            start, length = start + len(piece), length - len(piece)
        return np.concatenate(pieces)

    def _permutation(self, epoch: int) -> Int[np.ndarray, " count"]:
        return np.random.default_rng([self._seed, 1, epoch]).permutation(self._count)


def read_batch(
    data: TrainingSet, stream: ShuffledIndices, step: int, *, size: int, parts: int
) -> TrainBatch:
    """The batch of a step.

    Batches are cut from the stream of epochs one after the other, so none is smaller
    than the others; one may hold the end of an epoch and the beginning of the next.

    Args:
      data: The training set.
      stream: Order of its examples.
      step: Counted from 0.
      size: Examples in the batch.
      parts: Divides `size`.
    """
    indices = stream.read(step * size, size)
    longest = int(data.encoded.lengths[indices].max())
    width = min(-(-longest // _MULTIPLE) * _MULTIPLE, data.encoded.max_length)
    padded = pad_batch(data.encoded, indices, width=width, pad_id=data.pad_id)
    shape = (parts, -1, width)
    return TrainBatch(
        padded.input_ids.reshape(shape),
        padded.attention_mask.reshape(shape),
        padded.token_type_ids.reshape(shape),
        data.targets[indices].reshape(parts, -1),
    )
