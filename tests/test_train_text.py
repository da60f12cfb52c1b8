"""Training text: documents, WikiText's spacing, tokens and their shuffled stream."""

import collections
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from experiments.common.text_documents import read_documents, split_documents
from experiments.train.bpe import load_tokenizer, train_tokenizer
from experiments.train.corpus import (
    Corpus,
    ShuffledStream,
    TextSource,
    corpus_fingerprint,
    load_corpus,
    respace_document,
    respace_line,
)
from kashin_jax.errors import DataError

ASSETS = Path(__file__).resolve().parents[1] / "experiments" / "assets"
TEXTS = ASSETS / "wiki_vital"
# Made-up lines in WikiText's spacing, with all that it writes in a way of its own.
WIKITEXT = """\
 The harbour was built in 1887 by a well @-@ known engineer , and paid by two towns .
 It holds 1 @,@ 250 boats ( 40 @.@ 5 % of them sailing ) and costs $ 3 @.@ 2 a day .
 " We don 't need a bigger one , " said the mayor ; " ours hasn 't been full . "
 The town 's council met at 18 : 05 , as it always had : seven members , all late .
 Ferries run on 5 – 6 days a week and / or by night [ 12 ] , in summer on all of them .
 A. B. Miller drew the plans with St. Mary 's tower in the middle of the picture .
 Was it worth it ? They 'd say yes ! The keepers ' houses have stood there ever since .
 Trade with the islands rose from £ 20 @,@ 000 to £ 1 @.@ 5 million in 30 years .
 A half @-@ sunk barge — the oldest of three — still lies in the north @-@ east corner .
"""


def wikitext_articles():
    """Two articles in WikiText's layout."""
    first, second = WIKITEXT.split(" Ferries", 1)
    return (
        f" = Old harbour = \n \n{first} \n = = Ferries = = \n \n Ferries{second} \n"
        f" = Another harbour = \n \n{first}"
    )


def source_of(*paths, spacing=0.0, seed=0, separator=""):
    return TextSource(paths, separator, spacing, seed)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ASSETS / "opt-wiki-18m")


# The right sides are as WikiText writes it.
@pytest.mark.parametrize(
    ("prose", "wikitext"),
    [
        (
            "weighing up to 5–6 kilograms (11–13 lb), although the lobsters",
            "weighing up to 5 – 6 kilograms ( 11 – 13 lb ) , although the lobsters",
        ),
        ("weigh 0.7–2.2 kg", "weigh 0 @.@ 7 – 2 @.@ 2 kg"),
        ("only 1 larva in every 20,000", "only 1 larva in every 20 @,@ 000"),
        (
            "H. americanus are red or red-tipped, while",
            "H. americanus are red or red @-@ tipped , while",
        ),
        ('said to be "berried" and', 'said to be " berried " and'),
        ("Squadron's", "Squadron 's"),
        ("don't; wasn't!", "don 't ; wasn 't !"),
        ("79% of $2 and/or 18:05", "79 % of $ 2 and / or 18 : 05"),
        ("U.S. Navy, E.F. Codd at home.", "U.S. Navy , E.F. Codd at home ."),
        ('He said "no."', 'He said " no . "'),
        ("two   spaces\tand a tab", "two spaces and a tab"),
        ("", ""),
    ],
)
def test_prose_takes_the_spacing_of_wikitext(prose, wikitext):
    assert respace_line(prose) == wikitext


def test_joined_up_lines_of_wikitext_come_back_exactly():
    joins = [
        (r" @([-.,])@ ", r"\1"),
        (r" ([.,;:!?%)\]])", r"\1"),
        (r"([(\[$£€]) ", r"\1"),
        (r'" ([^"]*?) "', r'"\1"'),
        (r" '(s|t|d|m|ll|re|ve)\b", r"'\1"),
        (r" ([–/]) ", r"\1"),
    ]
    for line in map(str.strip, WIKITEXT.splitlines()):
        joined = line
        for pattern, replacement in joins:
            joined = re.sub(pattern, replacement, joined)
        assert joined != line
        assert respace_line(joined) == line


def test_an_article_takes_the_layout_of_wikitext():
    article = "Ian West\n\nIan West (born 1951) is well-known.\nEarly life.\nHe sang."
    assert respace_document(article) == (
        " = Ian West = \n \n Ian West ( born 1951 ) is well @-@ known . \n"
        " \n = = Early life = = \n \n He sang . "
    )


def test_an_article_of_wikitext_is_left_alone(tmp_path):
    path = tmp_path / "articles.txt"
    path.write_text(wikitext_articles(), "utf-8")
    articles = list(read_documents(path))
    assert [article.partition("\n")[0] for article in articles] == [
        " = Old harbour = ", " = Another harbour = "
    ]  # fmt: skip
    for article in articles:
        assert respace_document(article) == article


@pytest.mark.parametrize(("name", "count"), [("calibration", 4498), ("valid", 1755)])
def test_the_known_numbers_of_articles_are_found(name, count):
    """Those of ASSETS.md, known from the source and not from this program."""
    documents = list(read_documents(TEXTS / f"{name}.txt"))
    assert len(documents) == count
    assert all(document.startswith(" = ") for document in documents)


@pytest.mark.parametrize(
    ("text", "separator", "documents"),
    [
        ("a\nb\n\n\nc\nd", "", ["a\nb", "c\nd"]),
        ("Title\n\na\nb\n\nEnd", "", ["Title\n\na\nb", "End"]),
        ("Title\n\n = T = \n x ", "", ["Title", " = T = \n x "]),
        (" = T = \n x \n = U = \n y ", "", [" = T = \n x ", " = U = \n y "]),
        (" = T = \n\n x \n\n = U = \n\n y ", "", [" = T = \n\n x ", " = U = \n\n y "]),
        (" = T = \n\n = U = \n\n y ", "", [" = T = ", " = U = \n\n y "]),
        (" = T = \n = = S = = \n x ", "", [" = T = \n = = S = = \n x "]),
        ("a\r\nb\r\n\r\nc\nd", "", ["a\nb", "c\nd"]),
        ("a\n\nb\n--\nc\n--\n\n--", "--", ["a\n\nb", "c"]),
        ("x" * 201 + "\n\nlast", "", ["x" * 201, "last"]),
        ("\n \n\n", "", []),
    ],
)
def test_documents_end_where_they_should(text, separator, documents):
    lines = text.splitlines(keepends=True)
    assert list(split_documents(lines, separator=separator)) == documents


def test_the_share_of_rewritten_documents_is_the_one_asked_for(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"Well-known {i}.\nYes." for i in range(500)))
    for share in (0.0, 0.8, 1.0):
        documents = list(source_of(path, spacing=share).documents())
        rewritten = sum("Well @-@ known" in document for document in documents)
        assert len(documents) == 500
        assert rewritten / 500 == pytest.approx(share, abs=0.06 if share == 0.8 else 0)
    assert documents == list(source_of(path, spacing=1.0).documents())


@st.composite
def corpora(draw):
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=9))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Corpus(np.arange(10, 10 + offsets[-1], dtype=np.uint16), offsets, 2)


@settings(max_examples=40, deadline=None)
@given(corpora(), st.integers(0, 120), st.integers(1, 60), st.integers(0, 3))
def test_any_piece_of_the_stream_can_be_read_alone(corpus, start, length, seed):
    whole = ShuffledStream(corpus, seed=seed).read(0, start + length)
    piece = ShuffledStream(corpus, seed=seed).read(start, length)
    assert piece.dtype == np.int32
    np.testing.assert_array_equal(piece, whole[start:])


@settings(max_examples=40, deadline=None)
@given(corpora(), st.integers(0, 3), st.integers(0, 3))
def test_every_epoch_holds_each_document_once_behind_a_separator(corpus, epoch, seed):
    size = corpus.epoch_tokens
    tokens = ShuffledStream(corpus, seed=seed).read(epoch * size, size)
    assert tokens[0] == corpus.separator
    found = np.split(tokens, np.flatnonzero(tokens == corpus.separator))[1:]
    expected = np.split(corpus.tokens, corpus.offsets[1:-1])
    assert collections.Counter(tuple(piece[1:]) for piece in found) == (
        collections.Counter(tuple(map(int, piece)) for piece in expected)
    )


def test_epochs_and_seeds_have_orders_of_their_own():
    offsets = np.arange(0, 101)
    corpus = Corpus(np.arange(100, 200, dtype=np.uint16), offsets, 2)
    orders = {
        tuple(ShuffledStream(corpus, seed=seed).read(epoch * 200, 200))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_a_text_is_tokenized_once_and_kept_as_it_was(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    documents = ["First\nline", "Second\n<unk> line ☆", " = Third = \n x "]
    path.write_text("\n\n".join(documents), "utf-8")
    corpus = load_corpus(source_of(path), tokenizer, tmp_path / "cache")
    assert corpus.tokens.dtype == np.uint16 and corpus.separator == 2
    pieces = np.split(corpus.tokens, corpus.offsets[1:-1])
    assert [tokenizer.decode(p, skip_special_tokens=False) for p in pieces] == documents

    files = {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").iterdir()}
    assert len(files) == 2
    renamed = path.rename(tmp_path / "renamed.txt")
    again = load_corpus(source_of(renamed), tokenizer, tmp_path / "cache")
    np.testing.assert_array_equal(again.tokens, corpus.tokens)
    assert files == {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").iterdir()}

    for file in files:
        file.write_bytes(file.read_bytes()[:-2])
        repaired = load_corpus(source_of(renamed), tokenizer, tmp_path / "cache")
        np.testing.assert_array_equal(repaired.tokens, corpus.tokens)


def test_another_text_treatment_or_tokenizer_is_another_corpus(tokenizer, tmp_path):
    text, other = tmp_path / "a.txt", tmp_path / "b.txt"
    text.write_text("Some well-known text.")
    other.write_text("Some well-known text!")
    coarse = train_tokenizer(["Some well-known text."], vocab_size=262)
    fingerprints = {
        corpus_fingerprint(source_of(text), tokenizer),
        corpus_fingerprint(source_of(text), coarse),
        corpus_fingerprint(source_of(other), tokenizer),
        corpus_fingerprint(source_of(text, other), tokenizer),
        corpus_fingerprint(source_of(text, separator="--"), tokenizer),
        corpus_fingerprint(source_of(text, spacing=0.5), tokenizer),
        corpus_fingerprint(source_of(text, spacing=0.5, seed=1), tokenizer),
    }
    assert len(fingerprints) == 7
    assert corpus_fingerprint(source_of(text, seed=1), tokenizer) in fingerprints


def test_a_large_vocabulary_keeps_its_last_tokens(tmp_path):
    words = {"</s>": 0} | {f"w{i}": i for i in range(1, 70_000)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = tmp_path / "text.txt"
    path.write_text("w65535 w65536 w69999")
    corpus = load_corpus(source_of(path), tokenizer, tmp_path / "cache")
    assert corpus.tokens.tolist() == [65535, 65536, 69999]


def test_a_text_that_ends_in_garbage_leaves_no_file(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"Fine.\nYes.\n\n" * 2000 + b"\xff\xfe")
    with pytest.raises(DataError, match="is not UTF-8"):
        load_corpus(source_of(path), tokenizer, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_new_tokenizer_has_the_special_tokens_of_opt():
    text = (TEXTS / "calibration.txt").read_text("utf-8")[:20_000]
    tokenizer = train_tokenizer([text], vocab_size=500)
    assert tokenizer.get_vocab_size() == 500
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    assert [tokenizer.id_to_token(i) for i in range(4)] == special
    assert tokenizer.encode("Any text").ids[0] == 2
    strange = "\x00 Ünïcødé ☆ \n\n \U0001f600"
    ids = tokenizer.encode(strange, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == strange
    assert tokenizer.to_str() == train_tokenizer([text], vocab_size=500).to_str()
