"""Sentences and pairs as a classifier's tokens."""

import json
import shutil

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from experiments.classification.data import Examples, load_examples
from experiments.classification.encoding import encode_examples
from experiments.classification.tasks import TASKS
from experiments.common.text import ASSETS
from experiments.train import bpe
from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.models.tokenizer import (
    check_padding,
    check_vocabulary,
    load_pair_tokenizer,
)

BERT = ASSETS / "minilm-glue"
STRANGE = ("naïve — 東京\u2028 [SEP]  x", "</s> don't\t  stop ", "  ", "A" * 300)


@pytest.fixture(scope="module")
def sentences():
    return load_examples(TASKS["sentiment-amazon"], "amazon").first[:60]


@pytest.fixture(scope="module")
def pairs(sentences):
    others = load_examples(TASKS["sentiment-nyt"], "nyt").first[: len(sentences)]
    return sentences, others


@pytest.fixture(scope="module")
def roberta(tmp_path_factory, sentences):
    """A byte-level tokenizer as RoBERTa's, learned here, in `tokenizer.json`."""
    directory = tmp_path_factory.mktemp("roberta")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), add_prefix_space=False
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text('{"model_type": "roberta"}')
    return directory


@pytest.fixture(scope="module")
def roberta_files(tmp_path_factory, roberta):
    """The same tokenizer as `vocab.json` and `merges.txt`."""
    directory = tmp_path_factory.mktemp("roberta_files")
    model = json.loads((roberta / "tokenizer.json").read_text())["model"]
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
    (directory / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    shutil.copy(roberta / "config.json", directory)
    return directory


@pytest.fixture(scope="module")
def bert_files(tmp_path_factory):
    """The embedded tokenizer as BERT's `vocab.txt`."""
    directory = tmp_path_factory.mktemp("bert_files")
    for name in ("vocab.txt", "config.json"):
        shutil.copy(BERT / name, directory)
    return directory


@pytest.fixture(params=["bert", "bert_files", "roberta", "roberta_files"])
def checkpoint(request):
    return BERT if request.param == "bert" else request.getfixturevalue(request.param)


def examples_of(first, second=None):
    labels = np.zeros(len(first), np.int32)
    return Examples(tuple(first), second and tuple(second), labels, "test", "")


def ragged(encoded, name):
    cut = np.split(getattr(encoded, name), encoded.offsets[1:-1])
    return [part.tolist() for part in cut]


def assert_as_in_transformers(directory, first, second, max_length):
    """The oracle reads the directory by itself, as `run_glue` does."""
    oracle = transformers.AutoTokenizer.from_pretrained(directory)
    options = {"return_token_type_ids": True, "verbose": False}
    theirs = oracle(
        list(first), second and list(second), truncation=True, max_length=max_length,
        **options,
    )  # fmt: skip
    whole = oracle(list(first), second and list(second), **options)["input_ids"]
    ours = encode_examples(
        load_pair_tokenizer(directory), examples_of(first, second), max_length
    )
    assert ragged(ours, "input_ids") == theirs["input_ids"]
    assert ragged(ours, "token_type_ids") == theirs["token_type_ids"]
    assert ours.num_truncated == sum(len(ids) > max_length for ids in whole)
    assert ours.input_ids.dtype == ours.token_type_ids.dtype == np.int32
    return ours


def test_sentences_are_encoded_as_in_transformers(checkpoint, sentences):
    ours = assert_as_in_transformers(checkpoint, (*sentences, *STRANGE), None, 24)
    assert ours.num_truncated > 0


def test_pairs_are_encoded_as_in_transformers(checkpoint, pairs):
    first, second = pairs
    ours = assert_as_in_transformers(
        checkpoint, (*first, *STRANGE), (*second, *STRANGE[::-1]), 512
    )
    assert ours.num_truncated == 0


@pytest.mark.parametrize("max_length", [6, 31])
def test_pairs_are_truncated_as_in_transformers(checkpoint, pairs, max_length):
    # The oracle takes tokens off one by one.
    first, second = (texts[:15] for texts in pairs)
    ours = assert_as_in_transformers(checkpoint, first, second, max_length)
    assert ours.lengths.max() == max_length and ours.num_truncated > 0


def test_pairs_look_as_the_models_were_trained(roberta):
    bert = encode_examples(load_pair_tokenizer(BERT), examples_of(["a"], ["b b"]), 8)
    assert bert.input_ids.tolist() == [101, 1037, 102, 1038, 1038, 102]
    assert bert.token_type_ids.tolist() == [0, 0, 0, 1, 1, 1]
    a, b = (load_pair_tokenizer(roberta).backend.token_to_id(c) for c in "ab")
    ours = encode_examples(load_pair_tokenizer(roberta), examples_of(["a"], ["b"]), 8)
    assert ours.input_ids.tolist() == [0, a, 2, 2, b, 2]
    assert ours.token_type_ids.tolist() == [0] * 6


def test_an_encoding_depends_on_no_earlier_one(pairs):
    tokenizer = load_pair_tokenizer(BERT)
    whole = encode_examples(tokenizer, examples_of(*pairs), 128)
    assert encode_examples(tokenizer, examples_of(*pairs), 8).lengths.max() == 8
    again = encode_examples(tokenizer, examples_of(*pairs), 128)
    assert np.array_equal(again.input_ids, whole.input_ids)


def test_more_examples_than_are_encoded_at_once_stay_in_order():
    texts = [f"{i}" for i in range(5000)]
    tokenizer = load_pair_tokenizer(BERT)
    encoded = encode_examples(tokenizer, examples_of(texts), 16)
    decoded = tokenizer.backend.decode_batch(ragged(encoded, "input_ids"))
    assert decoded == texts


def test_padding_and_truncation_stored_in_a_tokenizer_are_switched_off(tmp_path):
    stored = tokenizers.Tokenizer.from_file(str(BERT / "tokenizer.json"))
    stored.enable_padding(length=32)
    stored.enable_truncation(4)
    stored.save(str(tmp_path / "tokenizer.json"))
    encoded = encode_examples(
        load_pair_tokenizer(tmp_path), examples_of(["a", "a b c d e"]), 32
    )
    assert encoded.lengths.tolist() == [3, 7]
    assert encoded.num_truncated == 0


@pytest.mark.parametrize(("second", "least"), [(None, 3), (["b"], 5)])
def test_a_length_without_room_for_text_is_refused(second, least):
    tokenizer = load_pair_tokenizer(BERT)
    texts = examples_of(["a a a"], second)
    assert encode_examples(tokenizer, texts, least).lengths.tolist() == [least]
    with pytest.raises(UsageError, match=f"at least {least}, .* Got {least - 1}"):
        encode_examples(tokenizer, texts, least - 1)


def test_a_language_models_tokenizer_is_no_classifiers():
    with pytest.raises(CheckpointError, match="no special tokens around and between"):
        load_pair_tokenizer(ASSETS / "opt-wiki-18m")


@pytest.mark.parametrize(
    "post_processor",
    [
        None,
        processors.TemplateProcessing(
            single="<s> $A </s>",
            pair="<s> $A $B </s>",
            special_tokens=[("<s>", 0), ("</s>", 2)],
        ),
    ],
)
def test_a_tokenizer_that_runs_sentences_together_is_refused(
    tmp_path, roberta, post_processor
):
    bare = json.loads((roberta / "tokenizer.json").read_text())
    bare["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(bare))
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    if post_processor is not None:
        tokenizer.post_processor = post_processor
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="no special tokens around and between"):
        load_pair_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"has no tokenizer: add `tokenizer\.json`.* or `vocab\.txt`"),
        ({"merges.txt": "a b"}, "has no tokenizer"),
        ({"tokenizer.json": "{}"}, r"tokenizer\.json` is not a readable tokenizer"),
        ({"vocab.txt": "[CLS]\na"}, r"`vocab\.txt` in .*: not a readable tokenizer"),
    ],
)
def test_a_missing_or_damaged_tokenizer_is_a_one_line_error(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_pair_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_classifier_needs_an_embedding_for_each_token():
    tokenizer = load_pair_tokenizer(BERT)
    check_vocabulary(tokenizer, 30522)
    with pytest.raises(CheckpointError, match="has 30522 tokens.*is 30521"):
        check_vocabulary(tokenizer, 30521)


def test_a_tokenizer_of_the_other_kind_of_model_is_refused(roberta):
    check_padding(load_pair_tokenizer(BERT), 0)
    check_padding(load_pair_tokenizer(roberta), 1)
    with pytest.raises(
        CheckpointError, match="pads with token 0, .*`pad_token_id` is 1"
    ):
        check_padding(load_pair_tokenizer(BERT), 1)


def test_training_reads_tokenizers_by_the_same_code(tmp_path):
    with pytest.raises(CheckpointError, match="json` is missing; `--tokenizer` names"):
        bpe.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not a readable tokenizer"):
        bpe.load_tokenizer(tmp_path)
    shutil.copy(BERT / "tokenizer.json", tmp_path)
    with pytest.raises(CheckpointError, match="has no token `</s>`"):
        bpe.load_tokenizer(tmp_path)
