"""Quantizing a model with a text: what its layers read decides what is lost.

Block by block, the second moments of what every layer reads are summed over windows of
the text, in the network whose earlier layers are quantized already. Every layer is then
coded with error feedback, at several strengths of damping, and without any data; what
loses least of the layer's outputs on windows that were held out is kept.
"""

import contextlib
import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from kashin_jax.errors import NonFiniteError
from kashin_jax.methods import (
    Method,
    QuantizationReport,
    asymmetric_target,
    output_loss,
    quantize_stack,
    weight_error,
)
from kashin_jax.methods.feedback import damped, damped_in_place
from kashin_jax.pipeline.blocks import BlockRunner, find_blocks
from kashin_jax.pipeline.calibration import Batch, Calibration, in_batches
from kashin_jax.pipeline.each_batch import each_batch
from kashin_jax.pipeline.hidden_states import HiddenStates
from kashin_jax.pipeline.moments import MeanMoments, Moments
from kashin_jax.pipeline.output_moments import OutputMoments
from kashin_jax.pipeline.passes import Stage
from kashin_jax.pipeline.paths import at_path, join, path_key
from kashin_jax.pipeline.plan import Choice
from kashin_jax.pipeline.report import (
    CalibrationReport,
    CalibrationSeconds,
    LayerReport,
)
from kashin_jax.pipeline.run import reported
from kashin_jax.pipeline.stopwatch import Stopwatch
from kashin_jax.pipeline.targets import Graph
from kashin_jax.pipeline.token_weights import TokenWeights, gradient_weights
from kashin_jax.progress import progress_bar
from kashin_jax.tensors import QuantizedTensor, dequantize

__all__ = ["Layers", "quantize_calibrated"]

# Share of their mean that is added to second moments of gradients. They are those of
# the network in full precision, and not exactly a Kronecker factor of what the loss
# does. On the valid split at 2 bits, 32,768 tokens, one seed: perplexity 31.28, 31.07
# and 30.91 with .03, .3 and 1; 31.31 without them.
_OUTPUT_DAMPING = 1.0

_logger = logging.getLogger(__name__)


@runtime_checkable
class Layers(Protocol):
    """Where the dense layers of a model come from, and packed ones go to."""

    def kernel(self, choice: Choice) -> Float[Array, "m n"]:
        """A matrix, `[in, out]`."""

    def is_kept(self, choice: Choice) -> bool:
        """Whether an earlier run made something of a layer."""

    def kept(self, choice: Choice) -> QuantizedTensor | None:
        """What it made; None if nothing."""

    def keep(
        self, choice: Choice, tensor: QuantizedTensor, report: LayerReport
    ) -> None:
        """Takes what became of a layer."""


def quantize_calibrated(
    model: nnx.Module,
    choices: Sequence[Choice],
    calibration: Calibration,
    root: Key[Array, ""],
    layers: Layers,
) -> None:
    """Quantizes the chosen layers of a model's blocks, one block in memory at a time.

    Linear layers within the model's list of blocks are calibrated. All others, those
    that stand in several places, and those that a block never calls, or twice, are left
    to the caller, who codes them without data; a logged warning names them.

    Args:
      model: Gives logits of token ids `[b, t]`, or is an encoder that is called with
        token ids and what else `calibration` has. Not changed.
      choices: Those with a method.
      calibration: The text.
      root: Folded with every path, as `quantize_model` does it.
      layers: Gives their matrices and takes what becomes of them.

    Raises:
      UsageError: If the model has no list of blocks, or does more between them than to
        hand hidden states on.
      NonFiniteError: If a matrix, or what a layer reads, holds NaN or infinity; names
        the layer.
    """
    left = {choice.path: None for choice in choices}
    path = find_blocks(model, left)
    within = [choice for choice in choices if choice.path.startswith(f"{path}/")]
    chosen = _standing_alone(model, within)
    runner = BlockRunner(model, path, calibration.inputs)
    run = _Run(runner, calibration, root, layers)
    size = sum(math.prod(choice.candidate.shape) for choice in choices)
    with (
        contextlib.closing(run),
        progress_bar(size, "weights", desc="calibration ") as progress,
    ):
        for choice in run.code(chosen):
            progress.set_postfix_str(choice.path)
            progress.update(math.prod(choice.candidate.shape))
            del left[choice.path]
    if left:
        _logger.warning(
            "%d layers are coded without calibration, as the text does not reach them "
            "by the one call of a linear layer of %s: %s.",
            len(left), path, ", ".join(left),
        )  # fmt: skip


def _standing_alone(model: nnx.Module, choices: Sequence[Choice]) -> dict[str, Choice]:
    """By path the choices whose layers stand, and whose matrices are, in one place."""
    holders = Graph(model).holders

    def is_alone(choice: Choice) -> bool:
        parts = choice.path.split("/")
        above = (at_path(model, join(parts[:k])) for k in range(1, len(parts) + 1))
        return len(choice.candidate.paths) == 1 and all(
            len(holders.get(id(node), ())) <= 1 for node in above
        )

    return {choice.path: choice for choice in choices if is_alone(choice)}


class _Run:
    """The text on its way through the blocks."""

    def __init__(
        self,
        runner: BlockRunner,
        calibration: Calibration,
        root: Key[Array, ""],
        layers: Layers,
    ) -> None:
        self.runner, self._calibration, self._root = runner, calibration, root
        self._layers = layers
        self._batches = list(in_batches(calibration.inputs))
        self._weights: list[TokenWeights] | None = None
        self._output_moments: OutputMoments | None = None
        self._watch = Stopwatch()
        # In front of the next block, on the host; and the same in full precision.
        self._hidden = HiddenStates(calibration.held_bytes)
        self._full: HiddenStates | None = None
        if calibration.is_asymmetric:
            self._full = HiddenStates(calibration.held_bytes)

    def close(self) -> None:
        """Forgets hidden states."""
        self._hidden.close()
        for each in (self._full, self._output_moments):
            if each is not None:
                each.close()

    def code(self, chosen: Mapping[str, Choice]) -> Iterator[Choice]:
        """Codes what the text reaches and nobody kept; gives all that it reaches.

        Args:
          chosen: By path within the model.
        """
        reached = [
            self._reached(index, chosen) for index in range(len(self.runner.blocks))
        ]
        undone = [
            index
            for index, own in enumerate(reached)
            if not all(map(self._layers.is_kept, own.choices.values()))
        ]
        last = max(undone, default=-1)
        if undone:
            self._start(reached)
        for index, own in enumerate(reached):
            if index > last:
                yield from own.choices.values()
                continue
            yield from self._block(index, own, goes_behind=index < last)

    def _reached(self, index: int, chosen: Mapping[str, Choice]) -> "_Reached":
        start = f"{self.runner.path}/{index}/"
        own = {p[len(start) :]: c for p, c in chosen.items() if p.startswith(start)}
        stages = self._stages(index, own)
        heard = {path for stage in stages for path in stage}
        return _Reached(stages, {p: c for p, c in own.items() if p in heard})

    def _start(self, reached: Sequence["_Reached"]) -> None:
        """Goes in front of the first block; weighs errors, if they are to differ.

        Args:
          reached: Of every block, those that are kept included: what tokens weigh does
            not depend on what is left to do.
        """
        with self._watch.phase("statistics"):
            texts = ((batch.tokens,) for batch in self._batches)
            for x in each_batch(self.runner.first_call(), texts):
                self._hidden.append(np.asarray(x))
                if self._full is not None:
                    self._full.append(self._hidden[-1])
        weighting = self._calibration.weighting
        if weighting is None:
            return
        wanted = [list(own.choices) for own in reached]
        key, held = path_key(self._root, self.runner.path), self._calibration.held_bytes
        with self._watch.phase("statistics"):
            # Of language models: others have no weights.
            if weighting == "gradient":
                batches = [np.asarray(batch.tokens) for batch in self._batches]
                self._weights = gradient_weights(
                    self.runner, wanted, batches, key, held
                )
            else:
                learned = [b.tokens for b in self._batches if not b.is_held_out]
                batches = [np.asarray(tokens) for tokens in learned]
                self._output_moments = OutputMoments(
                    self.runner, wanted, batches, key, held
                )

    def _block(
        self, index: int, reached: "_Reached", *, goes_behind: bool
    ) -> Iterator[Choice]:
        """Quantizes layers of a block and moves on behind it; gives what was done.

        Args:
          index: Of the block; all in front of it were done.
          reached: Layers that it calls.
          goes_behind: Whether hidden states behind it are asked for.
        """
        original = self.runner.blocks[index]
        stages, own = reached
        is_changed = self._calibration.is_sequential
        # A copy, whose kernels are changed as soon as they are quantized.
        block = nnx.clone(original) if is_changed else original
        for group in self._groups(stages):
            done = {p: self._layers.kept(own[p]) for stage in group for p in stage}
            # All of a group or none: a program for some may round otherwise, and an
            # interrupted run is to go on to the same bytes.
            rest = group if None in done.values() else []
            with self._watch.phase("statistics"):
                moments = self._moments(index, block, rest, own)
            for stage in group:
                for path in stage:
                    choice, tensor = own[path], done[path]
                    if tensor is None:
                        outputs = None
                        if self._output_moments is not None:
                            n = choice.candidate.shape[-1]
                            outputs = self._output_moments.of(index, path, n)
                        tensor = self._coded(choice, moments[stage], outputs)
                    if is_changed:
                        with self._watch.phase("statistics"):
                            _put_kernel(block, path, tensor)
                    yield choice
        if goes_behind:
            with self._watch.phase("statistics"):
                self._go_behind(index, block, self._hidden)
                if self._full is not None:
                    self._go_behind(index, original, self._full)

    def _go_behind(self, index: int, block: nnx.Module, hidden: HiddenStates) -> None:
        call = self.runner.outputs_call(index, block)
        inputs = ((batch.tokens, hidden[k]) for k, batch in enumerate(self._batches))
        for k, x in enumerate(each_batch(call, inputs)):
            hidden[k] = np.asarray(x)

    def _stages(self, index: int, own: Collection[str]) -> list[Stage]:
        block = self.runner.blocks[index]
        linear = [path for path in own if _is_linear(block, path)]
        return self.runner.stages(index, linear) if linear else []

    def _groups(self, stages: Sequence[Stage]) -> list[list[Stage]]:
        """Stages, each with moments of its own, that one pass collects."""
        is_sequential = self._calibration.is_sequential
        groups = [[stage] for stage in stages] if is_sequential else [list(stages)]
        if self._weights is None:
            return groups
        # Layers that read the same input differ in what its tokens weigh.
        return [[(path,) for stage in group for path in stage] for group in groups]

    def _moments(
        self,
        index: int,
        block: nnx.Module,
        stages: Sequence[Stage],
        own: Mapping[str, Choice],
    ) -> dict[Stage, "_MeanHeard"]:
        """What layers read, in windows to learn from and in those held out."""
        if not stages:
            return {}
        times = 1 if self._full is None else 2
        sums = {s: _Heard.none(times * own[s[0]].candidate.shape[-2]) for s in stages}
        original = None if self._full is None else self.runner.blocks[index]
        call = self.runner.moments_call(index, block, stages, original)
        inputs = (self._read_by(index, stages, k) for k in range(len(self._batches)))
        for batch, found in zip(self._batches, each_batch(call, inputs), strict=True):
            for stage, half in zip(stages, found, strict=True):
                sums[stage] = sums[stage].plus(batch, half)
        for stage, heard in sums.items():
            name = own[stage[0]].name
            for each in heard:
                if not np.isfinite(each.half).all():
                    raise NonFiniteError(
                        f"`{name}` reads NaN, infinity or numbers beyond 1e19 in the "
                        "calibration text. Repair the checkpoint, use the tokenizer of "
                        "the model, or leave the layer out."
                    )
        # One after the other, sums of twice their size being let go.
        return {stage: sums.pop(stage).mean() for stage in list(sums)}

    def _read_by(
        self, index: int, stages: Sequence[Stage], batch: int
    ) -> tuple[Any, ...]:
        """What the sums of a batch are made from."""
        weights = None
        if self._weights is not None:
            weights = [self._weights[index][stage[0]][batch] for stage in stages]
        full = None if self._full is None else self._full[batch]
        return self._batches[batch].tokens, self._hidden[batch], weights, full

    def _coded(
        self,
        choice: Choice,
        heard: "_MeanHeard",
        outputs: Float[Array, "n n"] | None,
    ) -> QuantizedTensor:
        config = choice.config
        assert config is not None, "only layers that were chosen"
        found: list[CalibrationReport] = []

        def coded() -> tuple[QuantizedTensor, QuantizationReport]:
            key = path_key(self._root, choice.path)
            tensor, report, calibrated = _best_code(
                self._layers.kernel(choice), config, key, choice.name, heard,
                self._calibration.dampings, outputs,
            )  # fmt: skip
            found.append(calibrated)
            return tensor, report

        with self._watch.phase("coding"):
            tensor, report = reported(choice.path, config, coded)
        phases, compilation = self._watch.lap()
        seconds = CalibrationSeconds(
            phases.get("statistics", 0.0), phases["coding"], compilation
        )
        report = report._replace(calibration=found[0], calibration_seconds=seconds)
        self._layers.keep(choice, tensor, report)
        return tensor


class _Reached(NamedTuple):
    """Layers of a block that it calls: by what they read, and by path within it."""

    stages: list[Stage]
    choices: dict[str, Choice]


class _Heard(NamedTuple):
    # Moments of an input, in windows to learn from and in those that are held out.
    learned: Moments
    held_out: Moments

    @classmethod
    def none(cls, inputs: int) -> "_Heard":
        return cls(Moments.none(inputs), Moments.none(inputs))

    def plus(self, batch: Batch, half: Float[Array, "r c"]) -> "_Heard":
        tokens = batch.size
        if batch.is_held_out:
            return self._replace(held_out=self.held_out.plus(half, tokens))
        return self._replace(learned=self.learned.plus(half, tokens))

    def mean(self) -> "_MeanHeard":
        # What is lost is compared with what there was: units do not matter.
        return _MeanHeard(*(each.of_unit_size().mean() for each in self))


class _MeanHeard(NamedTuple):
    # Halves, made whole one at a time and only while they are needed.
    learned: MeanMoments
    held_out: MeanMoments


def _best_code(
    weight: Float[Array, "m n"],
    config: Method,
    key: Key[Array, ""],
    name: str,
    heard: _MeanHeard,
    dampings: Sequence[float],
    outputs: Float[Array, "n n"] | None,
) -> tuple[QuantizedTensor, QuantizationReport, CalibrationReport]:
    """The best code of a matrix by its outputs in what was held out."""
    m = weight.shape[0]
    free, report = quantize_stack(weight, config, key, path=name)
    # Squares of large weights leave float32, and what becomes of them is NaN.
    unit = jnp.maximum(jnp.max(jnp.abs(weight.astype(jnp.float32))), 1e-30)
    target = weight
    if heard.learned.inputs > m:
        both = heard.learned.whole(), heard.held_out.whole()
        target = jax.block_until_ready(asymmetric_target(weight, *both))
        del both

    def loss(tensor: QuantizedTensor | None = None) -> float:
        found = output_loss(weight, heard.held_out.whole(), tensor, unit, outputs)
        # Rounding may leave a little less than nothing.
        return max(float(found), 0.0)

    whole = loss()
    if not whole > 0:
        # The layer reads or gives zeros: there is nothing to measure a loss by.
        return free, report, CalibrationReport(0.0, 0.0, None)
    without = least = loss(free) / whole
    best, chosen = free, None
    for damping in dampings:
        # Few values, of which nothing is lost.
        if without <= 1e-9:
            break
        moments = damped_in_place(heard.learned.whole()[:m, :m], damping)
        if outputs is None:
            tensor = config.with_feedback(target, free, moments)
        else:
            g = damped(outputs, _OUTPUT_DAMPING)
            tensor = config.with_feedback_of_both_sides(target, free, moments, g)
        jax.block_until_ready(tensor)
        del moments
        # NaN, of moments that are singular in float32, is not less.
        error = loss(tensor) / whole
        if error < least:
            best, least, chosen = tensor, error, damping
    report = report._replace(relative_squared_error=weight_error(weight, best))
    return best, report, CalibrationReport(least, without, chosen)


def _is_linear(block: nnx.Module, path: str) -> bool:
    node = at_path(block, path)
    return type(node) is nnx.Linear and node.kernel.get_value().ndim == 2


def _put_kernel(block: nnx.Module, path: str, tensor: QuantizedTensor) -> None:
    kernel = at_path(block, path).kernel
    kernel.set_value(dequantize(tensor, kernel.get_value().dtype))
