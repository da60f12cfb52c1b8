"""Curves of quality against depth, and where more depth stops helping."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from experiments.common.tables import Record, fixed
from experiments.depth.points import RTOL, STEPS

__all__ = [
    "AXES",
    "ENOUGH_WITHIN",
    "METRICS",
    "Axis",
    "Curve",
    "CurvePoint",
    "Metric",
    "curves",
    "reference",
]

ENOUGH_WITHIN = 0.01
"""Share of the best value within which another one counts as good as the best."""


class Metric(NamedTuple):
    """What is measured.

    Attributes:
      title: Label of an axis.
      name: Heading of a column.
      show: Makes a table cell of a value.
      is_score: Whether more is better.
    """

    title: str
    name: str
    show: Callable[[float], str]
    is_score: bool = False


METRICS: Mapping[str, Metric] = MappingProxyType({
    "error": Metric("relative squared error\nof the weights", "error", fixed(5)),
    "perplexity": Metric("perplexity per token", "perplexity", fixed(2)),
    "glue": Metric("mean task score, percent", "tasks", fixed(2), is_score=True),
})  # fmt: skip


class Axis(NamedTuple):
    """What limits the depth.

    Attributes:
      field: Of the records.
      title: Label of the axis.
      show: Makes text of a value.
      falls: Whether smaller values mean more steps.
    """

    field: str
    title: str
    show: Callable[[float], str]
    falls: bool = False


AXES: Mapping[str, Axis] = MappingProxyType({
    STEPS: Axis("max_steps", "greedy steps", "{:g}".format),
    RTOL: Axis("rtol", "relative residual at which the steps end", "{:g}".format, True),
})  # fmt: skip


class CurvePoint(NamedTuple):
    """Mean over seeds at one depth; the spread is a standard deviation, 0 for one."""

    x: float
    mean: float
    spread: float


class Curve(NamedTuple):
    """One metric at one width against depth, from shallow to deep."""

    metric: str
    axis: str
    bits: int
    points: tuple[CurvePoint, ...]

    @property
    def best(self) -> CurvePoint | None:
        """The best mean, of equals the shallowest; None if no mean is finite."""
        finite = [point for point in self.points if math.isfinite(point.mean)]
        return min(finite, key=lambda point: self._loss(point.mean), default=None)

    @property
    def enough(self) -> CurvePoint | None:
        """The shallowest point that is as good as the best: more does not help.

        As good is who is worse by no more than the spread over seeds at the best
        point, or by no more than 1 % of its value. The best of many noisy points is
        somewhat too good, so with one seed the mark may stand too deep.
        """
        best = self.best
        if best is None:
            return None
        allowed = max(best.spread, ENOUGH_WITHIN * abs(best.mean))
        return next(
            point
            for point in self.points
            if self._loss(point.mean) - self._loss(best.mean) <= allowed
        )

    def _loss(self, value: float) -> float:
        return -value if METRICS[self.metric].is_score else value


def curves(records: Sequence[Record]) -> list[Curve]:
    """The curves of some records, by metric, axis and width in a fixed order."""
    groups: dict[tuple[str, str, int], dict[float, list[float]]] = {}
    for record in records:
        if record["axis"] is not None:
            key = record["metric"], record["axis"], record["bits"]
            x = record[AXES[record["axis"]].field]
            groups.setdefault(key, {}).setdefault(x, []).append(record["value"])
    order = [list(METRICS), list(AXES)]
    keys = sorted(groups, key=lambda k: (order[0].index(k[0]), order[1].index(k[1]), k))
    return [
        Curve(metric, axis, bits, tuple(
            _point(x, groups[metric, axis, bits][x])
            for x in sorted(groups[metric, axis, bits], reverse=AXES[axis].falls)
        ))
        for metric, axis, bits in keys
    ]  # fmt: skip


def _point(x: float, values: Sequence[float]) -> CurvePoint:
    # `statistics` refuses infinities.
    if not all(map(math.isfinite, values)):
        return CurvePoint(x, sum(values), 0.0)
    spread = statistics.stdev(values) if values[1:] else 0.0
    return CurvePoint(x, statistics.fmean(values), spread)


def reference(records: Sequence[Record], metric: str) -> float | None:
    """The value of a metric in full precision; None where there is none."""
    found = [r["value"] for r in records if r["axis"] is None and r["metric"] == metric]
    return found[0] if found else None
