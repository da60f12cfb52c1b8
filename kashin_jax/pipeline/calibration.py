"""A text to quantize a model with: its windows, and which methods can take it."""

import dataclasses
import hashlib
import math
from collections.abc import Iterator
from operator import itemgetter
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int, Int32, Num

from kashin_jax.errors import DataError, UsageError
from kashin_jax.methods import Method
from kashin_jax.pipeline.hidden_states import HELD_BYTES
from kashin_jax.pipeline.passes import EncoderInputs, Tokens
from kashin_jax.pipeline.rules import Rules

__all__ = [
    "WEIGHTINGS",
    "Batch",
    "Calibration",
    "calibration_rules",
    "calibration_windows",
    "held_out_count",
    "in_batches",
    "require_windows",
]

# Tokens of a pass: what is between layers of a large model then takes some 100 MB.
_PASS = 8192
# One window in so many is held out.
_HELD_OUT = 8

WEIGHTINGS = (None, "gradient", "outputs")
"""How errors may be weighted, by tokens or by outputs."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """A text to quantize a model with, and how.

    Attributes:
      windows: Token ids, in the order in which they are read; at least two windows. The
        last eighth is held out.
      mask: For encoders, 1 for tokens and 0 for padding, which counts nothing; the
        model gets it as `attention_mask`. None where there is no padding.
      token_types: For encoders that tell two texts apart; the model gets it as
        `token_type_ids`. None gives it none.
      dampings: Shares of the mean second moment that are added to all, of which every
        layer gets the one that loses least on held-out windows.
      is_sequential: Whether layers read the text through a network whose earlier layers
        are quantized already, or through that in full precision.
      weighting: `gradient` weighs every token, for every layer, by the squared gradient
        of the loss with respect to the layer's outputs, see `gradient_weights`;
        `outputs` weighs errors of outputs by the second moments of that gradient, see
        `OutputMoments`; None weighs all alike.
      is_asymmetric: Whether a layer is to give what it would give in full precision,
        to what it reads behind layers that are quantized, see `asymmetric_target`. The
        text then goes through the network in full precision, too.
      held_bytes: Most bytes of hidden states that are held in memory, those in front of
        a block, of either network, and of moments of outputs; the rest is in unnamed
        files in the directory for temporary files (`TMPDIR`). Codes do not depend on
        it.
    """

    windows: Int32[np.ndarray, "w t"]
    # Of the same shape, which is checked.
    mask: Int32[np.ndarray, "_ _"] | None = None
    token_types: Int32[np.ndarray, "_ _"] | None = None
    dampings: tuple[float, ...] = (0.01, 0.1)
    is_sequential: bool = True
    weighting: str | None = None
    is_asymmetric: bool = False
    held_bytes: int = HELD_BYTES

    def __post_init__(self) -> None:
        require_windows(self.windows, "Calibration")
        self._check_encoder()
        if not self.dampings or not all(0 < d < math.inf for d in self.dampings):
            raise UsageError(
                f"`dampings` must be positive numbers. Got {self.dampings}."
            )
        if self.weighting not in WEIGHTINGS:
            raise UsageError(
                f"`weighting` must be one of {WEIGHTINGS}. Got {self.weighting!r}."
            )
        if self.is_asymmetric and not self.is_sequential:
            raise UsageError(
                "`is_asymmetric` makes up for what earlier layers lost, and without "
                "`is_sequential` none have. Give both or neither."
            )
        if self.held_bytes < 0:
            raise UsageError(
                f"`held_bytes` must not be negative. Got {self.held_bytes}."
            )

    def _check_encoder(self) -> None:
        for name in ("mask", "token_types"):
            given = getattr(self, name)
            if given is not None and given.shape != self.windows.shape:
                raise UsageError(
                    f"`{name}` must have the shape of `windows`, {self.windows.shape}. "
                    f"Got {given.shape}."
                )
        if self.mask is not None and not (self.mask != 0).any(axis=1).all():
            empty = int(np.flatnonzero(~(self.mask != 0).any(axis=1))[0])
            raise UsageError(
                f"`mask` leaves no token of window {empty}. Leave the window out."
            )
        if self.weighting is not None and self.is_encoder:
            raise UsageError(
                "`weighting` is for language models: it needs a loss at every token. "
                "Leave it out."
            )

    @property
    def is_encoder(self) -> bool:
        """Whether the model is called with more than token ids."""
        return self.mask is not None or self.token_types is not None

    @property
    def inputs(self) -> Tokens:
        """What the model is called with, of all windows."""
        if not self.is_encoder:
            return self.windows
        return EncoderInputs(self.windows, self.mask, self.token_types)

    @property
    def digest(self) -> str:
        """A hash of everything that the codes depend on."""
        given = self.windows, self.mask, self.token_types
        tokens = [a if a is None else np.ascontiguousarray(a, np.int32) for a in given]
        parts = [self.windows.shape, self.dampings, self.is_sequential]
        # Named only where there is one: other runs keep their digests.
        parts += [] if self.weighting is None else [self.weighting]
        parts += ["asymmetric"] if self.is_asymmetric else []
        parts += [[a is not None for a in given[1:]]] if self.is_encoder else []
        content = b"".join(a.tobytes() for a in tokens if a is not None)
        return hashlib.sha256(repr(parts).encode() + content).hexdigest()


def calibration_windows(
    tokens: Int[np.ndarray, " n"], *, context: int, count: int, seed: int = 0
) -> Int32[np.ndarray, "w t"]:
    """Draws windows that do not overlap from all over a text.

    Args:
      tokens: The text.
      context: Tokens of a window.
      count: Tokens in all at the most: whole windows, and from 16 windows on as many
        as fill whole batches.
      seed: Of the draw.

    Raises:
      UsageError: If `count` is less than two windows.
      DataError: If the text is shorter.
    """
    wanted, there = _whole_batches(count // context, context), tokens.size // context
    if wanted < 2:
        raise UsageError(
            f"Calibration needs two windows of {context} tokens at least, {2 * context}"
            f" tokens in all. Got {count}."
        )
    if there < wanted:
        raise DataError(
            f"The calibration text has {tokens.size} tokens, {there} windows of "
            f"{context}, and {wanted} are asked for. Give a longer text, or ask for "
            "fewer tokens."
        )
    cut = tokens[: there * context].reshape(there, context)
    order = np.random.default_rng(seed).permutation(there)[:wanted]
    return cut[order].astype(np.int32)


def calibration_rules(rules: Rules, weighting: str | None = None) -> Rules:
    """The rules with what their methods take for error feedback.

    Args:
      rules: Of the run.
      weighting: See `Calibration`.

    Raises:
      UsageError: If a method has none, none of outputs though these are weighted, or
        layers are to share scales of inputs.
    """
    if rules.share:
        raise UsageError(
            "`share` gives layers one scale of inputs, and calibration each its own. "
            "Leave one of them out."
        )

    def suited(config: Method) -> Method:
        if not config.takes_feedback:
            raise UsageError(
                f"The method {config.name} takes no calibration; kashin-joint, "
                "kashin-dct, rtn, k-means and their rotated forms do."
            )
        if weighting == "outputs" and not config.takes_output_feedback:
            raise UsageError(
                f"The method {config.name} takes no weighting of outputs; kashin-joint "
                "does. Leave `weighting` out, or weigh by `gradient`."
            )
        return config.for_feedback()

    each = [
        dataclasses.replace(rule, config=suited(rule.config)) if rule.config else rule
        for rule in rules.rules
    ]
    return dataclasses.replace(rules, config=suited(rules.config), rules=each)


def require_windows(windows: Num[np.ndarray, "..."], what: str) -> None:
    """Raises UsageError unless there are two windows, one of them to hold out."""
    is_whole = np.issubdtype(windows.dtype, np.integer)
    if windows.ndim != 2 or len(windows) < 2 or not windows.size or not is_whole:
        raise UsageError(
            f"{what} needs two windows of tokens at least, whole numbers. Got an array "
            f"of shape {windows.shape} and type {windows.dtype}."
        )
    if windows.min() < 0:
        raise UsageError(
            f"{what} has a token {windows.min()}; tokens are numbered from 0."
        )


def _whole_batches(windows: int, length: int) -> int:
    """How many of so many windows `in_batches` cuts well.

    A batch has windows of one kind, to learn from or held out, and all have one size:
    218 windows of 600 tokens would be read one by one, 216 of them go by nine.
    """
    if windows < 2 * _HELD_OUT:
        return windows

    def is_cut_well(count: int) -> bool:
        most = min(_most_windows(length), held_out_count(count))
        return 2 * _batch_size(count, length) >= most

    counts = range(windows // _HELD_OUT * _HELD_OUT, 0, -_HELD_OUT)
    return next(filter(is_cut_well, counts))


def _most_windows(length: int) -> int:
    return max(1, _PASS // length)


def _batch_size(windows: int, length: int) -> int:
    """The most windows of a pass that cut both kinds without a rest."""
    held_out = held_out_count(windows)
    common = math.gcd(windows - held_out, held_out)
    sizes = range(1, min(_most_windows(length), common) + 1)
    return max(size for size in sizes if common % size == 0)


def held_out_count(windows: int) -> int:
    """How many of so many windows, the last ones, nothing is learned from."""
    return max(1, windows // _HELD_OUT)


class Batch(NamedTuple):
    """Windows of one pass.

    Attributes:
      tokens: What the model is called with.
      is_held_out: Whether nothing is learned from them.
    """

    tokens: Tokens
    is_held_out: bool

    @property
    def size(self) -> int:
        """Tokens that are no padding."""
        if not isinstance(self.tokens, EncoderInputs):
            return int(self.tokens.size)
        ids, mask, _ = self.tokens
        return int(ids.size if mask is None else np.count_nonzero(mask))


def in_batches(inputs: Tokens) -> Iterator[Batch]:
    """Windows to learn from, then those held out, in batches of one size.

    Args:
      inputs: Of all windows.
    """
    windows, length = (
        inputs.ids if isinstance(inputs, EncoderInputs) else inputs
    ).shape
    learned, size = windows - held_out_count(windows), _batch_size(windows, length)
    for start in range(0, windows, size):
        cut = itemgetter(slice(start, start + size))
        yield Batch(jax.tree.map(cut, inputs), start >= learned)
