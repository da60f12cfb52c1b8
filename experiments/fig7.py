"""Figure 7: good clusterings in the (u, v) plane.

    python -m experiments.fig7
    python -m experiments.fig7 --model=facebook/opt-125m

The layer is the paper's query projection or, in a model without it, the one that
converges best. It adds its numbers to fig7.jsonl in `--out`, and writes fig7.png and
fig7.svg.

Exit code 0: done; 1: a file or its content is unusable; 2: wrong flag; 130: Ctrl-C.
"""

import sys

from experiments.common.clusterings import clusterings_of
from experiments.common.figures import Artifact, ModelFigureConfig, Setting, run_figure

__all__ = ["main", "make"]

FAMILIES_SHOWN = ("haar", "butterfly3", "hadamard", "sign-dct")


def make(setting: Setting) -> Artifact:
    """The figure: an easy layer in four bases that spread."""
    cases = [(setting.good_layer, family) for family in FAMILIES_SHOWN]
    return clusterings_of(setting, cases, "good clusterings")


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_figure("fig7", __doc__, make, ModelFigureConfig, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
