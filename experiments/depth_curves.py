"""Quality against the depth of the decomposition: the results of `experiments.depth`.

    python -m experiments.depth_curves
    python -m experiments.depth_curves --model=facebook/opt-125m

Draws the committed records of `results/depth.jsonl` again, of the largest study of the
model and the largest of classifiers: hours of quantizing are not repeated here. The
curves, with the depths that are enough, are added to depth_curves.jsonl in `--out`, and
drawn in depth_curves.png and depth_curves.svg.

Exit code 0: done; 1: a file or its content is unusable; 2: wrong flag; 130: Ctrl-C.
"""

import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from experiments.common.figures import Artifact, ModelFigureConfig, Setting, run_figure
from experiments.common.plots import COLOURS, finish_axes, new_figure
from experiments.common.results import read_jsonl
from experiments.common.tables import Column, Record, fixed, share
from kashin_jax.errors import DataError

__all__ = [
    "AXES",
    "ENOUGH_WITHIN",
    "METRICS",
    "RTOL",
    "STEPS",
    "SUMMARY_COLUMNS",
    "Axis",
    "Curve",
    "CurvePoint",
    "Metric",
    "curves",
    "draw",
    "main",
    "make",
    "reference",
    "setting_columns",
    "setting_rows",
    "summary_rows",
    "title_of",
]

STEPS = "steps"
RTOL = "rtol"

ENOUGH_WITHIN = 0.01
"""Share of the best value within which another one counts as good as the best."""


class Metric(NamedTuple):
    """A quantity that is measured against depth.

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
    """A setting that limits the depth: steps, or a tolerance.

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

        A point is as good as the best if it is worse by no more than the spread over
        seeds at the best point, or by no more than 1 % of the value there. The best of
        many noisy points is somewhat too good, so with one seed the mark may stand too
        deep.
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


SUMMARY_COLUMNS = (
    Column("metric", "metric"),
    Column("bits", "bits"),
    Column("full", "full precision"),
    Column("steps", "enough steps"),
    Column("at_steps", "value there"),
    Column("best_steps", "best, at steps"),
    Column("deepest", "most steps"),
    Column("rtol", "enough rtol"),
    Column("at_rtol", "value there"),
    Column("best_rtol", "best, at rtol"),
)
_MEANS = (
    "stored_bits_per_weight", "steps_taken", "residual", "converged_share",
    "quantize_seconds",
)  # fmt: skip


def summary_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row per metric and width: where more depth stops helping, and what it gives.

    Values are means over seeds, with the standard deviation where there are several.
    """
    found = {(curve.metric, curve.axis, curve.bits): curve for curve in curves(records)}
    rows: list[dict[str, Any]] = []
    for metric, bits in dict.fromkeys((metric, bits) for metric, _, bits in found):
        full = reference(records, metric)
        row: dict[str, Any] = {
            "metric": METRICS[metric].name,
            "bits": bits,
            "full": None if full is None else METRICS[metric].show(full),
        }
        for axis in AXES:
            if curve := found.get((metric, axis, bits)):
                row |= _cells(curve)
        rows.append(row)
    return rows


def _cells(curve: Curve) -> dict[str, str]:
    axis, best, enough = AXES[curve.axis], curve.best, curve.enough
    if best is None or enough is None:
        return {}
    cells = {
        curve.axis: axis.show(enough.x),
        f"at_{curve.axis}": _text(curve, enough),
        f"best_{curve.axis}": f"{_text(curve, best)} at {axis.show(best.x)}",
    }
    if curve.axis == STEPS:
        last = curve.points[-1]
        cells["deepest"] = f"{_text(curve, last)} at {axis.show(last.x)}"
    return cells


def _text(curve: Curve, point: CurvePoint) -> str:
    show = METRICS[curve.metric].show
    return show(point.mean) + (f" ± {show(point.spread)}" if point.spread else "")


def setting_columns(records: Sequence[Record]) -> tuple[Column, ...]:
    """The columns of `setting_rows`."""
    metrics = [m for m in METRICS if any(r["metric"] == m for r in records)]
    return (
        Column("limit", "limit"),
        Column("bits", "bits"),
        Column("stored_bits_per_weight", "bits/weight", fixed(3)),
        Column("steps_taken", "steps", fixed(1)),
        Column("residual", "residual", "{:.2e}".format),
        Column("converged_share", "converged", share),
        *(Column(metric, METRICS[metric].name) for metric in metrics),
        Column("quantize_seconds", "seconds", fixed(1)),
    )


def setting_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row per limit and width, values as in `summary_rows`; `*` marks enough.

    Steps, residuals, sizes and seconds are those of the first metric's model.
    """
    own_curves = curves(records)
    rows = []
    for axis in (STEPS, RTOL):
        here = [curve for curve in own_curves if curve.axis == axis]
        if not here:
            continue
        places = [(point.x, c.bits) for c in here for point in c.points]
        for x, bits in sorted(
            dict.fromkeys(places),
            key=lambda place: (-place[0] if AXES[axis].falls else place[0], place[1]),
        ):
            cells = {
                curve.metric: _text(curve, point) + " *" * (point == curve.enough)
                for curve in here
                if curve.bits == bits
                for point in curve.points
                if point.x == x
            }
            rows.append({**_means(records, axis, x, bits), **cells})
    return rows


def _means(records: Sequence[Record], axis: str, x: float, bits: int) -> dict[str, Any]:
    own = [
        r
        for r in records
        if (r["axis"], r["bits"]) == (axis, bits) and r[AXES[axis].field] == x
    ]
    own = [record for record in own if record["metric"] == own[0]["metric"]]
    return {
        "limit": f"{axis} {AXES[axis].show(x)}",
        "bits": bits,
        **{name: statistics.fmean(r[name] for r in own) for name in _MEANS},
    }


_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h")
# Marks of several widths at one depth stand side by side, so many points apart.
_SHIFT = 2.2
# Curves coincide where a few steps leave fewer pairs than any codebook has: markers of
# wider codes are smaller and lie on top, so all of them are seen.
_LARGEST = 8.0
# Panels whose greatest value is so many times their least are logarithmic.
_LOG_FROM = 1.5


def title_of(records: Sequence[Record]) -> str:
    """Models, and the seeds where there are several."""
    models = ", ".join(dict.fromkeys(record["model"] for record in records))
    seeds = {record["seed"] for record in records} - {None}
    spread = f", mean ± standard deviation of {len(seeds)} seeds" * (len(seeds) > 1)
    return f"{models}: quality against the depth of the decomposition{spread}"


def draw(records: Sequence[Record], title: str) -> Any:
    """A row per metric, a column per limit, a curve per width; full precision dashed.

    The ring on a curve, with a line down from it, marks where more depth stops helping.

    Args:
      records: Of `experiments.depth`.
      title: Above the figure.
    """
    all_curves = curves(records)
    metrics = [m for m in METRICS if any(c.metric == m for c in all_curves)]
    axes_names = [a for a in AXES if any(c.axis == a for c in all_curves)]
    widths = sorted({curve.bits for curve in all_curves})
    figure = new_figure(max(5.2, 0.4 + 3.6 * len(axes_names)), 0.9 + 2.3 * len(metrics))
    panels = figure.subplots(
        len(metrics), len(axes_names), squeeze=False, sharex="col", sharey="row"
    )
    for row, metric in zip(panels, metrics, strict=True):
        for panel, axis in zip(row, axes_names, strict=True):
            own = [c for c in all_curves if (c.metric, c.axis) == (metric, axis)]
            _draw_panel(panel, own, widths, reference(records, metric))
            is_last, is_first = metric == metrics[-1], axis == axes_names[0]
            finish_axes(
                panel,
                x=AXES[axis].title if is_last else "",
                y=METRICS[metric].title if is_first else "",
            )
    for panel, axis in zip(panels[0], axes_names, strict=True):
        panel.set_title(_heading(records, axis), loc="left", fontsize=8)
        _scale_x(panel, axis)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    _legend(figure, panels.flat)
    return figure


def _heading(records: Sequence[Record], axis: str) -> str:
    """The heading of a curve: the value at which the other limit is fixed."""
    (other,) = set(AXES) - {axis}
    fixed_at = {r[AXES[other].field] for r in records if r["axis"] == axis}
    values = ", ".join(map(AXES[other].show, sorted(fixed_at)))
    return f"tolerance {values}" if axis == STEPS else f"at most {values} steps"


def _draw_panel(
    panel: Any, own: Sequence[Curve], widths: Sequence[int], full: float | None
) -> None:
    if full is not None:
        panel.axhline(
            full, color="#404040", lw=0.9, ls=(0, (5, 3)), label="full precision",
            zorder=1,
        )  # fmt: skip
    if own:
        _scale_y(panel, own)
    for curve in own:
        index = widths.index(curve.bits)
        colour = COLOURS[index % len(COLOURS)]
        xs, ys, spreads = zip(*curve.points, strict=True)
        panel.errorbar(
            xs, ys, spreads if any(spreads) else None, color=colour, lw=1.2,
            marker=_MARKERS[index % len(_MARKERS)], capsize=2,
            markersize=max(3.5, _LARGEST - 1.4 * index),
            markeredgecolor="white", markeredgewidth=0.5, elinewidth=0.9,
            label=f"{curve.bits} bits",
        )  # fmt: skip
        if curve.enough is not None:
            _mark(panel, curve.enough, colour, index - (len(widths) - 1) / 2)


def _mark(panel: Any, point: CurvePoint, colour: str, place: float) -> None:
    from matplotlib.transforms import offset_copy

    panel.plot(
        [point.x], [point.mean], marker="o", markersize=12, markerfacecolor="none",
        markeredgecolor=colour, markeredgewidth=1.3, lw=0, zorder=4,
    )  # fmt: skip
    shifted = {"fig": panel.figure, "x": place * _SHIFT, "units": "points"}
    panel.annotate(
        "", (point.x, 0), (point.x, point.mean),
        xycoords=offset_copy(panel.get_xaxis_transform(), **shifted),
        textcoords=offset_copy(panel.transData, **shifted),
        arrowprops={"arrowstyle": "-", "color": colour, "lw": 1.2, "ls": ":"},
    )  # fmt: skip


def _scale_y(panel: Any, own: Sequence[Curve]) -> None:
    """Logarithmic for losses of several magnitudes, never for scores."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    means = [point.mean for curve in own for point in curve.points]
    is_score = any(METRICS[curve.metric].is_score for curve in own)
    if is_score or min(means) <= 0 or max(means) < _LOG_FROM * min(means):
        return
    panel.set_yscale("log")
    panel.margins(y=0.08)
    panel.yaxis.set_minor_formatter(NullFormatter())
    if min(means) > 1:
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _scale_x(panel: Any, axis: str) -> None:
    """Logarithmic, with depth growing to the right; holds for the whole column."""
    from matplotlib.ticker import FixedLocator, NullFormatter, ScalarFormatter

    panel.set_xscale("log")
    if AXES[axis].falls:
        panel.invert_xaxis()
    else:
        ticks = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 100, 200, 500, 1000]
        panel.xaxis.set_major_locator(FixedLocator(ticks))
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.xaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Any, panels: Any) -> None:
    from matplotlib.lines import Line2D

    entries: dict[str, Any] = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    ring = Line2D(
        [], [], marker="o", markersize=12, markerfacecolor="none", lw=0,
        markeredgecolor="#404040",
    )  # fmt: skip
    entries["enough: as good as the best, shallower"] = ring
    figure.legend(
        list(entries.values()), list(entries), ncols=3, frameon=False, fontsize=8,
        loc="outside lower center",
    )  # fmt: skip


RESULTS = Path(__file__).resolve().parents[1] / "results" / "depth.jsonl"


def make(setting: Setting) -> Artifact:
    """The figure of the committed studies of the model.

    Raises:
      DataError: If there is none, or the file is damaged.
    """
    records = _committed(setting)
    title = title_of(records)
    drawn = [_drawn(records, curve) for curve in curves(records)]
    facts = [f"Numbers of {RESULTS.name}.", *filter(None, map(_sentence, drawn))]
    return Artifact(title, drawn, draw(records, title), facts=facts)


def _committed(setting: Setting) -> list[Record]:
    """The largest study of the model, and the largest of classifiers."""
    records = read_jsonl(RESULTS)
    own = [r for r in records if r["model"] == setting.model_name]
    if not own:
        raise DataError(
            f"`{RESULTS}` has no record of {setting.model_name}; run: "
            "python -m experiments.depth "
            f"--model={setting.model} --out={RESULTS.parent}"
        )
    return [*_largest(own), *_largest([r for r in records if r["metric"] == "glue"])]


def _largest(records: Sequence[Record]) -> list[Record]:
    studies: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        study = tuple(str(record[name]) for name in ("data", "data_sha256", "protocol"))
        studies.setdefault(study, []).append(record)
    return max(studies.values(), key=len, default=[])


def _drawn(records: Sequence[Record], curve: Curve) -> dict[str, Any]:
    """A curve as a record; what measured it stands in the file that it is from."""
    enough, best = curve.enough, curve.best
    return {
        "metric": curve.metric,
        "axis": curve.axis,
        "bits": curve.bits,
        "x": [point.x for point in curve.points],
        "mean": [point.mean for point in curve.points],
        "spread": [point.spread for point in curve.points],
        "enough": None if enough is None else enough.x,
        "value_at_enough": None if enough is None else enough.mean,
        "best_at": None if best is None else best.x,
        "best": None if best is None else best.mean,
        "full_precision": reference(records, curve.metric),
        "source": RESULTS.name,
    }


def _sentence(drawn: Record) -> str:
    if drawn["axis"] != STEPS or drawn["enough"] is None:
        return ""
    metric = METRICS[drawn["metric"]]
    return (
        f"{metric.name}, {drawn['bits']} bits: {drawn['enough']} steps are enough "
        f"({metric.show(drawn['value_at_enough'])}; best {metric.show(drawn['best'])} "
        f"at {drawn['best_at']})."
    )


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_figure("depth_curves", __doc__, make, ModelFigureConfig, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
