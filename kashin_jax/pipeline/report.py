"""What quantizing the layers of a model lost and took, and which of them stand out."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kashin_jax.methods import Method, QuantizationReport
from kashin_jax.methods.stacks import full_shape
from kashin_jax.pipeline.plan import method_name
from kashin_jax.pipeline.table import aligned
from kashin_jax.tensors import QuantizedTensor, stored_bits

__all__ = ["LayerReport", "outliers", "report_table", "run_layer", "warn_of_outliers"]

# Iglewicz and Hoaglin's limit for a modified z-score.
_LIMIT = 3.5
# Least spread of log errors that counts: layers of equal shape differ by 1 % or so, and
# one that is 1.1 times worse than they is no outlier.
_SPREAD = 0.02
# Fewer layers than this have no spread to speak of.
_FEWEST = 5

_logger = logging.getLogger(__name__)


class LayerReport(NamedTuple):
    """What quantizing one matrix, or a stack of them, lost and took.

    Attributes:
      relative_squared_error: `|W - W_q|^2 / |W|^2`, measured on what is stored; the
        mean over a stack.
      decomposition: Residuals, steps and verdicts of the Kashin coder; None for the
        other methods.
      shape: Of the matrix, after the axes of the stack.
      config: The method; None where the caller's own function chose it.
      stored_bits: That the packed matrix takes.
      seconds: Of wall clock, compilation included.
      worst_squared_error: The largest of a stack; None for a single matrix.
    """

    relative_squared_error: Float[Array, ""]
    decomposition: dict[str, Array] | None
    shape: tuple[int, ...]
    config: Method | None
    stored_bits: int
    seconds: float
    worst_squared_error: Float[Array, ""] | None = None

    @property
    def relative_error(self) -> float:
        """`|W - W_q| / |W|`."""
        return math.sqrt(float(self.relative_squared_error))

    @property
    def bits_per_weight(self) -> float:
        return self.stored_bits / math.prod(self.shape)

    @property
    def residual(self) -> float | None:
        """Largest relative residual of any block's decomposition, if there is one."""
        return self._largest("residual")

    @property
    def linf_levels(self) -> tuple[float, float] | None:
        """Largest entries of u and v in any block: sqrt(N) |u|_inf / |x|_2."""
        u, v = self._largest("max_u"), self._largest("max_v")
        return None if u is None or v is None else (u, v)

    def _largest(self, name: str) -> float | None:
        if self.decomposition is None or name not in self.decomposition:
            return None
        return float(np.max(np.asarray(self.decomposition[name])))


def run_layer(
    quantizer: Callable[[], tuple[QuantizedTensor, QuantizationReport]],
    config: Method | None,
) -> tuple[Any, LayerReport]:
    """The packed matrix that a function returns, and what it took."""
    start = time.perf_counter()
    tensor, report = jax.block_until_ready(quantizer())
    seconds = time.perf_counter() - start
    errors = report.relative_squared_error
    worst = None if errors.ndim == 0 else jnp.max(errors)
    return tensor, LayerReport(
        errors if worst is None else jnp.mean(errors), report.decomposition,
        full_shape(tensor), config, stored_bits(tensor), seconds, worst,
    )  # fmt: skip


def outliers(reports: Mapping[str, LayerReport]) -> list[str]:
    """Paths of layers that lost much more than others quantized alike.

    Among layers of one method and width, those whose log relative error lies more than
    3.5 modified z-scores, .6745 (x - median) / MAD, above the median. The MAD counts as
    .02 at least, and groups of fewer than five layers have no outliers.

    References:
      Iglewicz and Hoaglin, "How to detect and handle outliers" (1993).
    """
    groups: dict[Any, dict[str, float]] = {}
    for path, report in reports.items():
        if (error := report.relative_error) > 0:
            groups.setdefault(_kind(report), {})[path] = math.log(error)
    found = []
    for group in groups.values():
        if len(group) < _FEWEST:
            continue
        logs = np.array(list(group.values()))
        median = np.median(logs)
        spread = max(float(np.median(np.abs(logs - median))), _SPREAD)
        scores = 0.6745 * (logs - median) / spread
        found += [path for path, z in zip(group, scores, strict=True) if z > _LIMIT]
    return found


def warn_of_outliers(reports: Mapping[str, LayerReport]) -> None:
    """Logs a warning that names the outliers, worst first."""
    worst = sorted(outliers(reports), key=lambda path: -reports[path].relative_error)
    if worst:
        named = ", ".join(f"{p} ({reports[p].relative_error:.3g})" for p in worst)
        _logger.warning(
            "%d of %d layers lost much more than others of their method: %s. Give them "
            "more bits by a rule, or leave them out.",
            len(worst), len(reports), named,
        )  # fmt: skip


def report_table(reports: Mapping[str, LayerReport]) -> str:
    """A line for every layer, and one for all of them."""
    header = ("layer", "method", "error", "residual", "max u", "max v", "bits", "s")
    rows = [_row(path, report) for path, report in reports.items()]
    bits = sum(report.stored_bits for report in reports.values())
    weights = sum(math.prod(report.shape) for report in reports.values())
    seconds = sum(report.seconds for report in reports.values())
    total = (f"{len(rows)} layers", "", "", "", "", "")
    rows.append((*total, f"{bits / max(weights, 1):.3f}", f"{seconds:.1f}"))
    return aligned([header, *rows], left=2)


def _row(path: str, report: LayerReport) -> tuple[str, ...]:
    levels = report.linf_levels or (None, None)
    error = f"{report.relative_error:.3g}"
    if report.worst_squared_error is not None:
        error += f" (worst {math.sqrt(float(report.worst_squared_error)):.3g})"
    numbers = [report.residual, *levels]
    return (
        path,
        "" if report.config is None else method_name(report.config),
        error,
        *("" if number is None else f"{number:.3g}" for number in numbers),
        f"{report.bits_per_weight:.3f}",
        f"{report.seconds:.1f}",
    )


def _kind(report: LayerReport) -> Any:
    # A caller's own function may mix methods; stored bits tell widths apart at least.
    return report.config or round(report.bits_per_weight)
