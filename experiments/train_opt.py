r"""Trains a language model of OPT's architecture from plain text.

The defaults are the recipe of the embedded checkpoint opt-wiki-18m, which
`experiments/runs/train_opt_wiki.sh` repeats on a GPU. A smaller model on a
CPU, some twelve minutes on two idle cores (`results/train_opt.jsonl` has its curve):

    python -m experiments.train_opt --text_file=TEXT --out=DIRECTORY \
        --layers=2 --hidden_size=128 --heads=2 --ffn_dim=512 --max_positions=64 \
        --context=64 --steps=3600 --warmup_steps=120 --batch_size=16 --dtype=float32

The text is UTF-8. Documents are separated by empty lines (or `--separator`), shuffled
anew in every epoch and joined by `</s>`; tokens are kept in `--cache_dir`, so a large
text is tokenized once. `--out` receives

    log.jsonl     one object per `--log_every` steps: step, loss and grad_norm (means
                  since the line before), learning_rate, tokens, seconds (wall time of
                  the run, all included), tokens_per_second (since the line before,
                  without validation and checkpoints);
                  and one per `--eval_every` steps with the validation perplexity
    checkpoints/  the two newest states; the same command goes on from there and ends
                  with the weights of an uninterrupted run, bit for bit where the
                  device repeats itself bit for bit, as CPUs do
    loss.png      the loss curve
    hf/           the model in float16 with its tokenizer, for `load_opt`,
                  `transformers` and `python -m experiments.opt_ppl --model=`

Ctrl-C and SIGTERM save a checkpoint first. Exit code 0: finished; 1: text, tokenizer
or checkpoint unusable, or loss not finite; 2: wrong flag; 3: stopped, steps are left.
`--help` lists the flags.
"""

import sys

from experiments.common.flags import run_program
from experiments.train.config import TrainConfig
from experiments.train.run import run

__all__ = ["main"]


def _run(config: TrainConfig) -> int:
    result = run(config)
    if result.export is None:
        print(
            f"Stopped after {result.steps} of {config.steps} steps; the same command "
            "goes on from there."
        )
        return 3
    print(f"Finished {result.steps} steps; the checkpoint is in {result.export}.")
    return 0


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_program("train_opt", __doc__, TrainConfig, _run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
