"""Gradients of a language model's loss at the outputs of its layers, batch by batch.

The loss is that against next tokens which the model itself predicts, drawn at random:
its gradients are those of the Fisher information. That against the tokens of the text
gives those of the "empirical" one, where what the model predicts badly weighs most.
"""

import contextlib
import enum
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32, Key

from kashin_jax.errors import UsageError
from kashin_jax.pipeline.blocks import BlockRunner
from kashin_jax.pipeline.hidden_states import HELD_BYTES, HiddenStates
from kashin_jax.pipeline.moments import half_moments
from kashin_jax.pipeline.passes import Program, call_model, on_device, run_block
from kashin_jax.pipeline.paths import at_path, put_at_path
from kashin_jax.pipeline.stand_ins import Ear

__all__ = ["NOT_FINITE", "LayerGradients", "Measure", "layer_gradients"]

NOT_FINITE = (
    "`{}`: the gradient of the loss with respect to its outputs is NaN or infinity in "
    "the calibration text. Leave weighting by it out, or repair the checkpoint."
)
"""Of a layer's path: what is wrong, and what to do."""


class Measure(enum.Enum):
    """What is taken of the gradient with respect to a layer's outputs."""

    SQUARES = "squares"
    """Its mean square, for every token."""
    MOMENTS = "moments"
    """The half of the sum of g g^T over tokens, as `half_moments` has it."""


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

    Raises:
      UsageError: If the model does not give logits `[b, t, v]`.
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
                _loss_gradient(
                    runner.shell,
                    runner.path,
                    runner.state,
                    on_device(tokens[i : i + 1]),
                    x[i : i + 1],
                    jax.random.fold_in(key, windows + i),
                )
                for i in range(len(tokens))
            ]
            gradient = jnp.concatenate(parts)
            windows += len(tokens)
            for index in reversed(range(len(held))):
                graphdef, state = nnx.split(runner.blocks[index])
                gradient, measured = _pulled_back(
                    runner.program(index, graphdef, tuple(wanted[index])), measure,
                    runner.state, state, on_device(tokens), held.pop(), gradient,
                )  # fmt: skip
                yield LayerGradients(index, measured)


@partial(jax.jit, static_argnums=(0, 1))
def _loss_gradient(
    graphdef: Any, path: str, state: Any, tokens: Any, x: Any, key: Key[Array, ""]
) -> Float[Array, "b t d"]:
    """That of the loss, summed over tokens, for what the last block gives."""

    def loss(x: Array) -> Array:
        model = nnx.merge(graphdef, state)
        *_, last = at_path(model, path)
        last.give = lambda: x
        logits = call_model(model, tokens)
        if logits.ndim != 3:
            raise UsageError(
                "`weighting` by gradients is for models that predict a next token for "
                f"every token, and this one gives an array of shape {logits.shape}. "
                "Leave it out."
            )
        # Nothing follows on the last token of a window.
        scores = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
        drawn = jax.random.categorical(key, jax.lax.stop_gradient(scores))
        return -jnp.sum(jnp.take_along_axis(scores, drawn[..., None], axis=-1))

    return jax.grad(loss)(x)


@partial(jax.jit, static_argnums=(0, 1))
def _pulled_back(
    program: Program,
    measure: Measure,
    shell: Any,
    state: Any,
    tokens: Any,
    x: Any,
    gradient: Array,
) -> tuple[Float[Array, "b t d"], dict[str, Float[Array, "..."]]]:
    """The gradient in front of a block, and what is measured at its layers."""

    def run(x: Array, extra: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        block = nnx.merge(program.block, state)
        given: dict[str, Array] = {}

        def change(path: str, y: Array) -> Array:
            given[path] = y
            return y + extra[path] if path in extra else y

        for path in program.wanted:
            put_at_path(block, path, Ear(path, at_path(block, path), change=change))
        return run_block(program, shell, block, tokens, x), given

    # Zeros that are added to outputs: their gradients are those of the outputs.
    outputs = jax.eval_shape(lambda x: run(x, {})[1], x)
    zeros = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), outputs)
    _, pull = jax.vjp(lambda x, extra: run(x, extra)[0], x, zeros)
    before, gradients = pull(gradient)
    take = half_moments if measure is Measure.MOMENTS else _mean_squares
    return before, {path: take(each) for path, each in gradients.items()}


def _mean_squares(gradient: Float[Array, "*b n"]) -> Float[Array, "*b"]:
    return jnp.mean(jnp.square(gradient.astype(jnp.float32)), axis=-1)
