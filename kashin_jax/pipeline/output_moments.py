"""How outputs of a layer matter: second moments of the loss's gradient there.

An error e of a layer's outputs at a token changes the loss by about (g^T e)^2 / 2, g
being the gradient of the loss with respect to these outputs. With e = E^T x, and x and
g taken for independent, its mean is tr(G E^T H E), H = E[x x^T] and G = E[g g^T]: the
Fisher information of the layer's weights as a Kronecker product.

References:
  Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate
  curvature" (2015), arXiv:1503.05671. Tseng, Sun and De Sa, "Model-preserving adaptive
  rounding" (2025), arXiv:2505.22988, whose method is YAQA; its factors are those of a
  better product, from more than one pass.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Key

from kashin_jax.errors import NonFiniteError
from kashin_jax.pipeline.blocks import BlockRunner
from kashin_jax.pipeline.gradients import NOT_FINITE, Measure, layer_gradients
from kashin_jax.pipeline.hidden_states import HELD_BYTES, HiddenStates
from kashin_jax.pipeline.moments import MeanMoments

__all__ = ["OutputMoments"]

# Gradients of so many tokens, of the first windows, tell how outputs matter: a few
# times the outputs of a layer are enough, and a backward pass costs two forward.
_TOKENS = 32_768


class OutputMoments:
    """G of every layer, its symmetric half; in memory, beyond a bound on disk."""

    def __init__(
        self,
        runner: BlockRunner,
        wanted: Sequence[Sequence[str]],
        batches: Sequence[Int32[np.ndarray, "b t"]],
        key: Key[Array, ""],
        held_bytes: int = HELD_BYTES,
    ) -> None:
        """Sums over as many of the first batches as have some 30,000 tokens.

        Args:
          runner: Of the model, in full precision.
          wanted: Paths of layers within each block.
          batches: Token ids.
          key: Of the tokens drawn from the model's predictions.
          held_bytes: Most bytes in memory.
        """
        self._path = runner.path
        self._halves = HiddenStates(held_bytes)
        self._index: dict[tuple[int, str], int] = {}
        count = max(1, _TOKENS // batches[0].size)
        found = layer_gradients(
            runner, wanted, batches[:count], key, Measure.MOMENTS, held_bytes
        )
        for block, measured in found:
            for path, half in measured.items():
                self._add((block, path), np.asarray(half))

    def _add(self, layer: tuple[int, str], half: Float32[np.ndarray, "r c"]) -> None:
        if layer in self._index:
            k = self._index[layer]
            self._halves[k] = self._halves[k] + half
        else:
            self._index[layer] = len(self._halves)
            self._halves.append(half)

    def close(self) -> None:
        """Forgets all of them."""
        self._halves.close()

    def of(self, block: int, path: str, outputs: int) -> Float[Array, "n n"]:
        """G of a layer over the mean of its diagonal; the identity where all is zero.

        Args:
          block: Index of the block.
          path: Of the layer within it.
          outputs: How many it has.

        Raises:
          NonFiniteError: If a gradient is NaN or infinity; names the layer.
        """
        whole = MeanMoments(self._halves[self._index[block, path]], outputs).whole()
        mean = jnp.mean(jnp.diagonal(whole))
        if not jnp.isfinite(mean):
            raise NonFiniteError(NOT_FINITE.format(f"{self._path}/{block}/{path}"))
        return whole / mean if mean > 0 else jnp.eye(outputs)
