"""Examples as token ids, and batches of few static shapes.

Lengths are rounded up to buckets; every batch of a bucket has one shape, which depends
on the bucket alone, so that a jitted model compiles once for each bucket whatever the
task.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Int32, Int64

from experiments.classification.data import Examples
from kashin_jax.models.tokenizer import PairTokenizer

__all__ = [
    "Batch",
    "EncodedExamples",
    "bucket_batches",
    "encode_examples",
    "in_example_order",
    "pad_batch",
]


class EncodedExamples(NamedTuple):
    """Ragged token ids, all examples end to end.

    Attributes:
      input_ids: Tokens, special ones included.
      token_type_ids: 0 for the first text and 1 for the second, where the tokenizer
        tells them apart; else 0.
      offsets: Example `i` is `input_ids[offsets[i] : offsets[i + 1]]`.
      max_length: Longest encoding that was allowed, in tokens.
      num_truncated: Examples that had to be cut to it.
    """

    input_ids: Int32[np.ndarray, " tokens"]
    token_type_ids: Int32[np.ndarray, " tokens"]
    offsets: Int64[np.ndarray, " n_plus_one"]
    max_length: int
    num_truncated: int

    @property
    def lengths(self) -> Int64[np.ndarray, " n"]:
        """Tokens of each example."""
        return np.diff(self.offsets)


class Batch(NamedTuple):
    """Padded rows.

    Attributes:
      indices: The example in each row; -1 for an empty row, masked from end to end.
      input_ids: Tokens, then padding.
      attention_mask: 1 for tokens, 0 for padding.
      token_type_ids: As in `EncodedExamples`, 0 for padding.
    """

    indices: Int32[np.ndarray, " b"]
    input_ids: Int32[np.ndarray, "b t"]
    attention_mask: Int32[np.ndarray, "b t"]
    token_type_ids: Int32[np.ndarray, "b t"]

    @property
    def is_example(self) -> Bool[np.ndarray, " b"]:
        """Which rows hold an example."""
        return self.indices >= 0


def encode_examples(
    tokenizer: PairTokenizer, examples: Examples, max_length: int
) -> EncodedExamples:
    """Tokenizes texts or pairs, special tokens included.

    Args:
      tokenizer: Of the classifier.
      examples: Texts, or pairs of texts.
      max_length: Longest encoding, in tokens; the longer text of a pair is cut first.

    Raises:
      UsageError: If `max_length` leaves no room for text between special tokens.
    """
    encoded = tokenizer.encode(examples.first, examples.second, max_length=max_length)
    lengths = [len(example.input_ids) for example in encoded]
    flat = lambda name: np.asarray(
        [i for example in encoded for i in getattr(example, name)], np.int32
    )
    return EncodedExamples(
        input_ids=flat("input_ids"),
        token_type_ids=flat("token_type_ids"),
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        max_length=max_length,
        num_truncated=sum(example.truncated for example in encoded),
    )


def pad_batch(
    encoded: EncodedExamples,
    indices: Int[np.ndarray, " b"],
    *,
    width: int,
    pad_id: int,
) -> Batch:
    """Pads some examples to one width.

    Args:
      encoded: All examples.
      indices: Which ones, row by row; -1 leaves a row empty.
      width: Tokens in a row.
      pad_id: The model's padding token.

    Raises:
      ValueError: If an example is longer than `width`.
    """
    if indices.size and encoded.lengths[indices[indices >= 0]].max(initial=0) > width:
        raise ValueError(
            f"`width`={width} is shorter than an example of the batch; truncate by "
            "`encode_examples`."
        )
    lengths = np.where(indices >= 0, encoded.lengths[indices], 0)
    position = np.arange(width)[None, :]
    inside = position < lengths[:, None]
    source = np.where(inside, encoded.offsets[indices][:, None] + position, 0)
    return Batch(
        indices=indices.astype(np.int32),
        input_ids=np.where(inside, encoded.input_ids[source], np.int32(pad_id)),
        attention_mask=inside.astype(np.int32),
        token_type_ids=np.where(inside, encoded.token_type_ids[source], np.int32(0)),
    )


def bucket_batches(
    encoded: EncodedExamples,
    *,
    pad_id: int,
    tokens_per_batch: int,
    multiple: int = 16,
) -> tuple[Batch, ...]:
    """Batches examples of similar length, in one shape for each bucket.

    Args:
      encoded: The examples, in any order.
      pad_id: The model's padding token.
      tokens_per_batch: Tokens in a batch, padding included; at least one row is taken.
      multiple: Buckets are the multiples of this, and `encoded.max_length`.

    Returns:
      Batches from short to long that hold each example once; in a bucket's last batch,
      rows are left empty at the end.

    Raises:
      ValueError: If `tokens_per_batch` or `multiple` is not positive.
    """
    if tokens_per_batch < 1 or multiple < 1:
        raise ValueError(
            "`tokens_per_batch` and `multiple` must be positive. "
            f"Got {tokens_per_batch} and {multiple}."
        )
    rounded = -(-encoded.lengths // multiple) * multiple
    widths = np.minimum(rounded, encoded.max_length)
    batches = []
    for width in map(int, np.unique(widths)):
        members = np.flatnonzero(widths == width)
        rows = max(1, tokens_per_batch // width)
        full = np.full(-(-members.size // rows) * rows, -1, np.int64)
        full[: members.size] = members
        batches += [
            pad_batch(encoded, indices, width=width, pad_id=pad_id)
            for indices in full.reshape(-1, rows)
        ]
    return tuple(batches)


def in_example_order(
    batches: Sequence[Batch], outputs: Sequence[Float[np.ndarray, "b k"]]
) -> Float[np.ndarray, "n k"]:
    """Puts the outputs of batches that hold each example once back in order.

    Raises:
      ValueError: If there is no batch, or not one output for each.
    """
    if not 0 < len(batches) == len(outputs):
        raise ValueError(
            "There must be a batch, and one output for each. "
            f"Got {len(batches)} and {len(outputs)}."
        )
    indices = np.concatenate([batch.indices for batch in batches])
    stacked = np.concatenate(outputs)
    rows = np.flatnonzero(indices >= 0)
    return stacked[rows[np.argsort(indices[rows])]]
