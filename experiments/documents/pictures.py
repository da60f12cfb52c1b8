"""The pictures of README and docs: `docs/img/NAME.png`, drawn from result files.

Each carries a digest of the records that it shows, by which it is compared: the bytes
of a PNG depend on fonts and on the version of matplotlib. Figures 6 to 8 show the
points of layers, which no record holds: their programs draw them.
"""

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from experiments import fig1, fig2, fig3, fig4, fig5, table1
from experiments.ablate_bases import draw_trade_off
from experiments.classification.plot import plot_glue, plot_refinement
from experiments.classification.tasks import TASKS
from experiments.common.methods import FULL_PRECISION, GLUE_METHODS, JOINT, METHODS
from experiments.common.perplexity_table import plot_perplexity
from experiments.common.plots import save_picture
from experiments.common.results import to_json
from experiments.common.tables import Record
from experiments.depth_curves import draw as draw_depth
from experiments.depth_curves import title_of
from experiments.documents.views import FIVE_TASKS, SENTIMENT, VIEWS, Where, ordered
from experiments.rate_distortion import plot_rate_distortion
from experiments.robustness import draw_heat_map
from kashin_jax.errors import DataError
from kashin_jax.io import atomic_path

__all__ = ["PICTURES", "Picture", "draw_picture", "is_current"]

Draw = Callable[[Sequence[Record], Path], None]
_DIGEST = "Records"


class Picture(NamedTuple):
    """A picture of a document.

    Attributes:
      file: Of `RESULT_FILES`.
      where: What its records have, as `select` reads it.
      draw: Writes a PNG of them; None where only its own program can.
    """

    file: str
    where: Where
    draw: Draw | None


def _perplexity(
    title: str, records: Sequence[Record], path: Path, *, logarithmic: bool = False
) -> None:
    own = ordered(records, (JOINT, *METHODS))
    plot_perplexity(own, path, title=title, logarithmic=logarithmic)


def _rates(title: str, records: Sequence[Record], path: Path) -> None:
    plot_rate_distortion(records, path, title=title)


def _glue(
    names: Sequence[str], title: str, records: Sequence[Record], path: Path
) -> None:
    own = ordered(records, (JOINT, *GLUE_METHODS))
    plot_glue(own, [TASKS[name] for name in names], path, title=title)


def _refined(records: Sequence[Record], path: Path) -> None:
    title = "minilm-glue: refinement with fixed codes, MRPC dev"
    plot_refinement(records, TASKS["mrpc"], path, title=title)


def _depth(records: Sequence[Record], path: Path) -> None:
    save_picture(draw_depth(records, title_of(records)), path)


def _robustness(records: Sequence[Record], path: Path) -> None:
    first = records[0]
    size, steps = first["size"], first["max_steps"]
    title = f"{size} x {size} matrices, at most {steps} steps to {first['rtol']:g}"
    title += f", mean of {first['seeds']} seeds"
    save_picture(draw_heat_map(records, title), path, bbox_inches=None)


def _ablation(records: Sequence[Record], path: Path) -> None:
    first = records[0]
    title = f"{first['bits']} bits, {first['seeds']} seeds, "
    title += f"at most {first['max_steps']} steps"
    save_picture(draw_trade_off(records, title), path, bbox_inches=None)


def _figure(draw: Callable[..., Any], records: Sequence[Record], path: Path) -> None:
    save_picture(draw(records), path)


def _fig3(records: Sequence[Record]) -> Any:
    curves = [record for record in records if record["part"] == "curve"]
    return fig3.draw(curves, f"{curves[0]['model']}: layers, matrix form")


def _fig4(records: Sequence[Record]) -> Any:
    slopes = [record for record in records if record.get("fit")]
    return fig4.draw([r for r in records if not r.get("fit")], slopes)


def _like(view: str, draw: Draw) -> Picture:
    """A picture of the records of a view."""
    return Picture(VIEWS[view].file, VIEWS[view].where, draw)


def _paper(name: str, draw: Callable[..., Any] | None) -> Picture:
    return Picture(name, {"seed": 0}, draw and partial(_figure, draw))


_OPT = "opt-wiki-18m: perplexity on"
# What README's first picture has room for: the best of each kind.
_FIRST_SCREEN = [
    FULL_PRECISION, JOINT, "kashin", "rtn-g128", "nf4-g64", "hqq-g64",
    "k-means-channel", "rotate-k-means",
]  # fmt: skip
PICTURES: Mapping[str, Picture] = MappingProxyType({
    "perplexity": _like(
        "opt-wiki-vital",
        partial(
            _perplexity, f"{_OPT} Wikipedia's vital articles", logarithmic=True
        ),
    ),
    "perplexity-short": Picture(
        VIEWS["opt-wiki-vital"].file,
        VIEWS["opt-wiki-vital"].where | {"method": _FIRST_SCREEN},
        partial(_perplexity, f"{_OPT} Wikipedia articles", logarithmic=True),
    ),
    "perplexity-wikitext2": _like(
        "opt-16k-seeds", partial(_perplexity, f"{_OPT} wikitext2")
    ),
    "perplexity-lambada": _like(
        "opt-lambada", partial(_perplexity, f"{_OPT} lambada")
    ),
    "rate-gaussian-efforts": _like(
        "rate-gaussian-efforts",
        partial(_rates, "gaussian: weight error against stored bits"),
    ),
    "rate-gaussian": _like(
        "rate-gaussian", partial(_rates, "gaussian: weight error against stored bits")
    ),
    "sentiment": _like(
        "sentiment", partial(_glue, SENTIMENT, "minilm-glue: sentiment")
    ),
    "glue-five-tasks": _like(
        "glue-five-tasks",
        partial(_glue, FIVE_TASKS, "minilm-glue: GLUE dev"),
    ),
    "refine-mrpc": _like("refine-mrpc", _refined),
    "depth": _like("depth", _depth),
    "robustness": _like("robustness", _robustness),
    "ablate-bases": _like("ablate-bases", _ablation),
    "table1": _paper("table1", table1.draw),
    "fig1": _paper("fig1", fig1.draw),
    "fig2": _paper("fig2", fig2.draw),
    "fig3": _paper("fig3", _fig3),
    "fig4": _paper("fig4", _fig4),
    "fig5": _paper("fig5", fig5.draw),
    "fig6": _paper("fig6", None),
    "fig7": _paper("fig7", None),
    "fig8": _paper("fig8", None),
})  # fmt: skip


def _digest(records: Sequence[Record]) -> str:
    text = "\n".join(map(to_json, records))
    return hashlib.sha256(text.encode()).hexdigest()


def is_current(path: Path, records: Sequence[Record]) -> bool:
    """Whether a picture was drawn from just these records."""
    from PIL import Image

    if not path.is_file():
        return False
    with Image.open(path) as image:
        return image.info.get(_DIGEST) == _digest(records)


def draw_picture(
    name: str, records: Sequence[Record], path: Path, *, drawn: Path
) -> None:
    """Draws a picture and notes in it what it was drawn from.

    Args:
      name: Of `PICTURES`.
      records: What it shows.
      path: A PNG file, replaced in one step.
      drawn: The picture that its own program has drawn, where that has to.

    Raises:
      DataError: If it has not.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    draw = PICTURES[name].draw
    with atomic_path(path) as temporary:
        if draw is not None:
            draw(records, temporary)
        elif drawn.is_file():
            shutil.copyfile(drawn, temporary)
        else:
            raise DataError(
                f"`{path}` is not of the records of {PICTURES[name].file}.jsonl, which "
                f"do not suffice to draw it; run: make results ARTIFACT={name}"
            )
        with Image.open(temporary) as image:
            note = PngInfo()
            note.add_text(_DIGEST, _digest(records))
            image.save(temporary, "png", pnginfo=note, dpi=image.info.get("dpi"))
