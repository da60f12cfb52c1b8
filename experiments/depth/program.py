"""How deep the paper's decomposition has to go: quality against steps and tolerance.

    python -m experiments.depth
    python -m experiments.depth --bits=4 --steps=1,2,4,8,16 --rtols= --metrics=error
    python -m experiments.depth --seed=0,1,2 --data_dir=GLUE

The paper's method (greedy decomposition, then one codebook of pairs per matrix) at each
width, stopped after each number of `--steps` at a tolerance that it does not reach, and
at each tolerance of `--rtols` with steps to spare. For each: the relative squared error
of the weights of `--model` (mean over its layers), its perplexity, and the mean score
of `--glue_model` over its tasks, those of `experiments.glue`. It marks where more depth
stops helping: at the fewest steps, or the loosest tolerance, whose value is as good as
the best at any depth, up to the spread over seeds or to 1 %.

It prints two tables, adds its records to depth.jsonl in `--out`, and writes depth.md
and depth.png. The same command goes on where an interrupted one stopped.

Exit code 0: done; 1: a file or its content is unusable; 2: wrong flag; 130: Ctrl-C.
"""

import jax

from experiments.common.flags import run_program
from experiments.common.results import prepare_output, remove_work, start_work
from experiments.depth.config import DepthConfig
from experiments.depth.loading import choose_glue_tasks, load_inputs, make_subjects
from experiments.depth.report import present
from experiments.depth.rows import measure

__all__ = ["DepthConfig", "main", "run"]


def run(config: DepthConfig) -> int:
    """Measures, prints and writes the study; returns the exit code.

    Raises:
      UsageError: If a flag does not fit a model or the output cannot be written.
      CheckpointError: If a model or its tokenizer cannot be used.
      DataError: If a text or a task's file cannot be used.
    """
    out = prepare_output(config.out)
    # TF32 would put the products of a float32 model at three digits on a GPU.
    with jax.default_matmul_precision("highest"):
        tasks = choose_glue_tasks(config)
        inputs = load_inputs(config, tasks)
        work = start_work(out, config)
        subjects = make_subjects(config, inputs, work)
        records = measure(subjects, config.points, work)
    present(config, records, out)
    remove_work(work)
    return 0


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_program("depth", __doc__, DepthConfig, run, arguments)
