"""Evaluation texts, their protocols, and tokenizers."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from experiments.common import corpora
from experiments.common.text import ASSETS, default_context, load_text, parse_max_tokens
from kashin_jax.errors import CheckpointError, DataError, UsageError
from kashin_jax.evaluation import count_new, count_scored
from kashin_jax.models.tokenizer import (
    TokenizedText,
    Tokenizer,
    bos_token,
    check_vocabulary,
    load_tokenizer,
    with_bos,
)

MODEL = ASSETS / "opt-wiki-18m"


class CharacterTokenizer:
    """One token for each character, so that tokens can be read in an assertion."""

    def __init__(self, bos_id=0):
        self.bos_id = bos_id
        self.vocab_size = 0x110000

    def encode(self, text):
        return np.asarray([ord(c) for c in text], np.int32)

    def encode_with_bytes(self, text):
        sizes = [len(c.encode()) for c in text]
        return TokenizedText(self.encode(text), np.asarray(sizes, np.int32))

    def decode(self, ids, *, skip_special=False):
        return "".join(map(chr, ids.tolist()))


@pytest.fixture(scope="module")
def opt_tokenizer():
    return load_tokenizer(MODEL)


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A user's folder whose texts have some 6,000 characters each."""
    root = tmp_path_factory.mktemp("made_up")
    lines = "".join(f" Line {i} of no text that anyone wrote . \n" for i in range(150))
    written(root / "wikitext2" / "wiki.test.raw", f" \n = Made up = \n{lines}".encode())
    rows = "".join(json.dumps({"text": f"Row {i} " * 40}) + "\n" for i in range(20))
    written(root / "lambada" / "lambada_test.jsonl", rows.encode())
    return root


def test_the_embedded_tokenizer_adds_nothing_by_itself(opt_tokenizer):
    ids = opt_tokenizer.encode(" = Robert Boulter = \n")
    assert ids.dtype == np.int32
    assert ids[0] != opt_tokenizer.bos_id
    assert opt_tokenizer.decode(ids) == " = Robert Boulter = \n"
    assert isinstance(opt_tokenizer, Tokenizer)


HARD = " naïve — 東京\u2028 </s>  Once \n\n 😀😀 ﬁ e\u0301  x "


def pieces_of_sentences(directory):
    """A tokenizer as SentencePiece makes them: marks spaces, drops some, has bytes."""
    import tokenizers

    words = ["<s>", "▁", "▁Once", "n", "a", *(f"<0x{i:02X}>" for i in range(256))]
    model = tokenizers.models.BPE(
        {word: i for i, word in enumerate(words)}, [], byte_fallback=True
    )
    tokenizer = tokenizers.Tokenizer(model)
    normalizers = tokenizers.normalizers
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Strip(), normalizers.Prepend("▁"),
         normalizers.Replace(" ", "▁")]
    )  # fmt: skip
    tokenizer.save(str(directory / "tokenizer.json"))
    return load_tokenizer(directory)


@pytest.mark.parametrize("text", ["", "a", "😀", "  ", HARD, f"\u0301{HARD}"])
def test_every_byte_of_a_text_counts_with_one_token(text, opt_tokenizer, tmp_path):
    for tokenizer in (opt_tokenizer, pieces_of_sentences(tmp_path)):
        ids, sizes = tokenizer.encode_with_bytes(text)
        assert ids.tolist() == tokenizer.encode(text).tolist()
        assert sizes.sum() == (len(text.encode()) if ids.size else 0)
        assert (sizes >= 0).all()
        assert sizes.shape == ids.shape


def test_tokens_count_the_bytes_that_they_decode_to(opt_tokenizer):
    """Wherever a text is cut between characters, of up to four bytes."""
    text = corpora.wiki_vital(None)[:5000] + HARD
    ids, sizes = opt_tokenizer.encode_with_bytes(text)
    places = 0
    for end in range(1, ids.size):
        if "\ufffd" not in (start := opt_tokenizer.decode(ids[:end])):
            assert sizes[:end].sum() == len(start.encode())
            places += 1
    assert ids.size - 30 < places < ids.size - 1


def test_what_begins_a_text_stands_for_no_byte(opt_tokenizer):
    ids, sizes = with_bos(opt_tokenizer, "The city")
    assert ids[0] == opt_tokenizer.bos_id and sizes[0] == 0
    assert ids[1:].tolist() == opt_tokenizer.encode("The city").tolist()
    assert bos_token(opt_tokenizer) == "</s>"
    assert opt_tokenizer.decode(ids) == "</s>The city"
    assert opt_tokenizer.decode(ids, skip_special=True) == "The city"
    without = load_tokenizer(MODEL, bos="none")
    assert without.bos_id is None and bos_token(without) is None
    assert with_bos(without, "The city").ids.tolist() == ids[1:].tolist()
    assert load_tokenizer(MODEL, bos="<pad>").bos_id == 1
    with pytest.raises(UsageError, match="`--bos` must be `auto`, `none` or a token"):
        load_tokenizer(MODEL, bos="<none>")


def test_published_opt_files_give_the_same_tokens(tmp_path, opt_tokenizer):
    """OPT on the hub has no `tokenizer.json`; these are its files, with our vocabulary.

    The oracle for the BOS is transformers, which reads them as GPT-2's tokenizer.
    """
    import transformers

    model = json.loads((MODEL / "tokenizer.json").read_bytes())["model"]
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (tmp_path / "config.json").write_bytes((MODEL / "config.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {"errors": "replace", "unk_token": "</s>", "bos_token": "</s>",
             "eos_token": "</s>", "pad_token": "<pad>", "add_prefix_space": False,
             "add_bos_token": True, "tokenizer_class": "GPT2Tokenizer"}
        )
    )  # fmt: skip
    text = corpora.wiki_vital(None)[:20_000] + " naïve — 東京\u2028 </s>  \n\n"
    ours = load_tokenizer(tmp_path)
    assert (ours.bos_id, ours.vocab_size) == (2, 8192)
    assert np.array_equal(ours.encode(text), opt_tokenizer.encode(text))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    assert [ours.bos_id, *ours.encode(text)] == theirs


def test_truncation_stored_in_a_tokenizer_is_switched_off(tmp_path):
    stored = json.loads((MODEL / "tokenizer.json").read_bytes())
    stored["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    assert load_tokenizer(tmp_path).encode("word " * 50).size >= 50


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"has no tokenizer: add `tokenizer\.json`, or `vocab\.json` and"),
        ({"vocab.json": b"{}"}, "has no tokenizer"),
        ({"tokenizer.json": b'{"version": '}, r"tokenizer\.json` is not a readable"),
        ({"vocab.json": b'{"a": 1', "merges.txt": b"a"}, "not a readable tokenizer"),
    ],
)
def test_a_missing_or_damaged_tokenizer_is_an_error(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path)


def test_a_tokenizer_needs_an_embedding_for_each_of_its_tokens(opt_tokenizer):
    check_vocabulary(opt_tokenizer, 8192)
    with pytest.raises(CheckpointError, match="has 8192 tokens.*is 8191"):
        check_vocabulary(opt_tokenizer, 8191)


def test_the_default_protocol_is_the_raw_file_tokenized_once(opt_tokenizer):
    import tokenizers

    raw = (ASSETS / "wiki_vital" / "test.txt").read_bytes()
    text = load_text("wiki_vital", opt_tokenizer, context=512)
    # The embedded tokenizer's own default puts one </s> in front.
    oracle = tokenizers.Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    assert text.tokens.tolist() == oracle.encode(raw.decode()).ids
    assert text.text_sha256 == hashlib.sha256(raw).hexdigest()
    assert text.notes == ()
    assert text.record_fields() == {
        "dataset": "wiki_vital",
        "protocol": "wiki_vital test file, tokenized once with a BOS in front; "
        "non-overlapping windows of 512 tokens, all but the first predicted; "
        "last partial window kept",
        "context": 512,
        "stride": 512,
        "bos": True,
        # 376,772 tokens in 735 full windows and one of 452.
        "tokens": 735 * 511 + 451,
        "text_sha256": text.text_sha256,
    }


def test_gptq_rows_are_those_of_the_hub_data_set(tmp_path):
    raw = b" \n = Title = \n \n One \x85 line . \n  \n"
    written(tmp_path / "wikitext2" / "wiki.test.raw", raw.replace(b"\x85", b"\xc2\x85"))
    # The hub empties blank rows and leaves all others as they are, "  \n" included here
    # because only " \n" occurs in the real file.
    rows = ["", " = Title = \n", "", " One \x85 line . \n", "  \n"]
    assert corpora.wikitext2_gptq(tmp_path) == "\n\n".join(rows)


def test_gptq_windows_drop_the_remainder(made_up):
    tokenizer = CharacterTokenizer()
    text = load_text("wikitext2-gptq", tokenizer, context=2048, data_dir=made_up)
    windows = text.windows()
    assert text.tokens.size % 2048
    assert len(windows.tokens) == text.tokens.size // 2048
    assert windows.scored[:, 1:].all()
    assert text.notes == ()


def test_lambada_is_cut_and_weighted_as_in_the_paper(made_up):
    text = load_text(
        "lambada", CharacterTokenizer(), context=2048, max_tokens=5000, data_dir=made_up
    )
    assert (text.stride, text.weigh) == (512, count_new)
    windows = text.windows()
    # Later windows score exactly their last 512 tokens.
    assert windows.scored[1, -512:].all() and windows.scored[1].sum() == 512
    assert windows.num_new.tolist()[:3] == [2048, 512, 512]
    assert "stride 512" in text.protocol and "weighted by new tokens" in text.protocol
    # Ten rows of 40 x 6 characters, ten of 40 x 7, 19 spaces, and the BOS.
    assert text.notes == ("Only the first 5,000 of 5,220 tokens are used.",)


def test_lambada_texts_are_joined_by_one_space(tmp_path):
    rows = b'{"text": "One two"}\n{"text": "\\"three\\u2028"}\n'
    written(tmp_path / "lambada" / "lambada_test.jsonl", rows)
    text = load_text("lambada", CharacterTokenizer(7), context=8, data_dir=tmp_path)
    assert text.tokens[0] == 7
    assert CharacterTokenizer().decode(text.tokens[1:]) == 'One two "three\u2028'


@pytest.mark.parametrize(
    ("dataset", "context", "note"),
    [
        ("lambada", 512, "Window and stride coincide at 512 tokens"),
        ("lambada", 300, "Window and stride coincide at 300 tokens"),
        ("lambada", 1024, "these have 1024 and cannot be compared"),
        ("wikitext2-gptq", 512, "these have 512 and cannot be compared"),
    ],
)
def test_a_departure_from_a_published_protocol_is_noted(
    made_up, dataset, context, note
):
    text = load_text(dataset, CharacterTokenizer(), context=context, data_dir=made_up)
    assert len(text.notes) == 1 and note in text.notes[0]
    assert text.stride == min(context, 512)


def test_max_tokens_scores_the_first_tokens_bos_included():
    text = load_text("wiki_vital", CharacterTokenizer(), context=512, max_tokens=8192)
    assert text.tokens.size == 8192 and text.tokens[0] == 0
    assert text.windows().tokens.shape == (16, 512)
    assert text.record_fields()["tokens"] == 16 * 511
    assert text.notes[0].startswith("Only the first 8,192 of ")


def test_a_tokenizer_without_bos_is_recorded_as_such(tmp_path):
    path = written(tmp_path / "t.txt", b"abc")
    text = load_text("", CharacterTokenizer(None), context=4, text_file=path)
    assert text.tokens.tolist() == [97, 98, 99]
    assert text.record_fields()["bos"] is False and "BOS" not in text.protocol


def test_a_text_file_is_scored_byte_for_byte(tmp_path):
    content = "line\r\n\r\nline \u2028 東京\n".encode()
    path = written(tmp_path / "mine.txt", content)
    text = load_text("wikitext2", CharacterTokenizer(), context=4, text_file=path)
    assert CharacterTokenizer().decode(text.tokens[1:]).encode() == content
    assert text.text_sha256 == hashlib.sha256(content).hexdigest()
    assert (text.name, text.weigh) == ("text_file:mine.txt", count_scored)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "mine.txt` is empty"),
        (b" \n\n", "mine.txt` is empty"),
        (b"caf\xe9", r"mine.txt` is not UTF-8 text \(byte 3\)"),
        (None, "mine.txt` cannot be read"),
    ],
)
def test_a_bad_text_file_is_an_error_that_names_it(tmp_path, content, message):
    path = tmp_path / "mine.txt"
    if content is not None:
        written(path, content)
    with pytest.raises(DataError, match=message):
        load_text("wikitext2", CharacterTokenizer(), context=4, text_file=path)


@pytest.mark.parametrize(
    "row", [b"", b"{", b"[1]", b'{"txt": "a"}', b'{"text": 3}', b'"text"']
)
def test_a_malformed_row_is_an_error_that_names_its_line(tmp_path, row):
    rows = b'{"text": "fine"}\n' + row + b'\n{"text": "fine"}\n'
    written(tmp_path / "lambada" / "lambada_test.jsonl", rows)
    with pytest.raises(DataError, match=r"lambada_test.jsonl` line 2 "):
        load_text("lambada", CharacterTokenizer(), context=4, data_dir=tmp_path)


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("wikitext", {"context": 8}, "one of wiki_vital, .*lambada.*Got wikitext"),
        ("text_file", {"context": 8}, "or give --text_file"),
        ("lambada", {"context": 1}, "`--context` must be at least 2. Got 1"),
        ("lambada", {"context": 8, "max_tokens": 1}, "`--max_tokens`.*Got 1"),
        ("lambada", {"context": 8, "max_tokens": -8}, "`--max_tokens`.*Got -8"),
    ],
)
def test_options_that_cannot_work_are_refused(dataset, options, message):
    with pytest.raises(UsageError, match=message):
        load_text(dataset, CharacterTokenizer(), **options)


def test_a_text_shorter_than_one_gptq_window_is_refused(made_up):
    options = {"context": 2048, "max_tokens": 100, "data_dir": made_up}
    with pytest.raises(DataError, match="context=2048.*Got 100"):
        load_text("wikitext2-gptq", CharacterTokenizer(), **options)


def test_max_tokens_is_a_number_or_all():
    assert parse_max_tokens("8192") == 8192
    assert parse_max_tokens("all") is None
    for value in ("ALL", "", "-1", "8k", "1e4", "²", "8_192"):
        with pytest.raises(UsageError, match=f"`--max_tokens`.*Got {value}"):
            parse_max_tokens(value)


def test_default_contexts():
    assert default_context("wikitext2", 512) == 512
    assert default_context("wikitext2-gptq", 4096) == 2048
    assert default_context("wikitext2-gptq", 512) == 512
    assert default_context("lambada", 2048) == default_context("ptb", 2048) == 2048
    assert default_context("wiki_vital", 4096) == default_context("", 4096) == 4096


def test_importing_the_experiments_library_loads_no_optional_package():
    program = (
        "import sys\n"
        "from experiments.common import plots, resumable, text\n"
        "heavy = {'transformers', 'tokenizers', 'datasets', 'matplotlib', 'torch'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ASSETS.parents[1])
