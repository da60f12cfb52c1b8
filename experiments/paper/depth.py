"""Quality against the depth of the decomposition: committed results, drawn again.

Hours of quantizing are not repeated here: `python -m experiments.depth` makes them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.depth.curves import METRICS, Curve, curves, reference
from experiments.depth.drawing import draw
from experiments.depth.points import STEPS
from experiments.depth.report import title_of
from experiments.flag_values import file_stem
from experiments.paper.artifact import Artifact
from experiments.paper.setting import Setting
from experiments.results import read_jsonl
from experiments.tables import Record
from kashin_jax.errors import DataError

__all__ = ["make"]

RESULTS = Path(__file__).resolve().parents[2] / "results"


def make(setting: Setting) -> Artifact:
    """The figure of the largest committed study of the model.

    Raises:
      DataError: If there is none, or it is damaged.
    """
    path = _committed(setting)
    records = read_jsonl(path)
    title = title_of(records)
    drawn = [_drawn(records, curve, path) for curve in curves(records)]
    facts = [f"Numbers of {path.name}.", *filter(None, map(_sentence, drawn))]
    return Artifact(title, drawn, draw(records, title), facts=facts)


def _committed(setting: Setting) -> Path:
    pattern = f"depth-{file_stem([setting.model_name])}-*.jsonl"
    found = sorted(RESULTS.glob(pattern), key=lambda path: (path.stat().st_size, path))
    if not found:
        raise DataError(
            f"`{RESULTS / pattern}` is missing; run: python -m experiments.depth "
            f"--model={setting.model} --out={RESULTS}"
        )
    return found[-1]


def _drawn(records: Sequence[Record], curve: Curve, path: Path) -> dict[str, Any]:
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
        "source": path.name,
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
