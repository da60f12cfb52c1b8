"""Quantizing the chosen matrices of a model, one after the other."""

import math
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from kashin_jax.methods import Method, QuantizationReport, quantize_stack
from kashin_jax.methods.base import is_traced
from kashin_jax.pipeline.plan import Choice
from kashin_jax.pipeline.report import LayerReport, warn_of_outliers
from kashin_jax.pipeline.rules import Rules
from kashin_jax.pipeline.sharing import InputScales, find_groups, layer_key
from kashin_jax.progress import progress_bar
from kashin_jax.tensors import QuantizedTensor

__all__ = ["Coded", "LayerQuantizer", "quantize_each", "reported"]

Coded = tuple[QuantizedTensor, QuantizationReport]


class LayerQuantizer:
    """Quantizes any chosen matrix of a model with its key and shared scale.

    The result depends on the root key, the matrix, its path and the matrices that it
    shares a scale with, not on what was quantized before: an interrupted run may go on
    with any of them.
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        rules: Rules | None,
        root: Key[Array, ""],
        kernel: Callable[[Choice], Array],
    ) -> None:
        """Quantizes nothing yet.

        Args:
          choices: All of the model.
          rules: Rules that made the choices; None if no layers share their inputs.
          root: Folded with every path.
          kernel: Gives a matrix as `[in, out]`. It is not kept.
        """
        self._root, self._kernel = root, kernel
        self._groups = find_groups(choices, rules)
        self._scales = InputScales(self._groups, kernel)

    def __call__(self, choice: Choice) -> tuple[QuantizedTensor, LayerReport]:
        """The packed matrix, and what it lost and took.

        Raises:
          NonFiniteError: If the matrix, or one that it shares a scale with, holds NaN
            or infinity; names it.
        """
        config = choice.config
        assert config is not None, "only matrices that were chosen are quantized"

        def coded() -> Coded:
            # First, and alone in memory: others of its group are read for it.
            scale = self._scales(choice.path)
            return quantize_stack(
                self._kernel(choice),
                config,
                layer_key(self._root, choice.path, self._groups),
                path=choice.name,
                in_scale=scale,
                few_values=choice.path not in self._groups,
            )

        return reported(choice.path, config, coded)


def reported(
    path: str, config: Method | None, coded: Callable[[], Coded]
) -> tuple[QuantizedTensor, LayerReport]:
    """The packed matrix that a function returns, and what it lost and took."""
    start = time.perf_counter()
    tensor, report = jax.block_until_ready(coded())
    seconds = time.perf_counter() - start
    errors = report.relative_squared_error
    worst = None if errors.ndim == 0 else jnp.max(errors)
    return tensor, LayerReport(
        errors if worst is None else jnp.mean(errors), report.decomposition,
        tensor.full_shape, config, tensor.stored_bits, seconds, worst, path,
    )  # fmt: skip


def quantize_each(
    choices: Sequence[Choice],
    quantizer: Callable[[Choice], tuple[QuantizedTensor, LayerReport]],
    put: Callable[[Choice, QuantizedTensor], None],
) -> dict[str, LayerReport]:
    """Quantizes the chosen matrices of a model in memory, with a progress bar.

    Layers that lost much more than others are named in a logged warning.

    Args:
      choices: All of the model; those without a method are passed over.
      quantizer: Gives the packed matrix and its report.
      put: Takes the packed matrix before the next one is quantized.

    Returns:
      Reports by path.
    """
    chosen = [choice for choice in choices if choice.config is not None]
    reports = {}
    sizes = {choice.path: math.prod(choice.candidate.shape) for choice in chosen}
    with progress_bar(sum(sizes.values()), "weights") as progress:
        for choice in chosen:
            progress.set_postfix_str(choice.path)
            tensor, reports[choice.path] = quantizer(choice)
            put(choice, tensor)
            del tensor
            progress.update(sizes[choice.path])
    if not any(is_traced(each.relative_squared_error) for each in reports.values()):
        warn_of_outliers(reports)
    return reports
