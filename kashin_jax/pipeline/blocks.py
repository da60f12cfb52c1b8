"""A model run block by block, with an ear at the inputs of its layers."""

from collections import Counter
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from kashin_jax.errors import UsageError
from kashin_jax.pipeline.each_batch import Call
from kashin_jax.pipeline.passes import (
    Program,
    Stage,
    Tokens,
    block_outputs,
    first_states,
    heard_inputs,
    kinds_of_calls,
    on_device,
    stage_moments,
)
from kashin_jax.pipeline.paths import at_path, join, put_at_path
from kashin_jax.pipeline.stand_ins import Outline, Stop

__all__ = ["BlockRunner", "find_blocks"]


def find_blocks(model: nnx.Module, paths: Collection[str]) -> str:
    """The path of the list of blocks that most of some layers are in.

    Raises:
      UsageError: If the model has no `nnx.List` of modules that holds any.
    """
    counts = {}
    for parts, node in nnx.iter_graph(model):
        if isinstance(node, nnx.List) and len(node):
            path = join(parts)
            counts[path] = sum(each.startswith(f"{path}/") for each in paths)
    if not any(counts.values()):
        raise UsageError(
            "A model runs block by block here, and this one has no nnx.List of blocks "
            "with layers to quantize, or packed ones. Leave calibration out, or refine "
            "with `block_epochs=0`."
        )
    # Of lists within each other the outermost.
    return max(counts, key=lambda path: (counts[path], -len(path)))


class BlockRunner:
    """Runs one block of a model at a time.

    A block is called with hidden states and whatever the model hands to it, and gives
    new hidden states, alone or as the first of a tuple. Blocks of one structure that
    are called with the same, all of most models, share their compiled programs.

    Attributes:
      path: Of the list of blocks within the model.
      blocks: As they are.
      shell: Graph of the model with `Stop` in place of every block.
      state: Everything outside of the blocks.
    """

    def __init__(
        self, model: nnx.Module, blocks: str, like: Tokens | None = None
    ) -> None:
        """Runs nothing yet.

        Args:
          model: Called with token ids `[b, t]`, or with `EncoderInputs`. Not changed.
          blocks: Path of the list of its blocks.
          like: A batch, of any number of windows: what blocks are called with may
            depend on their length. None for two token ids.

        Raises:
          UsageError: If blocks are not called one after the other with nothing in
            between.
        """
        self.path = blocks
        self.blocks = list(at_path(model, blocks))
        shell = nnx.clone(model, variables=False)
        stops = [Stop(i, Outline.of(block)) for i, block in enumerate(self.blocks)]
        put_at_path(shell, blocks, nnx.List(stops))
        self.shell, self.state = nnx.split(shell)
        self._like: Any = jax.tree.map(
            lambda ids: jax.ShapeDtypeStruct((1, ids.shape[1]), jnp.int32),
            np.zeros((1, 2), np.int32) if like is None else like,
        )
        calls = jax.eval_shape(
            partial(kinds_of_calls, self.shell, blocks), self.state, self._like
        )
        # Blocks that are called with the same arrays: the first one stands for all.
        self._kinds = [int(kind.shape[0]) for kind in calls]

    def first(self, tokens: Tokens) -> Float[Array, "b t d"]:
        """Hidden states in front of the first block."""
        return self.first_call()(on_device(tokens))

    def first_call(self) -> Call:
        """As `first`, for many batches of `tokens`."""
        return Call(first_states, (self.shell, self.path), (self.state,))

    def stages(self, index: int, wanted: Collection[str]) -> list[Stage]:
        """Layers of a block by the input that they read, in the order of their calls.

        Args:
          index: Of the block.
          wanted: Paths within the block. Those that are never called are in no stage;
            nor are those called twice, which read two inputs.

        Raises:
          UsageError: If layers are called where their inputs cannot be had.
        """
        graphdef, state = nnx.split(self.blocks[index])
        found: list[Stage] = []
        first = partial(first_states, self.shell, self.path)
        x = jax.eval_shape(first, self.state, self._like)
        program = self.program(index, graphdef, tuple(sorted(wanted)))

        def listen(*arrays: Any) -> list[Array]:
            inputs, stages = heard_inputs(program, *arrays)
            found.extend(stages)
            return inputs

        jax.eval_shape(listen, self.state, state, self._like, x)
        calls = Counter(path for stage in found for path in stage)
        once = [tuple(path for path in stage if calls[path] == 1) for stage in found]
        return [stage for stage in once if stage]

    def outputs(
        self,
        index: int,
        block: nnx.Module,
        tokens: Tokens,
        x: Float[Array | np.ndarray, "b t d"],
    ) -> Float[Array, "b t d"]:
        """Hidden states behind a block, or a changed copy of it.

        Args:
          index: Of the block.
          block: It, or what stands for it.
          tokens: Of the batch.
          x: Hidden states in front of it.
        """
        return self.outputs_call(index, block)(on_device(tokens), x)

    def outputs_call(self, index: int, block: nnx.Module) -> Call:
        """As `outputs`, for many batches of `tokens, x`."""
        graphdef, state = nnx.split(block)
        return Call(
            block_outputs, (self.program(index, graphdef),), (self.state, state)
        )

    def moments_call(
        self,
        index: int,
        block: nnx.Module,
        stages: Sequence[Stage],
        original: nnx.Module | None = None,
    ) -> Call:
        """Sums of x x^T over the tokens of a batch, x the input of each stage.

        Halves of them, as `half_moments` gives. Padding, where there is a mask, counts
        nothing.

        Args:
          index: Of the block.
          block: It, or what stands for it.
          stages: From `stages`.
          original: The block in full precision, where batches have hidden states of
            that, too: sums are those of (x, d) then, d being what is missing in x of
            the same input in full precision.

        Returns:
          Called for a batch with `tokens, x, weights, full`: hidden states in front of
          the block, for each stage what every token weighs, or None, and hidden states
          in full precision, or None.

        Raises:
          UsageError: If there is a mask, and a layer's input is not `[b, t, m]`.
        """
        graphdef, state = nnx.split(block)
        wanted = tuple(stage[0] for stage in stages)
        program = self.program(index, graphdef, wanted)
        other = None if original is None else nnx.split(original)[1]
        return Call(stage_moments, (program,), (self.state, state, other))

    def program(
        self, index: int, block: Any, wanted: tuple[str, ...] = ()
    ) -> "Program":
        """What is static of a pass through a block.

        Args:
          index: Of the block.
          block: Graph of it, or of what stands for it.
          wanted: Paths within it of layers whose inputs are listened to.
        """
        return Program(self.shell, block, self.path, self._kinds[index], wanted)
