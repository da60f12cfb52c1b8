"""A classifier, a tokenizer and tasks small enough to fine-tune in a test."""

import json

import numpy as np
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from experiments.finetuning.config import FinetuneConfig
from kashin_jax.models import ClassifierConfig, SequenceClassifier, save_classifier

WORDS = ("good", "bad", *(f"w{i}" for i in range(20)))
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
FLAGS = {
    "epochs": 4.0,
    "batch_size": 16,
    "learning_rate": 5e-3,
    "max_length": 24,
    "log_every": 2,
    "checkpoint_every": 5,
}


def tokenizer():
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    built = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    built.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return built


def write_model(directory, **changes):
    """A BERT of one layer with a head of no meaning; matrices are 32 x 32."""
    fields = {
        "model_type": "bert",
        "vocab_size": len(SPECIAL + WORDS),
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 40,
        "initializer_range": 0.1,
    }
    config = ClassifierConfig(**fields | changes)
    model = SequenceClassifier(config, rngs=nnx.Rngs(0))
    save_classifier(model, config, directory)
    tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"lower": False}))
    return directory


def write_tasks(directory):
    """SST-2, told by one word, and STS-B, scored by how many words are shared."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 90), ("dev", 50)):
        rows = ["sentence\tlabel"]
        for _ in range(count):
            words = list(rng.choice(WORDS[2:], rng.choice([2, 5, 11])))
            label = int(rng.integers(2))
            words.insert(int(rng.integers(len(words))), WORDS[1 - label])
            rows.append(f"{' '.join(words)}\t{label}")
        _write(directory / "SST-2" / f"{split}.tsv", rows)
        rows = ["sentence1\tsentence2\tscore"]
        for _ in range(count):
            score = int(rng.integers(6))
            words = rng.choice(WORDS[2:], 10, replace=False)
            second = ["good"] * score + list(words[5:])
            rows.append(f"{' '.join(words[:5])}\t{' '.join(second)}\t{score}")
        _write(directory / "STS-B" / f"{split}.tsv", rows)
    return directory


def _write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n", "utf-8")


def config_of(**changes):
    return FinetuneConfig(**{"task": "sst2", "out": "o"} | FLAGS | changes)


def arguments(**values):
    values = {"task": "sst2"} | FLAGS | values
    return [f"--{name}={value}" for name, value in values.items()]
