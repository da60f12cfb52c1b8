"""A tiny OPT checkpoint with a tokenizer and a text of its own, and the main job on it.

Two blocks, width 64, weights larger than a fresh model's, so that quantizing changes
the perplexity in its leading digits.
"""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
import safetensors.numpy
import tokenizers
from flax import nnx

from experiments.common.results import read_jsonl
from experiments.common.text import ASSETS
from experiments.opt_ppl import main
from kashin_jax.models.opt import OPTConfig, OPTForCausalLM
from kashin_jax.models.saving import save_opt

VOCABULARY = 320
POSITIONS = 64
CONTEXT = 32
LINEARS = 12


def make_tokenizer(text, path, size=VOCABULARY):
    """A byte-level BPE learned from the text itself."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "<pad>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(path))


def make_checkpoint(directory, *, seed=0, ffn_dim=64):
    """Writes the checkpoint, and the text it is scored on beside it."""
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        ffn_dim=ffn_dim,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        init_std=0.15,
    )
    save_opt(OPTForCausalLM(config, rngs=nnx.Rngs(seed)), config, directory)
    text = (ASSETS / "wiki_vital" / "valid.txt").read_text("utf-8")[:1500]
    directory.with_suffix(".txt").write_text(text, "utf-8")
    make_tokenizer(text, directory / "tokenizer.json")
    return directory


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The checkpoint; not to be changed."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def copy(tiny, tmp_path):
    """A checkpoint that a test may damage."""
    directory = tmp_path / "copy"
    shutil.copytree(tiny, directory)
    return directory


def arguments(model, out, *flags, text=None):
    """The command line; later flags replace earlier ones."""
    text = model.with_suffix(".txt") if text is None else text
    return [
        f"--model={model}", f"--out={out}", f"--text_file={text}",
        f"--context={CONTEXT}", *flags,
    ]  # fmt: skip


def table(model, out, *flags, text=None):
    """Runs the main job and reads its records."""
    assert main(arguments(model, out, *flags, text=text)) == 0
    (file,) = out.glob("*.jsonl")
    return read_jsonl(file)


def row(records, method, **fields):
    """The one record of a method with these fields."""
    (found,) = (
        record
        for record in records
        if record["method"] == method
        and all(record[key] == value for key, value in fields.items())
    )
    return found


def edit_tensors(directory, change):
    """Loads, changes and saves the weights as any other program could."""
    path = directory / "model.safetensors"
    tensors = dict(safetensors.numpy.load_file(path))
    change(tensors)
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})


def edit_config(directory, change):
    path = directory / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@contextlib.contextmanager
def as_in_tests():
    """The settings of `conftest.py`, for fixtures that live longer than a test.

    They are part of what JAX compiles for, so tests reuse what such a fixture compiled.
    """
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


class Finished(NamedTuple):
    """A whole table, all methods, two seeds."""

    records: list[dict[str, Any]]
    printed: str
    out: Path


SEEDS = "--seed=0,1"


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """The table of the tiny checkpoint, made once; not to be changed."""
    out = tmp_path_factory.mktemp("finished")
    with as_in_tests(), contextlib.redirect_stdout(io.StringIO()) as printed:
        records = table(tiny, out, SEEDS)
    return Finished(records, printed.getvalue(), out)


def numbers(records):
    """What has to be the same in two runs: all but day and time."""
    left_out = ("quantize_seconds", "date")
    return [
        {key: value for key, value in record.items() if key not in left_out}
        for record in records
    ]
