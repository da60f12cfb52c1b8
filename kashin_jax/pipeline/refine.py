"""Refinement: what decodes fixed codes learns from a text, and codes stay as they are.

First block by block, each against the outputs that the original block has in the
original network, from the hidden states that the refined blocks before it give. Then
all of it end to end, against the original's predictions. Stored bits do not change.

References:
  Hinton et al., "Distilling the knowledge in a neural network" (2015),
  arXiv:1503.02531, at a temperature of 1. Block by block, then end to end: Chen et al.,
  "EfficientQAT: efficient quantization-aware training for large language models"
  (2024), arXiv:2407.11062.
"""

import contextlib
import dataclasses
import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Int32, Num

from kashin_jax.errors import NonFiniteError, UsageError
from kashin_jax.pipeline.blocks import BlockRunner, find_blocks
from kashin_jax.pipeline.calibration import held_out_count, require_windows
from kashin_jax.pipeline.hidden_states import HELD_BYTES, HiddenStates
from kashin_jax.pipeline.loading import packed_tensors
from kashin_jax.pipeline.passes import Program, run_block
from kashin_jax.pipeline.paths import put_at_path
from kashin_jax.pipeline.refinable import Frozen, Refinable, Structure, take_apart
from kashin_jax.pipeline.targets import Graph
from kashin_jax.progress import progress_bar

__all__ = [
    "Gain",
    "Refinement",
    "RefinementReport",
    "Store",
    "divergence",
    "refine_model",
]

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refinement:
    """How long and how fast is learned.

    Attributes:
      block_epochs: Passes over the text in which every block learns; 0 for none.
      epochs: Passes in which all of them learn end to end; 0 for none.
      block_rate: Peak learning rate of blocks, for leaves of unit root-mean-square.
      rate: Peak learning rate end to end.
      text_weight: Share of the text's own tokens in the loss end to end: mean negative
        log likelihood; the rest is the divergence from the original's predictions.
      batch_tokens: About so many tokens decide a step.
      seed: Of the order of windows.
    """

    block_epochs: int = 1
    epochs: int = 1
    block_rate: float = 1e-3
    rate: float = 3e-4
    text_weight: float = 0.5
    batch_tokens: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.block_epochs, self.epochs) < 0 or not (
            self.block_epochs or self.epochs
        ):
            raise UsageError(
                "`block_epochs` and `epochs` are at least 0, one of them more. Got "
                f"{self.block_epochs} and {self.epochs}."
            )
        if not 0 <= self.text_weight <= 1:
            raise UsageError(
                f"`text_weight` is a share from 0 to 1. Got {self.text_weight}."
            )
        for name in ("block_rate", "rate", "batch_tokens"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(
                    f"`{name}` must be positive. Got {getattr(self, name)}."
                )

    def check(self, windows: Num[np.ndarray, "..."]) -> None:
        """Raises UsageError if nothing can be learned from these windows."""
        require_windows(windows, "Refinement")
        if self.epochs and windows.shape[1] < 2:
            raise UsageError(
                "Refinement learns from next tokens, and windows of one token have "
                "none. Give longer ones."
            )

    def digest(self, windows: Int32[np.ndarray, "w t"]) -> str:
        """A hash of everything that the result depends on beside the two models."""
        tokens = np.ascontiguousarray(windows, np.int32)
        content = repr((tokens.shape, self)).encode() + tokens.tobytes()
        return hashlib.sha256(content).hexdigest()


class Gain(NamedTuple):
    """A loss on windows that were held out.

    Attributes:
      before: Before learning.
      after: After it; not less than before means that nothing was changed.
    """

    before: float
    after: float


class RefinementReport(NamedTuple):
    """What learning brought on windows that were held out.

    Attributes:
      blocks: Of every block that has something to learn, the mean square of what its
        outputs lose, relative to theirs.
      whole: End to end, nats per token of the loss; None without that stage.
    """

    blocks: tuple[Gain, ...]
    whole: Gain | None

    def __str__(self) -> str:
        """Two lines: what blocks lose, and what the predictions."""
        lines = []
        if self.blocks:
            before = float(np.mean([each.before for each in self.blocks]))
            after = float(np.mean([min(each) for each in self.blocks]))
            count = sum(not each.after < each.before for each in self.blocks)
            lines.append(
                f"{len(self.blocks)} blocks: on held-out text their outputs lose "
                f"{after:.4f} of their squares, {before:.4f} before"
                f"{f'; {count} undone' if count else ''}."
            )
        if self.whole is not None:
            undone = "" if self.whole.after < self.whole.before else "; undone"
            lines.append(
                f"End to end: {self.whole.before:.4f} to {self.whole.after:.4f} nats "
                f"per token of held-out text{undone}."
            )
        return "\n".join(lines)


class Store:
    """Where arrays of unfinished work are kept, by name; this one keeps nothing."""

    def load(self, name: str) -> list[np.ndarray] | None:
        """What was kept; None if nothing was."""
        return None

    def keep(self, name: str, arrays: Sequence[Array | np.ndarray]) -> None:
        """Keeps arrays in the place of what was kept before."""


def refine_model(
    model: nnx.Module,
    original: nnx.Module,
    windows: Int32[np.ndarray, "w t"],
    refinement: Refinement | None = None,
    *,
    store: Store | None = None,
    stored: Mapping[str, str] | None = None,
    held_bytes: int = HELD_BYTES,
) -> tuple[Any, RefinementReport]:
    """A packed model whose scales, levels, biases and norms have learned from a text.

    Codes, seeds and dense matrices are those of `model`, so that stored bits are, too.
    Every stage is judged on the last eighth of the windows, which nothing learns from,
    and undone where it brought nothing.

    Args:
      model: Gives logits of token ids `[b, t]`; some of its layers are packed. Not
        changed. With `block_epochs=0` it may be dense, for a control.
      original: The model in full precision.
      windows: Token ids, at least two windows.
      refinement: How long and how fast; None takes `Refinement()`.
      store: Where unfinished work is kept, so that an interrupted run goes on.
      stored: Types that biases and norms have on disk, by path such as
        `decoder/layers/0/fc1/bias`, to which they are rounded in every step; others
        have those of the model.
      held_bytes: Most bytes of hidden states in memory, of either model; the rest goes
        to the directory for temporary files.

    Returns:
      The new model, and what was gained.

    Raises:
      UsageError: If nothing of the model is packed, or there is but one window.
      NonFiniteError: If a loss is not finite; names the block.
    """
    refinement = Refinement() if refinement is None else refinement
    store = Store() if store is None else store
    packed = packed_tensors(model)
    if not packed and refinement.block_epochs:
        raise UsageError(
            "The model has no packed layers; quantize it first, or set `block_epochs` "
            "to 0."
        )
    refinement.check(windows)
    model, blocks = nnx.clone(model), tuple[Gain, ...]()
    work = _Work(refinement, windows, store, {} if stored is None else stored)
    if refinement.block_epochs:
        with (
            contextlib.closing(HiddenStates(held_bytes)) as hidden,
            contextlib.closing(HiddenStates(held_bytes)) as wanted,
        ):
            runner = BlockRunner(model, find_blocks(model, packed), windows)
            blocks = _refine_blocks(model, runner, original, work, hidden, wanted)
    whole = None
    if refinement.epochs:
        model, whole = _refine_whole(model, original, work)
    return model, RefinementReport(blocks, whole)


@dataclasses.dataclass(frozen=True, eq=False)
class _Work:
    refinement: Refinement
    windows: Int32[np.ndarray, "w t"]
    store: Store
    stored: Mapping[str, str]

    @property
    def learned(self) -> int:
        """Windows to learn from, the first ones."""
        return len(self.windows) - held_out_count(len(self.windows))

    def order(self, epochs: int) -> Int[np.ndarray, "steps size"]:
        """Windows of every step; in each pass those that fill no batch are left out."""
        wanted = self.refinement.batch_tokens // self.windows.shape[1]
        size = min(max(1, wanted), self.learned)
        used = self.learned // size * size
        rounds = [
            np.random.default_rng([self.refinement.seed, epoch])
            .permutation(self.learned)[:used]
            for epoch in range(epochs)
        ]  # fmt: skip
        return np.concatenate(rounds).reshape(-1, size)

    def held_out(self) -> Int[np.ndarray, " h"]:
        """Windows that nothing learns from."""
        return np.arange(self.learned, len(self.windows))


def _refine_blocks(
    model: nnx.Module,
    runner: BlockRunner,
    original: nnx.Module,
    work: _Work,
    hidden: HiddenStates,
    wanted: HiddenStates,
) -> tuple[Gain, ...]:
    """Every block against the original one.

    Args:
      model: Its blocks are replaced by those that have learned.
      runner: Of the model.
      original: The one in full precision.
      work: What is learned from, and how.
      hidden: Takes the states of every window in front of the next block.
      wanted: Takes those in the original.
    """
    path, theirs = runner.path, BlockRunner(original, runner.path, work.windows)
    for window in work.windows:
        hidden.append(np.asarray(runner.first(window[None]))[0])
        wanted.append(np.asarray(theirs.first(window[None]))[0])

    def rows(picked: Int[np.ndarray, " k"]) -> tuple[np.ndarray, ...]:
        return work.windows[picked], hidden.stacked(picked), wanted.stacked(picked)

    gains, joined = [], _joined(model, runner)
    steps = len(work.order(work.refinement.block_epochs))
    with progress_bar(len(runner.blocks) * steps, "steps", desc="blocks ") as progress:
        for index, block in enumerate(runner.blocks):
            _go_behind(theirs, index, theirs.blocks[index], work, wanted)
            start = f"{path}/{index}/"
            parts = take_apart(block, {
                name[len(start) :]: dtype
                for name, dtype in work.stored.items()
                if name.startswith(start)
            })  # fmt: skip
            if index in joined:
                progress.update(steps)
            elif parts.params:
                loss = _BlockLoss(runner.program(index, parts.structure.graphdef))
                fit = _Fit(
                    f"{path}/{index}", loss, runner.state, rows,
                    work.refinement.block_epochs, work.refinement.block_rate,
                )  # fmt: skip
                params, gain = _learned(parts, fit, work, progress.update)
                gains.append(gain)
                if params is not None:
                    block = parts.model(params)
                    put_at_path(model, f"{path}/{index}", block)
            _go_behind(runner, index, block, work, hidden)
    return tuple(gains)


def _joined(model: nnx.Module, runner: BlockRunner) -> list[int]:
    """Blocks whose copy that has learned would be no part of their other places."""
    graph = Graph(model)
    found = [
        k for k, block in enumerate(runner.blocks) if not graph.stands_alone(block)
    ]
    if found:
        _logger.warning(
            "Blocks %s of %s have parts in common with others and learn end to end "
            "alone.",
            ", ".join(map(str, found)), runner.path,
        )  # fmt: skip
    return found


def _go_behind(
    runner: BlockRunner,
    index: int,
    block: nnx.Module,
    work: _Work,
    hidden: HiddenStates,
) -> None:
    for k, window in enumerate(work.windows):
        x = runner.outputs(index, block, window[None], hidden[k][None])
        hidden[k] = np.asarray(x)[0]


def _refine_whole(
    model: nnx.Module, original: nnx.Module, work: _Work
) -> tuple[Any, Gain]:
    """All blocks, head and norms against the original's predictions."""
    parts = take_apart(model, work.stored)
    graphdef, state = nnx.split(original)
    epochs, rate = work.refinement.epochs, work.refinement.rate
    loss = _LogitLoss(graphdef, work.refinement.text_weight)
    fit = _Fit("whole", loss, state, lambda k: (work.windows[k],), epochs, rate)
    with progress_bar(len(work.order(epochs)), "steps", desc="end to end ") as progress:
        params, gain = _learned(parts, fit, work, progress.update)
    return (model if params is None else parts.model(params)), gain


class _BlockLoss(NamedTuple):
    """Mean square of what outputs of a block lose, relative to theirs."""

    program: Program

    def __call__(
        self, block: Any, shell: Any, tokens: Array, x: Array, wanted: Array
    ) -> Float[Array, ""]:
        found = run_block(self.program, shell, block, tokens, x)
        lost = jnp.sum(jnp.square(found.astype(jnp.float32) - wanted))
        return lost / jnp.sum(jnp.square(wanted.astype(jnp.float32)))


def divergence(
    teacher: Float[Array, "b t v"], student: Float[Array, "b t v"]
) -> Float[Array, ""]:
    """Mean Kullback-Leibler divergence of the student from the teacher, in nats.

    Args:
      teacher: Logits; no gradient flows into them.
      student: Logits.
    """
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(teacher))
    log_q = jax.nn.log_softmax(student)
    return jnp.mean(optax.losses.kl_divergence_with_log_targets(log_q, log_p))


class _LogitLoss(NamedTuple):
    """Divergence from the original's predictions, and what the text is unlikely by."""

    original: Any
    text_weight: float

    def __call__(self, model: Any, state: Any, tokens: Array) -> Float[Array, ""]:
        logits = model(tokens).astype(jnp.float32)
        theirs = nnx.merge(self.original, state)(tokens).astype(jnp.float32)
        apart = divergence(theirs, logits)
        log_q = jax.nn.log_softmax(logits)
        said = jnp.take_along_axis(log_q[:, :-1], tokens[:, 1:, None], axis=-1)
        weight = self.text_weight
        return (1 - weight) * apart - weight * jnp.mean(said)


class _Fit(NamedTuple):
    """What learns from what.

    Attributes:
      name: In messages, and of what is kept.
      loss: Of a model, of `given` and of the rows of a batch.
      given: Arrays that the loss takes and nobody trains.
      rows: Called with the windows of a batch.
      epochs: Passes over the windows.
      rate: Peak learning rate.
    """

    name: str
    loss: Any
    given: Any
    rows: Callable[[Int[np.ndarray, " k"]], tuple[np.ndarray, ...]]
    epochs: int
    rate: float


def _learned(
    parts: Refinable, fit: _Fit, work: _Work, advance: Callable[[int], Any]
) -> tuple[list[Array] | None, Gain]:
    """Parameters after all steps; None where those before were no worse."""
    steps, every = work.order(fit.epochs), _SAVED_EVERY
    static = _Static(parts.structure, fit.loss, fit.rate, len(steps))
    before = _mean_loss(parts.params, parts, fit, work)
    if not math.isfinite(before):
        raise NonFiniteError(
            f"{fit.name}: the loss is {before} before anything was learned. Repair the "
            "checkpoints, or give another text."
        )
    state, done = _resumed(parts, static, work.store.load(fit.name))
    advance(done)
    for index in range(done, len(steps)):
        rows = fit.rows(steps[index])
        state = _step(static, state, parts.frozen, fit.given, rows)
        advance(1)
        if (index + 1) % every == 0 or index + 1 == len(steps):
            so_far = np.asarray(index + 1)
            work.store.keep(fit.name, [*jax.tree.leaves(state), so_far])
    after = _mean_loss(state[0], parts, fit, work)
    # NaN is not less.
    return (state[0] if after < before else None), Gain(before, after)


_SAVED_EVERY = 32


class _Static(NamedTuple):
    structure: Structure
    loss: Any
    rate: float
    steps: int

    def optimizer(self) -> optax.GradientTransformation:
        """Adam behind clipping, its rate a tenth of the steps rising, then falling."""
        schedule = optax.warmup_cosine_decay_schedule(
            init_value=self.rate / 10,
            peak_value=self.rate,
            warmup_steps=max(1, self.steps // 10),
            decay_steps=max(2, self.steps),
            end_value=self.rate / 20,
        )
        return optax.chain(
            optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99)
        )


_State = tuple[list[Array], Any]


def _resumed(
    parts: Refinable, static: _Static, kept: list[np.ndarray] | None
) -> tuple[_State, int]:
    """Parameters and moments, and the steps behind them."""
    # A copy: steps donate them, and those at the start may be kept.
    start = jax.tree.map(jnp.array, parts.params)
    state = (start, static.optimizer().init(start))
    if kept is None:
        return state, 0
    *leaves, done = kept
    structure = jax.tree.structure(state)
    return jax.tree.unflatten(structure, map(jnp.asarray, leaves)), int(done)


@partial(jax.jit, static_argnames="static", donate_argnames="state")
def _step(
    static: _Static, state: _State, frozen: Frozen, given: Any, rows: Sequence[Array]
) -> _State:
    params, moments = state

    def loss(params: list[Array]) -> Float[Array, ""]:
        found: Array = static.loss(static.structure.model(params, frozen), given, *rows)
        return found

    gradient = jax.grad(loss)(params)
    # Optax raises floats to integer powers, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        updates, moments = static.optimizer().update(gradient, moments, params)
    return optax.apply_updates(params, updates), moments


def _mean_loss(params: list[Array], parts: Refinable, fit: _Fit, work: _Work) -> float:
    """The loss on windows that were held out, one by one."""
    found = [
        float(
            _loss(
                parts.structure, fit.loss, params, parts.frozen, fit.given,
                fit.rows(index[None]),
            )
        )
        for index in work.held_out()
    ]  # fmt: skip
    return float(np.mean(found))


@partial(jax.jit, static_argnames=("structure", "loss"))
def _loss(
    structure: Structure,
    loss: Any,
    params: list[Array],
    frozen: Frozen,
    given: Any,
    rows: Sequence[Array],
) -> Float[Array, ""]:
    found: Array = loss(structure.model(params, frozen), given, *rows)
    return found
