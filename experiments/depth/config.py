"""The flags of the depth study."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from experiments.classification.tasks import TASKS, choose_tasks
from experiments.common.flag_values import parse_bases, parse_numbers
from experiments.common.flags import GIVEN, POSITIVE_COUNT, Allowed, check_flags, flag
from experiments.common.text import ASSETS, DATASETS, parse_max_tokens
from experiments.depth.points import Point, grid
from experiments.depth_curves import METRICS
from kashin_jax.bases import FAMILIES
from kashin_jax.errors import UsageError

__all__ = ["DepthConfig"]

_MAX_STEPS = 100_000
_BELOW_ONE: Allowed = (lambda x: 0 < x < 1, "in (0, 1)")
_METRICS: Allowed = (
    lambda x: x and set(x) <= set(METRICS), f"a list of {', '.join(METRICS)}"
)  # fmt: skip
_DATASET: Allowed = (lambda x: x in DATASETS, f"one of {', '.join(DATASETS)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthConfig:
    """A study; meanings are in the flags.

    Raises:
      UsageError: If a value cannot work; the message names the flag.
    """

    bits: tuple[str, ...] = flag(
        ("2", "3", "4", "6"), "Code widths, 1 to 8, as a list.", GIVEN
    )
    steps: tuple[str, ...] = flag(
        tuple("1 2 3 4 5 6 8 10 12 16 24 32 48".split()),
        "Numbers of greedy steps, as a list; may be empty.",
    )
    rtols: tuple[str, ...] = flag(
        tuple("1e-1 3e-2 1e-2 1e-3 1e-4 1e-5 1e-6".split()),
        "Relative residuals at which to stop, as a list; may be empty.",
    )
    metrics: tuple[str, ...] = flag(tuple(METRICS), "What is measured.", _METRICS)
    model: str = flag(
        str(ASSETS / "opt-wiki-18m"), "OPT checkpoint: directory or hub id.", GIVEN
    )
    dataset: str = flag("wiki_vital", f"One of {', '.join(DATASETS)}.", _DATASET)
    text_file: str = flag("", "Score this UTF-8 text instead of a data set.")
    max_tokens: str = flag("4096", "Tokens scored, from the first on; or `all`.")
    glue_model: str = flag(
        str(ASSETS / "minilm-glue"),
        "Classifier: directory or hub id; {task} is replaced.", GIVEN,
    )  # fmt: skip
    tasks: tuple[str, ...] = flag(
        (), f"List of {', '.join(TASKS)}; the default is that of experiments.glue."
    )
    data_dir: str = flag(
        "",
        "Folder with SST-2/dev.tsv, wikitext2/wiki.test.raw and so on; what it lacks "
        "is embedded or asked of the hub.",
    )
    max_length: int = flag(
        128, "Tokens of an example of a task; longer ones are cut.", POSITIVE_COUNT
    )
    basis: str = flag(
        "hadamard", f"Family ({', '.join(FAMILIES)}), or `left:right`.", GIVEN
    )
    seed: tuple[str, ...] = flag(
        ("0",), "Seeds, as a list; several give a spread.", GIVEN
    )
    rtol: float = flag(1e-6, "Relative residual that ends `--steps`.", _BELOW_ONE)
    max_steps: int = flag(200, "Steps allowed to `--rtols`.", POSITIVE_COUNT)
    out: str = flag("runs", "Directory of the results.", GIVEN)

    def __post_init__(self) -> None:
        check_flags(self)
        parse_max_tokens(self.max_tokens)
        parse_bases((self.basis,))
        if self.tasks:
            choose_tasks(self.tasks)
        if not self.points:
            raise UsageError("`--steps` and `--rtols` are both empty; give one.")

    @property
    def data_path(self) -> Path | None:
        """`data_dir`, if it is given."""
        return Path(self.data_dir) if self.data_dir else None

    @property
    def needs_language_model(self) -> bool:
        """Whether a metric is one of `model`."""
        return any(not METRICS[name].is_score for name in self.metrics)

    @property
    def points(self) -> list[Point]:
        """All settings, in the order of work."""
        return list(grid(
            parse_numbers("bits", self.bits, 1, 8),
            parse_numbers("steps", self.steps, 1, _MAX_STEPS),
            _parse_rtols(self.rtols),
            parse_numbers("seed", self.seed, 0, 2**31 - 1),
            basis=parse_bases((self.basis,))[0],
            rtol=self.rtol,
            max_steps=self.max_steps,
        ))  # fmt: skip


def _parse_rtols(texts: Sequence[str]) -> list[float]:
    """Tolerances from loose to tight, each once."""
    values = set()
    for text in texts:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value < 1:
            raise UsageError(f"`--rtols` must list numbers in (0, 1). Got {text!r}.")
        values.add(value)
    return sorted(values, reverse=True)
