"""The figures and Table 1 of arXiv 2404.09737, from real weights, with their numbers.

    python -m experiments.paper
    python -m experiments.paper --only=fig3,fig5
    python -m experiments.paper --only=fig3,fig8 --model=facebook/opt-125m

Each name writes NAME.png and NAME.svg to `--out` as soon as it is done, and adds its
numbers to NAME.jsonl; a table writes NAME.md too. `depth` is called depth_curves there,
its numbers are those of `experiments.depth`. On
the embedded checkpoint the layers of Figures 3, 6, 7 and 8 are the paper's, where it
has them, and the one that converges worst.

Exit code 0: done; 1: a file or its content is unusable; 2: wrong flag; 130: Ctrl-C.
"""

import dataclasses
import sys
import time
from typing import Any

import jax

from experiments.common.figures import write_artifact
from experiments.common.flag_values import command_line
from experiments.common.flags import GIVEN, check_flags, flag, run_program
from experiments.common.results import prepare_output
from experiments.common.setting import Setting
from experiments.common.text import ASSETS
from experiments.paper.registry import PARTS
from kashin_jax.errors import UsageError

__all__ = ["PaperConfig", "main", "run"]

DEFAULT_MODEL = str(ASSETS / "opt-wiki-18m")
_ABOUT = "; ".join(f"{name}: {part.about}" for name, part in PARTS.items())


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaperConfig:
    """What is made; meanings are in the flags.

    Raises:
      UsageError: If a value cannot work; the message names the flag.
    """

    only: tuple[str, ...] = flag(("all",), f"all, or a list. {_ABOUT}.", GIVEN)
    model: str = flag(DEFAULT_MODEL, "Directory or hub id of an OPT checkpoint.", GIVEN)
    seed: int = flag(
        0, "Of vectors, bases and codebooks.",
        (lambda x: 0 <= x < 2**31, "in [0, 2147483647]"),
    )  # fmt: skip
    out: str = flag("runs", "Directory of the results.", GIVEN)

    def __post_init__(self) -> None:
        check_flags(self)
        for name in self.only:
            if name not in PARTS and self.only != ("all",):
                raise UsageError(
                    f"`--only` must be all or a list of: {', '.join(PARTS)}. "
                    f"Got {name!r}."
                )

    @property
    def parts(self) -> list[str]:
        """The chosen names in the paper's order, each once."""
        return [name for name in PARTS if self.only == ("all",) or name in self.only]


def run(config: PaperConfig) -> int:
    """Makes and writes every chosen part; returns the exit code.

    Raises:
      UsageError: If the output cannot be written.
      CheckpointError: If a part needs the model, and it is missing or damaged.
    """
    out = prepare_output(config.out)
    setting = Setting(model=config.model, seed=config.seed)
    if any(PARTS[name].needs_model for name in config.parts):
        # A wrong `--model` is an error before minutes of other figures.
        _ = setting.kernels
    left = list(config.parts)
    try:
        # TF32 would add an error of its own on a GPU.
        with jax.default_matmul_precision("highest"):
            for name in config.parts:
                start = time.perf_counter()
                artifact = PARTS[name].make(setting)
                own = dataclasses.replace(config, only=(name,))
                paths = write_artifact(
                    artifact, out, PARTS[name].file or name,
                    command_line("paper", own, always=("only",)),
                    **_setting(config, setting, name),
                )  # fmt: skip
                seconds = time.perf_counter() - start
                print(f"{name}: {artifact.title}; {seconds:.1f} s")
                print("".join(f"  {fact}\n" for fact in artifact.facts), end="")
                print(f"  Written: {', '.join(map(str, paths))}", flush=True)
                left.remove(name)
    except KeyboardInterrupt:
        print(
            "paper: interrupted; what is written is whole. For the rest: "
            f"--only={','.join(left)}",
            file=sys.stderr,
        )
        return 130
    return 0


def _setting(config: PaperConfig, setting: Setting, name: str) -> dict[str, Any]:
    own = {"model": setting.model_name} if PARTS[name].needs_model else {}
    return {**own, "seed": config.seed}


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_program("paper", __doc__, PaperConfig, run, arguments)
