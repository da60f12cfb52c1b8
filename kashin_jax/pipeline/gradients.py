"""Gradients of a language model's loss at the outputs of its layers, batch by batch.

The loss is that against next tokens which the model itself predicts, drawn at random:
its gradients are those of the Fisher information. That against the tokens of the text
gives those of the "empirical" one, where what the model predicts badly weighs most.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Key

from kashin_jax.pipeline.blocks import BlockRunner, Measure
from kashin_jax.pipeline.hidden_states import HELD_BYTES, HiddenStates

__all__ = ["NOT_FINITE", "LayerGradients", "layer_gradients"]

NOT_FINITE = (
    "`{}`: the gradient of the loss with respect to its outputs is NaN or infinity in "
    "the calibration text. Leave weighting by it out, or repair the checkpoint."
)
"""Of a layer's path: what is wrong, and what to do."""


class LayerGradients(NamedTuple):
    """What was measured of the gradients at layers of a block, in one batch.

    Attributes:
      block: Index of the block.
      measured: By path within the block; layers that were not called are not there.
    """

    block: int
    measured: dict[str, Float[Array, "..."]]


def layer_gradients(
    runner: BlockRunner,
    wanted: Sequence[Sequence[str]],
    batches: Sequence[Int32[np.ndarray, "b t"]],
    key: Key[Array, ""],
    measure: Measure,
    held_bytes: int = HELD_BYTES,
) -> Iterator[LayerGradients]:
    """One backward pass through each batch, in full precision, from the last block on.

    What is held: hidden states of one batch in front of every block, on the host and
    beyond a bound on disk, the gradients of one block's layers while they are measured,
    and logits of one window.

    Args:
      runner: Of the model.
      wanted: Paths of layers within each block.
      batches: Token ids.
      key: Of the tokens drawn from the model's predictions; folded with the number of
        the window.
      measure: Taken of the gradient at every layer.
      held_bytes: Most bytes of hidden states in memory.
    """
    windows = 0
    with contextlib.closing(HiddenStates(held_bytes)) as held:
        for tokens in batches:
            x = runner.first(tokens)
            for index, block in enumerate(runner.blocks):
                held.append(np.asarray(x))
                x = runner.outputs(index, block, tokens, x)
            # One window at a time: logits of a large vocabulary take GBs.
            parts = [
                runner.loss_gradient(
                    tokens[i : i + 1],
                    x[i : i + 1],
                    jax.random.fold_in(key, windows + i),
                )
                for i in range(len(tokens))
            ]
            gradient = jnp.concatenate(parts)
            windows += len(tokens)
            for index in reversed(range(len(held))):
                gradient, measured = runner.pulled_back(
                    index, wanted[index], tokens, held.pop(), gradient, measure
                )
                yield LayerGradients(index, measured)
