"""Fine-tuning the embedded encoder, as the command does by default."""

import pytest

from experiments.classification.data import load_examples
from experiments.classification.tasks import TASKS
from experiments.common.results import read_jsonl
from experiments.finetune_glue import main


def rated_sentences(count):
    """Embedded ones as rows of SST-2, as many of either class in turn."""
    found = load_examples(TASKS["sentiment-amazon"], "amazon")
    pairs = list(zip(found.first, found.labels > 0, strict=True))
    sides = ([text for text, side in pairs if side == label] for label in (0, 1))
    taken = zip(*sides, strict=True)
    rows = [f"{text}\t{label}" for both in taken for label, text in enumerate(both)]
    return rows[:count]


@pytest.mark.slow
def test_a_few_steps_teach_a_fresh_head_on_the_embedded_encoder(tmp_path, capsys):
    rows = rated_sentences(384)
    (tmp_path / "sst2").mkdir()
    for split, some in (("train", rows[:256]), ("dev", rows[256:])):
        text = "\n".join(["sentence\tlabel", *some]) + "\n"
        (tmp_path / "sst2" / f"{split}.tsv").write_text(text, "utf-8")
    flags = ["--task=sst2", f"--data_dir={tmp_path}", f"--out={tmp_path / 'run'}"]
    recipe = ["--epochs=1", "--batch_size=16", "--learning_rate=2e-4", "--log_every=4"]
    # 32 tokens, so that the step compiles once.
    assert main([*flags, *recipe, "--max_length=32"]) == 0
    assert "Finished 16 steps: accuracy" in capsys.readouterr().out
    records = read_jsonl(tmp_path / "run" / "log.jsonl")
    losses = [record["loss"] for record in records if "loss" in record]
    # Of a fresh head log 2 = 0.69; the encoder has seen such a task before.
    assert losses[0] > 0.6
    assert losses[-1] < 0.45
    assert records[-1]["accuracy"] > 75.0
