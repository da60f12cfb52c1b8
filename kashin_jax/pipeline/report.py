"""What quantizing the layers of a model lost and took, and which of them stand out."""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.io import atomic_path
from kashin_jax.methods import Method, config_from_json, config_to_json
from kashin_jax.pipeline.plan import method_name
from kashin_jax.pipeline.table import aligned

__all__ = [
    "REPORT_NAME",
    "CalibrationReport",
    "CalibrationSeconds",
    "LayerReport",
    "calibration_seconds",
    "kept_without",
    "outliers",
    "read_report",
    "report_table",
    "warn_of_outliers",
    "write_report",
]

REPORT_NAME = "quantization_report.jsonl"
"""The file of a quantized checkpoint that holds a report per line."""

# Iglewicz and Hoaglin's limit for a modified z-score.
_LIMIT = 3.5
# Least spread of log errors that counts: layers of equal shape differ by 1 % or so, and
# one that is 1.1 times worse than they is no outlier.
_SPREAD = 0.02
# Relative error of a layer of which little is left.
_DESTROYED = 0.5
# Fewer layers than this have no spread to speak of.
_FEWEST = 5

# Of a decomposition, what a file says: the largest of all blocks.
_LARGEST = ("residual", "max_u", "max_v", "num_steps")
# All that is no field of the method in a line of the file.
_FIELDS = frozenset({
    "tensor", "path", "shape", "stored_bits_per_weight", "relative_squared_error",
    "converged", "seconds", "calibration", "calibration_seconds", *_LARGEST,
})  # fmt: skip
# Deep nesting ends in a RecursionError, a huge integer in an OverflowError.
_FAULTS = (OSError, ValueError, LookupError, TypeError, RecursionError, OverflowError)

_logger = logging.getLogger(__name__)


class CalibrationReport(NamedTuple):
    """What a layer's outputs lose on text that was held out.

    Attributes:
      output_error: `|x (W - W_q)|^2 / |x W|^2`, summed over tokens: of what was kept.
      data_free_error: The same of the code without calibration.
      damping: Share of the mean second moment that was added to all; None where the
        code without calibration lost no more, and was kept.
    """

    output_error: float
    data_free_error: float
    damping: float | None


class CalibrationSeconds(NamedTuple):
    """Seconds that a calibrated layer took, or all of them, by what was done.

    Attributes:
      statistics: Passes over the text since the layer before it was coded, those that
        weigh tokens included.
      coding: Without data and with it, and measuring what is lost.
      compilation: Tracing and compiling programs for either, which is in neither.
    """

    statistics: float
    coding: float
    compilation: float


class LayerReport(NamedTuple):
    """Error, stored bits and time of one quantized matrix, or a stack of them.

    Attributes:
      relative_squared_error: `|W - W_q|^2 / |W|^2`, measured on what is stored; the
        mean over a stack.
      decomposition: Residuals, steps and verdicts of the Kashin coder, those of all
        blocks or, read from a file, the worst; None for the other methods.
      shape: Shape of the matrix, after the axes of the stack.
      config: The method; None where the caller's own function chose it, or this program
        does not know it.
      stored_bits: What the packed matrix takes.
      seconds: Wall-clock time of coding, compilation included; None where nobody kept
        them.
      worst_squared_error: The largest of a stack; None for a single matrix.
      path: Path of the layer.
      calibration: What the outputs lose; None without calibration.
      calibration_seconds: How long that took; None without, and where nobody kept them.
    """

    relative_squared_error: Float[Array, ""] | float
    decomposition: Mapping[str, Any] | None
    shape: tuple[int, ...]
    config: Method | None
    stored_bits: int
    seconds: float | None
    worst_squared_error: Float[Array, ""] | None = None
    path: str = ""
    calibration: CalibrationReport | None = None
    calibration_seconds: CalibrationSeconds | None = None

    @property
    def relative_error(self) -> float:
        """The relative error `|W - W_q| / |W|`, in Frobenius norms."""
        return math.sqrt(float(self.relative_squared_error))

    @property
    def lost(self) -> float:
        """The relative error of the outputs where it is known, else of the weights."""
        if self.calibration is None:
            return self.relative_error
        return math.sqrt(max(self.calibration.output_error, 0.0))

    @property
    def bits_per_weight(self) -> float:
        return self.stored_bits / math.prod(self.shape)

    @property
    def residual(self) -> float | None:
        """Largest relative residual of any block's decomposition, if there is one."""
        return self._largest("residual")

    @property
    def converged(self) -> bool | None:
        """Whether every block's decomposition met its tolerance, if there is one."""
        if self.decomposition is None:
            return None
        return bool(np.all(np.asarray(self.decomposition["converged"])))

    @property
    def linf_levels(self) -> tuple[float, float] | None:
        """Largest entries of u and v in any block: sqrt(N) |u|_inf / |x|_2."""
        u, v = self._largest("max_u"), self._largest("max_v")
        return None if u is None or v is None else (u, v)

    def summary(self) -> "LayerReport":
        """The report with the worst of all blocks in place of arrays over blocks."""
        if self.decomposition is None:
            return self
        worst: dict[str, Any] = {name: self._largest(name) for name in _LARGEST}
        return self._replace(decomposition=worst | {"converged": self.converged})

    def to_json(self) -> dict[str, Any]:
        """A line of the file without the name of the tensor.

        Seconds are left out: equal runs write equal bytes.
        """
        method = {} if self.config is None else config_to_json(self.config)
        record = {
            "path": self.path,
            "shape": list(self.shape),
            **method,
            "stored_bits_per_weight": self.bits_per_weight,
            "relative_squared_error": float(self.relative_squared_error),
        }
        if self.calibration is not None:
            record["calibration"] = self.calibration._asdict()
        return record | dict(self.summary().decomposition or {})

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "LayerReport":
        """Inverts `to_json`; takes what `seconds_to_json` gives, too.

        Raises:
          ValueError, LookupError, TypeError: If the record is damaged.
        """
        shape = tuple(int(size) for size in record["shape"])
        method = {k: v for k, v in record.items() if k not in _FIELDS}
        calibrated = record.get("calibration")
        decomposition = None
        if "converged" in record:
            decomposition = {name: float(record[name]) for name in _LARGEST}
            decomposition["converged"] = bool(record["converged"])
        return cls(
            relative_squared_error=float(record["relative_squared_error"]),
            decomposition=decomposition,
            shape=shape,
            config=_known_method(method),
            stored_bits=round(record["stored_bits_per_weight"] * math.prod(shape)),
            seconds=None,
            path=str(record["path"]),
            calibration=None if calibrated is None else CalibrationReport(**calibrated),
        ).with_seconds(record)

    def seconds_to_json(self) -> dict[str, Any]:
        """What equal runs differ in."""
        record: dict[str, Any] = {"seconds": self.seconds}
        if self.calibration_seconds is not None:
            record["calibration_seconds"] = self.calibration_seconds._asdict()
        return record

    def with_seconds(self, record: Mapping[str, Any]) -> "LayerReport":
        """With what `seconds_to_json` gave; None where it is missing."""
        seconds, parts = record.get("seconds"), record.get("calibration_seconds")
        return self._replace(
            seconds=None if seconds is None else float(seconds),
            calibration_seconds=None if parts is None else CalibrationSeconds(**parts),
        )

    def _largest(self, name: str) -> float | None:
        if self.decomposition is None or name not in self.decomposition:
            return None
        return float(np.max(np.asarray(self.decomposition[name])))


def _known_method(fields: Mapping[str, Any]) -> Method | None:
    """The method; None for one that only the program knew that wrote the file."""
    try:
        return config_from_json(fields) if fields else None
    except UsageError:
        return None


def write_report(
    path: Path, reports: Mapping[str, LayerReport], *, with_seconds: bool = False
) -> None:
    """Writes a line for every tensor, durably and in one step.

    Raises:
      CheckpointError: If the file cannot be written.
    """
    with atomic_path(path) as temporary:
        lines = []
        for name, report in reports.items():
            seconds = report.seconds_to_json() if with_seconds else {}
            lines.append(json.dumps({"tensor": name, **report.to_json(), **seconds}))
        temporary.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def read_report(path: Path) -> dict[str, LayerReport]:
    """The reports of a file by the name of their tensor.

    Raises:
      CheckpointError: If the file is missing or damaged.
    """
    try:
        found = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        return {str(each["tensor"]): LayerReport.from_json(each) for each in found}
    except _FAULTS as error:
        raise CheckpointError(
            f"{path}: is missing or damaged ({type(error).__name__}); remove it, or "
            "quantize the original again."
        ) from error


def outliers(reports: Mapping[str, LayerReport]) -> list[str]:
    """Paths of layers that lost much more than others quantized alike.

    Among layers of one method and width, those whose log relative error lies more than
    3.5 modified z-scores, .6745 (x - median) / MAD, above the median. The MAD counts as
    .02 at least, and groups of fewer than five layers have no outliers. Nor do layers
    that were coded with calibration, whose weights may differ for their outputs' sake.

    References:
      Iglewicz and Hoaglin, "How to detect and handle outliers" (1993).
    """
    groups: dict[Any, dict[str, float]] = {}
    for path, report in reports.items():
        if report.calibration is None and (error := report.relative_error) > 0:
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


def destroyed(reports: Mapping[str, LayerReport]) -> list[str]:
    """Paths of layers of which more than half is lost, see `LayerReport.lost`."""
    return [path for path, each in reports.items() if each.lost > _DESTROYED]


def warn_of_outliers(reports: Mapping[str, LayerReport]) -> None:
    """Logs warnings that name destroyed layers and outliers, worst first."""
    if lost := destroyed(reports):
        _logger.warning(
            "%d of %d layers are lost, with relative errors above %g: %s. Give them "
            "another method by a rule, or leave them out.",
            len(lost), len(reports), _DESTROYED,
            _worst_first(reports, lost),
        )  # fmt: skip
    if worse := outliers(reports):
        _logger.warning(
            "%d of %d layers lost much more than others of their method: %s. Give them "
            "more bits by a rule, or leave them out.",
            len(worse), len(reports), _worst_first(reports, worse),
        )  # fmt: skip


def _worst_first(reports: Mapping[str, LayerReport], paths: list[str]) -> str:
    ordered = sorted(paths, key=lambda path: -reports[path].lost)
    return ", ".join(f"{p} ({reports[p].lost:.3g})" for p in ordered)


def kept_without(reports: Mapping[str, LayerReport]) -> list[str]:
    """Names of layers that calibration did no good: none lose less by it."""
    return [
        path
        for path, each in reports.items()
        if each.calibration is not None and each.calibration.damping is None
    ]


def calibration_seconds(
    reports: Mapping[str, LayerReport],
) -> CalibrationSeconds | None:
    """Seconds of all layers that were calibrated; None if none was."""
    each = [r.calibration_seconds for r in reports.values() if r.calibration_seconds]
    return CalibrationSeconds(*map(sum, zip(*each, strict=True))) if each else None


def report_table(reports: Mapping[str, LayerReport]) -> str:
    """A line for every layer, and one for all of them."""
    header = (
        "layer", "method", "error", "residual", "max u", "max v", "outputs", "bits", "s"
    )  # fmt: skip
    rows = [_row(path, report) for path, report in reports.items()]
    bits = sum(report.stored_bits for report in reports.values())
    weights = sum(math.prod(report.shape) for report in reports.values())
    seconds = sum(report.seconds or 0.0 for report in reports.values())
    total = (f"{len(rows)} layers", "", "", "", "", "", "")
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
        "" if report.calibration is None else f"{report.lost:.3g}",
        f"{report.bits_per_weight:.3f}",
        "" if report.seconds is None else f"{report.seconds:.1f}",
    )


def _kind(report: LayerReport) -> Any:
    # A caller's own function may mix methods; stored bits tell widths apart at least.
    return report.config or round(report.bits_per_weight)
