"""Quality against the depth of the decomposition: committed results, drawn again.

Hours of quantizing are not repeated here: `python -m experiments.depth` makes them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.common.figures import Artifact
from experiments.common.results import read_jsonl
from experiments.common.setting import Setting
from experiments.common.tables import Record
from experiments.depth.drawing import draw
from experiments.depth.points import STEPS
from experiments.depth.report import title_of
from experiments.depth_curves import METRICS, Curve, curves, reference
from kashin_jax.errors import DataError

__all__ = ["make"]

RESULTS = Path(__file__).resolve().parents[2] / "results" / "depth.jsonl"


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
