"""Tables of the depth study: where each curve has enough, and every setting."""

import statistics
from collections.abc import Sequence
from typing import Any

from experiments.common.tables import Column, Record, fixed, share
from experiments.depth.points import RTOL, STEPS
from experiments.depth_curves import AXES, METRICS, Curve, CurvePoint, curves, reference

__all__ = ["SUMMARY_COLUMNS", "setting_columns", "setting_rows", "summary_rows"]

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
