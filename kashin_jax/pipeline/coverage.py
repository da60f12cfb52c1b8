"""How much of a model is quantized, and what is not."""

import logging
import math
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["Coverage", "Part", "cover"]

# Below this share of what is no embedding and no head, something was overlooked.
_ENOUGH = 0.8
_SHOWN = 5

_logger = logging.getLogger(__name__)


class Part(NamedTuple):
    """A tensor of a model, quantized or not.

    Attributes:
      name: What a user finds it by.
      shape: Shape of the array.
      size: Bytes before.
      reason: Why it stays; None if it is quantized.
      is_outer: Whether it is an embedding or a head.
    """

    name: str
    shape: tuple[int, ...]
    size: int
    reason: str | None
    is_outer: bool = False

    @property
    def weights(self) -> int:
        """The number of its entries."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.name} [{' x '.join(map(str, self.shape))}]: {self.reason}"


class Coverage(NamedTuple):
    """How much of a model is quantized; printed, it is a few lines.

    Attributes:
      weights: Share of all weights.
      bytes: Share of the bytes before.
      inner: Share of the weights outside embeddings and heads.
      left: Tensors that stay, the largest first; vectors are not among them.
    """

    weights: float
    bytes: float
    inner: float
    left: tuple[Part, ...]

    def __str__(self) -> str:
        text = (
            f"Quantized: {self.weights:.1%} of the weights, {self.bytes:.1%} of the "
            f"bytes, {self.inner:.1%} of the weights outside embeddings and heads."
        )
        if not self.left:
            return text
        return f"{text}\nLargest in full precision: {_listed(self.left)}."

    def warn(self) -> None:
        """Logs a warning that names the largest tensors left, if they are many."""
        if self.inner < _ENOUGH:
            inner = [part for part in self.left if not part.is_outer]
            _logger.warning(
                "Only %.1f %% of the weights outside embeddings and heads are "
                "quantized. The largest in full precision: %s.",
                100 * self.inner,
                _listed(inner),
            )


def _listed(parts: Iterable[Part]) -> str:
    known = list(parts)
    rest = f"; and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
    return "; ".join(map(str, known[:_SHOWN])) + rest


def cover(parts: Iterable[Part], other_weights: int, other_bytes: int) -> Coverage:
    """Sums up a model.

    Args:
      parts: All arrays of weights that might be expected to be quantized.
      other_weights: How many weights all others have, norms and biases.
      other_bytes: How many bytes these take.
    """
    known = list(parts)
    packed = [part for part in known if part.reason is None]
    left = [part for part in known if part.reason is not None]

    def share(some: Iterable[int], all_of_them: Iterable[int], others: int) -> float:
        whole = sum(all_of_them) + others
        return sum(some) / whole if whole else 1.0

    inner = [part for part in known if not part.is_outer]
    return Coverage(
        share((p.weights for p in packed), (p.weights for p in known), other_weights),
        share((p.size for p in packed), (p.size for p in known), other_bytes),
        # Vectors count with neither side: of small models they are much, and they stay.
        share(
            (p.weights for p in inner if p.reason is None),
            (p.weights for p in inner),
            0,
        ),
        tuple(sorted(left, key=lambda part: -part.weights)),
    )
