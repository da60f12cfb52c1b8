"""Figure 8: bad clusterings in the (u, v) plane.

    python -m experiments.fig8
    python -m experiments.fig8 --model=facebook/opt-125m

The layers are those that lose and resist most, then an easy one in bases that do not
spread. It adds its numbers to fig8.jsonl in `--out`, and writes fig8.png and fig8.svg.

Exit code 0: done; 1: a file or its content is unusable; 2: wrong flag; 130: Ctrl-C.
"""

import sys

from experiments.common.clusterings import clusterings_of
from experiments.common.figures import Artifact, ModelFigureConfig, Setting, run_figure

__all__ = ["main", "make"]

# Bases that do not spread.
FAMILIES_SHOWN = ("householder", "identity")


def make(setting: Setting) -> Artifact:
    """The figure: layers that lose and resist most, and bases that do not spread."""
    hard = dict.fromkeys([setting.lossy_layer, setting.hard_layer])
    cases = [(layer, "haar") for layer in hard]
    cases += [(setting.good_layer, family) for family in FAMILIES_SHOWN]
    return clusterings_of(setting, cases, "bad clusterings")


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_figure("fig8", __doc__, make, ModelFigureConfig, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
