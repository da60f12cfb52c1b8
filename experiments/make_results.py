"""Makes the committed results again, on purpose and one artifact at a time if asked.

    python -m experiments.make_results --only=table2_opt
    python -m experiments.make_results --only=table3_glue,refine_glue --data_dir=DATA

Runs the commands of `experiments/common/result_files.py` into `results/`; records that
are measured again replace their like. Commands on data that cannot be shipped (`$DATA`)
are left out, each with a line, unless `--data_dir` names the folder. An interrupted
command goes on when this one is repeated. All of it takes many hours on two cores.
Afterwards `python -m experiments.render` brings README and docs up to date.

Exit code 0: done; 2: wrong flag; else that of the command that failed.
"""

import dataclasses
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.common.flags import ALL, check_flags, chosen_names, flag, run_program
from experiments.common.result_files import RESULT_FILES

__all__ = ["MakeResultsConfig", "commands", "main", "run"]

ROOT = Path(__file__).resolve().parents[1]
DATA = "$DATA"
# They take finished rows from the result file unless they are told not to.
_KEEPING = ("experiments.opt_ppl", "experiments.glue")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MakeResultsConfig:
    """What is made; meanings are in the flags."""

    only: tuple[str, ...] = flag(ALL, f"all, or a list of: {', '.join(RESULT_FILES)}.")
    data_dir: str = flag("", "Folder with glue/, wikitext2/ and lambada/.")

    def __post_init__(self) -> None:
        check_flags(self)
        chosen_names("only", self.only, RESULT_FILES)


def commands(name: str, data_dir: str) -> tuple[list[list[str]], list[str]]:
    """What makes a result file: arguments of Python, and what is left out.

    Args:
      name: Of `RESULT_FILES`.
      data_dir: Replaces `$DATA`; without it, commands that need it are left out.
    """
    made, left_out = [], []
    for command in RESULT_FILES[name].commands:
        if DATA in command and not data_dir:
            left_out.append(command)
            continue
        words = [word.replace(DATA, data_dir) for word in shlex.split(command)]
        if not any(word.startswith("--out=") for word in words):
            words.append("--out=results")
        if words[0] in _KEEPING:
            words.append("--fresh")
        made.append(["-m", *words])
    return made, left_out


def run(config: MakeResultsConfig) -> int:
    """Runs the commands one after the other; returns the first exit code but 0."""
    data_dir = str(Path(config.data_dir).resolve()) if config.data_dir else ""
    for name in chosen_names("only", config.only, RESULT_FILES):
        made, left_out = commands(name, data_dir)
        for command in left_out:
            print(f"{name}: left out, needs `--data_dir`: {command}", file=sys.stderr)
        for arguments in made:
            if code := _run(arguments):
                return code
    return 0


def _run(arguments: Sequence[str]) -> int:
    print(f"python {shlex.join(arguments)}", file=sys.stderr, flush=True)
    return subprocess.run([sys.executable, *arguments], cwd=ROOT).returncode


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_program("make_results", __doc__, MakeResultsConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
