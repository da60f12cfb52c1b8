"""Tiny BERT and RoBERTa classifiers with tokenizers and tasks, and the job on them.

Two blocks, all quantized matrices 64 x 64, weights larger than a fresh model's, so that
quantizing changes answers. Sentences fall into two buckets, 16 and 24 tokens.
"""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from flax import nnx
from tiny_checkpoint import as_in_tests
from tokenizers import models, pre_tokenizers, processors

from experiments.classification.tasks import TASKS
from experiments.common.results import read_jsonl
from experiments.glue import main
from kashin_jax.models import save_classifier
from kashin_jax.models.bert import ClassifierConfig, SequenceClassifier

WORDS = tuple(f"w{i}" for i in range(40))
BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
ROBERTA_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
SIDE = 64
MAX_LENGTH = 24
BUCKETS = 2
# Attention, feed-forward and, for BERT, the pooler.
LINEARS = {"bert": 2 * 6 + 1, "roberta": 2 * 6}
TASKS_OF_TABLE = ("sst2", "stsb")
EXAMPLES = {"sst2": 30, "stsb": 21}
LONG = " ".join(WORDS[:33])


def make_tokenizer(path, kind="bert", words=WORDS):
    """Words and special tokens, placed as BERT or RoBERTa does."""
    special = BERT_SPECIAL if kind == "bert" else ROBERTA_SPECIAL
    vocabulary = {word: i for i, word in enumerate((*special, *words))}
    unknown = "[UNK]" if kind == "bert" else "<unk>"
    built = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if kind == "bert":
        built.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    else:
        built.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    built.save(str(path))


def make_classifier(directory, task, *, kind="bert", labels=None, extra=None, **fields):
    """Writes a checkpoint; its head has the task's labels in the task's order."""
    roberta = {"pad_token_id": 1, "type_vocab_size": 1} if kind == "roberta" else {}
    config = ClassifierConfig(**{
        "model_type": kind, "vocab_size": 44, "hidden_size": SIDE,
        "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": SIDE,
        "max_position_embeddings": 40, "initializer_range": 0.15,
        "id2label": labels or TASKS[task].labels or ("LABEL_0",), **roberta, **fields,
    })  # fmt: skip
    seed = list(TASKS).index(task)
    model = SequenceClassifier(config, rngs=nnx.Rngs(seed))
    save_classifier(model, config, directory, extra=extra)
    make_tokenizer(directory / "tokenizer.json", kind)
    return directory


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows), "utf-8")


def sentence(rng, low, high):
    return " ".join(rng.choice(WORDS, rng.integers(low, high)))


def write_tasks(root):
    """SST-2 and STS-B in GLUE's own layout, one example of each too long."""
    rng = np.random.default_rng(0)
    rows = ["sentence\tlabel", f"{LONG}\t1"]
    for i in range(EXAMPLES["sst2"] - 1):
        low, high = ((3, 12), (15, 22))[i % 2]
        rows.append(f"{sentence(rng, low, high)}\t{rng.integers(2)}")
    write_rows(root / "SST-2" / "dev.tsv", rows)
    rows = ["index\tgenre\tsentence1\tsentence2\tscore", f"0\tg\t{LONG}\tw1\t2.5"]
    for i in range(EXAMPLES["stsb"] - 1):
        first, second = sentence(rng, 2, 10), sentence(rng, 2, 10)
        rows.append(f"{i + 1}\tg\t{first}\t{second}\t{rng.uniform(0, 5):.3f}")
    write_rows(root / "STS-B" / "dev.tsv", rows)
    return root


class Given(NamedTuple):
    """Checkpoints `bert-sst2`, `bert-stsb`, `roberta-sst2`, and the tasks' files."""

    root: Path
    data: Path

    @property
    def template(self) -> str:
        return str(self.root / "bert-{task}")


@pytest.fixture(scope="session")
def given(tmp_path_factory):
    """Not to be changed."""
    root = tmp_path_factory.mktemp("classifiers")
    for task in TASKS_OF_TABLE:
        make_classifier(root / f"bert-{task}", task)
    make_classifier(root / "roberta-sst2", "sst2", kind="roberta")
    return Given(root, write_tasks(root / "glue"))


@pytest.fixture
def copy(given, tmp_path):
    """The checkpoint for SST-2 and all data, which a test may damage."""
    model = tmp_path / "copy"
    shutil.copytree(given.root / "bert-sst2", model)
    shutil.copytree(given.data, tmp_path / "glue")
    return model


def arguments(model, data, out, *flags):
    """The command line; later flags replace earlier ones."""
    return [
        f"--model={model}", f"--data_dir={data}", f"--out={out}",
        f"--max_length={MAX_LENGTH}", *flags,
    ]  # fmt: skip


def table(model, data, out, *flags):
    """Runs the job and reads its records."""
    assert main(arguments(model, data, out, *flags)) == 0
    (file,) = out.glob("*.jsonl")
    return read_jsonl(file)


def pick(records, **fields):
    """The records with these fields."""
    return [r for r in records if all(r[key] == fields[key] for key in fields)]


def edit_tensors(directory, change):
    path = directory / "model.safetensors"
    tensors = dict(safetensors.numpy.load_file(path))
    change(tensors)
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class Finished(NamedTuple):
    """A whole table: two tasks, all methods, two seeds."""

    records: list[dict[str, Any]]
    printed: str
    out: Path


SEEDS = "--seeds=2"


@pytest.fixture(scope="session")
def finished(given, tmp_path_factory):
    """The table of the tiny BERTs, made once; not to be changed."""
    out = tmp_path_factory.mktemp("finished")
    with as_in_tests(), contextlib.redirect_stdout(io.StringIO()) as printed:
        records = table(given.template, given.data, out, SEEDS)
    return Finished(records, printed.getvalue(), out)


def by_hand(loaded, task, data, max_length=MAX_LENGTH):
    """Outputs and labels without the project's own reading, batching and buckets."""
    backend = tokenizers.Tokenizer.from_file(str(loaded.directory / "tokenizer.json"))
    backend.enable_truncation(max_length, strategy="longest_first")
    lines = (data / TASKS[task].folder / "dev.tsv").read_text("utf-8").splitlines()
    header, *rows = [line.split("\t") for line in lines]
    texts = [header.index(name) for name in header if name.startswith("sentence")]
    run = nnx.jit(lambda model, ids, mask, types: model(ids, mask, types))
    outputs = []
    for row in rows:
        encoding = backend.encode(*(row[i] for i in texts))
        spare = [0] * (max_length - len(encoding.ids))
        pad = [loaded.config.pad_token_id] * len(spare)
        lists = encoding.ids + pad, [1] * len(encoding.ids) + spare
        types = encoding.type_ids + spare
        batch = [jax.numpy.asarray([one], "int32") for one in (*lists, types)]
        outputs.append(np.asarray(run(loaded.model, *batch)[0], np.float64))
    return np.stack(outputs), np.asarray([float(row[-1]) for row in rows])


def numbers(records):
    """What has to be the same in two runs: all but day and time."""
    left_out = ("quantize_seconds", "date")
    return [
        {key: value for key, value in record.items() if key not in left_out}
        for record in records
    ]
