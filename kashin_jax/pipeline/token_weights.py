"""What each token weighs in the moments of each layer: by the gradient of the loss.

An error in a layer's outputs changes the loss as far as the loss depends on them there.
To second order, with the Fisher information in place of the Hessian and one number for
all outputs of a layer, an error e of the outputs at a token costs g^2 |e|^2, where g^2
is the mean square of the gradient with respect to these outputs, and so the moments of
a layer's inputs are E[g^2 x x^T].

References:
  Kim et al., "GuidedQuant: large language model quantization via exploiting end loss
  guidance" (2025), arXiv:2505.07004, which takes the text's own tokens and may have a
  number for each of several groups of outputs.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Key

from kashin_jax.errors import NonFiniteError
from kashin_jax.pipeline.blocks import BlockRunner
from kashin_jax.pipeline.gradients import NOT_FINITE, Measure, layer_gradients
from kashin_jax.pipeline.hidden_states import HELD_BYTES

__all__ = ["TokenWeights", "gradient_weights"]

TokenWeights = Mapping[str, Sequence[Float32[np.ndarray, "*b"]]]
"""For every layer of a block an array for each batch, which together have mean 1."""


def gradient_weights(
    runner: BlockRunner,
    wanted: Sequence[Sequence[str]],
    batches: Sequence[Int32[np.ndarray, "b t"]],
    key: Key[Array, ""],
    held_bytes: int = HELD_BYTES,
) -> list[TokenWeights]:
    """Weights of tokens in full precision; held beside what `layer_gradients` holds.

    Args:
      runner: Of the model.
      wanted: Paths of layers within each block.
      batches: Token ids.
      key: Of the tokens drawn from the model's predictions; folded with the number of
        the window.
      held_bytes: Most bytes of hidden states in memory.

    Raises:
      NonFiniteError: If a gradient is NaN or infinity; names the layer.
    """
    found: list[dict[str, list[np.ndarray]]] = [{} for _ in wanted]
    for block, squares in layer_gradients(
        runner, wanted, batches, key, Measure.SQUARES, held_bytes
    ):
        for path, square in squares.items():
            found[block].setdefault(path, []).append(np.asarray(square))
    return [
        {
            path: _of_mean_one(f"{runner.path}/{index}/{path}", squares)
            for path, squares in layers.items()
        }
        for index, layers in enumerate(found)
    ]


def _of_mean_one(
    path: str, squares: Sequence[Float[np.ndarray, "*b"]]
) -> list[Float32[np.ndarray, "*b"]]:
    mean = float(np.mean([np.mean(each, dtype=np.float64) for each in squares]))
    if not np.isfinite(mean):
        raise NonFiniteError(NOT_FINITE.format(path))
    if not mean > 0:
        # The loss does not depend on the layer: no token matters more than another.
        return [np.ones_like(each) for each in squares]
    # Wider: float32 may not have so small a mean.
    return [(each.astype(np.float64) / mean).astype(np.float32) for each in squares]
