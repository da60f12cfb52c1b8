"""Deprecated: the figures, Table 1 and the curves of depth, now a program each.

    python -m experiments.paper --only=fig3,fig5

is `python -m experiments.fig3`, then `python -m experiments.fig5`; `table1` is
`experiments.table1`, `depth` is `experiments.depth_curves`. Goes in 0.3.0.

Exit code 0: done; else that of the first program that failed.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType

from experiments import (
    depth_curves,
    fig1,
    fig2,
    fig3,
    fig4,
    fig5,
    fig6,
    fig7,
    fig8,
    table1,
)
from experiments.common.figures import ModelFigureConfig
from experiments.common.flags import ALL, chosen_names, flag, run_program

__all__ = ["PaperConfig", "main", "run"]

PROGRAMS: Mapping[str, Callable[[list[str]], int]] = MappingProxyType({
    "fig1": fig1.main, "fig2": fig2.main, "fig3": fig3.main, "fig4": fig4.main,
    "fig5": fig5.main, "fig6": fig6.main, "fig7": fig7.main, "fig8": fig8.main,
    "table1": table1.main, "depth": depth_curves.main,
})  # fmt: skip
_HAS_MODEL = ("fig3", "fig6", "fig7", "fig8", "depth")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaperConfig(ModelFigureConfig):
    """What is made; meanings are in the flags."""

    only: tuple[str, ...] = flag(ALL, f"all, or a list of: {', '.join(PROGRAMS)}.")

    def __post_init__(self) -> None:
        super().__post_init__()
        chosen_names("only", self.only, PROGRAMS)


def run(config: PaperConfig) -> int:
    """Runs the chosen programs; returns the first exit code but 0."""
    for name in chosen_names("only", config.only, PROGRAMS):
        program = "depth_curves" if name == "depth" else name
        print(
            f"DeprecationWarning: `experiments.paper --only={name}` goes in 0.3.0; "
            f"run: python -m experiments.{program}",
            file=sys.stderr,
        )
        flags = [f"--seed={config.seed}", f"--out={config.out}"]
        flags += [f"--model={config.model}"] * (name in _HAS_MODEL)
        if code := PROGRAMS[name](flags):
            return code
    return 0


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_program("paper", __doc__, PaperConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
