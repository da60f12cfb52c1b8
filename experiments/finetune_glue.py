r"""Fine-tunes a BERT, RoBERTa or DistilBERT encoder on a GLUE task.

    python -m experiments.finetune_glue --task=rte --model=bert-base-uncased --out=DIR
    python -m experiments.finetune_glue --task=mrpc --data_dir=GLUE --out=DIR

Without `--model` it starts from the embedded encoder minilm-glue. Data are read from
`--data_dir` (`GLUE/RTE/train.tsv` or `GLUE/rte/train.tsv`), else by the library
`datasets`: no task of GLUE is embedded. A fresh head is drawn, with the task's label
names; `--head=NAME` starts from a head of a checkpoint with several, `--head=stored`
from the only one of a classifier.

The recipe is `run_glue` of `transformers` (AdamW at 2e-5, batches of 32, 3 epochs, 128
tokens, linear decay to 0, gradients clipped at norm 1) with BERT's own warm-up in the
first 10 % of the steps and weight decay of 0.01, where `run_glue` has neither; RoBERTa
was published with 6 % and 0.1. Biases and norms are not decayed. The loss is the cross
entropy, or the squared error of STS-B's scores.

With `--quantized=DIR`, from `experiments.glue --save=` or `kashin quantize`, a
quantized classifier is refined: codes, embeddings and the head's matrix stay,
centroids, scales, biases and norms are trained, each packed leaf in units of its own
root-mean-square. Rates around 1e-3 suit that. `quantized/` then holds the result, in as
many bits as before: biases and norms, which `hf/` has in float32, in the precision of
the checkpoint.

Every epoch has an order of its own. Epochs are joined and cut into batches, so there is
no smaller last batch, and up to a batch of examples is seen once more at the end.
Batches are padded to a multiple of 32 tokens, each of which compiles once. `--out`
receives

    log.jsonl     one object per `--log_every` steps: step, loss and grad_norm (means
                  since the line before), learning_rate, examples, seconds,
                  examples_per_second; and one per epoch with the metrics of the dev
                  set in percent, computed in float32
    checkpoints/  the two newest states; the same command goes on from there and ends
                  with the weights of an uninterrupted run, bit for bit where the
                  device repeats itself bit for bit, as CPUs do
    loss.png      loss and dev metrics
    hf/           the model in float32 with its tokenizer, for `load_classifier`,
                  `transformers` and `python -m experiments.glue --model=`
    metrics.json  dev metrics of these weights; written last

Ctrl-C and SIGTERM save a checkpoint first. Exit code 0: finished; 1: data, model or
checkpoint unusable, or loss not finite; 2: wrong flag; 3: stopped, steps are left.
`--help` lists the flags.
"""

import sys

from experiments.common.flags import run_program
from experiments.finetuning.config import FinetuneConfig
from experiments.finetuning.run import finetune

__all__ = ["main"]


def _run(config: FinetuneConfig) -> int:
    result = finetune(config)
    if result.metrics is None:
        print(
            f"Stopped after {result.steps} of {result.total} steps; the same command "
            "goes on from there."
        )
        return 3
    values = ", ".join(f"{name} {value:.2f}" for name, value in result.metrics.items())
    print(f"Finished {result.steps} steps: {values}. The model is in {config.out}/hf.")
    return 0


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_program("finetune_glue", __doc__, FinetuneConfig, _run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
