"""Tokens of a training text: written once to disk, read as one shuffled stream.

Documents may be rewritten into WikiText's spacing: it separates
punctuation by spaces, writes `-`, `,` and `.` inside words and numbers as `@-@`, `@,@`
and `@.@`, and marks headings as ` = Title = `. A model trained on ordinary prose only
is surprised by all of it.
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Int, Shaped
from tqdm import tqdm

from experiments.common.text_documents import WIKITEXT_TITLE, read_documents
from experiments.train.bpe import end_of_text_id, vocabulary_size
from kashin_jax.errors import DataError, UsageError
from kashin_jax.io import atomic_path

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "Corpus",
    "ShuffledStream",
    "TextSource",
    "corpus_fingerprint",
    "load_corpus",
    "respace_document",
    "respace_line",
]

# In the plain articles of that sample nearly all such lines of up to seven words are
# headings; of those with eight words or more none is.
_SECTION = re.compile(r"(?=[A-Z0-9])(?:[^\s.,;:!?\"]+ ){0,6}[^\s.,;:!?\"]+\.$")

_CONTRACTION = r"(?:s|t|d|m|ll|re|ve)\b"
_INNER_NUMBER = re.compile(r"(?<=\d)([.,])(?=\d+(?!\w))")
_INNER_HYPHEN = re.compile(r"(?<=\w)-(?=\w)")
_INNER_DASH = re.compile(r"(?<=\w)([–—])(?=\w)")
_ELLIPSIS = re.compile(r"\.{2,}")
# Initials, `e.g.` and a few abbreviations keep their period, as in WikiText itself.
_ABBREVIATIONS = ("Mr", "Mrs", "Ms", "Dr", "St", "Jr", "No", "Nos", "Co", "Bros", "vs")
_FINAL_PERIOD = re.compile(
    r"(?<=[^\s.@])(?<!\b[A-Z])(?<!\.\w)"
    + "".join(rf"(?<!\b{word})" for word in _ABBREVIATIONS)
    + r"\.(?=[\"'”’)\]]*(?:\s|$))"
)
_CLITIC = re.compile(rf"(?<=\w)(['’])(?={_CONTRACTION}|\s|$)")
_OPENING_QUOTE = re.compile(rf"(?<=\s)(['’])(?!{_CONTRACTION})(?=\w)")
_PUNCTUATION = re.compile(r"(?<!@)([,;:!?()\[\]\"“”%/&$£€…])(?!@)")
_SPACES = re.compile(r" {2,}")


def respace_line(line: str) -> str:
    """Rewrites one line of prose in WikiText's spacing.

    Of the lines of WikiText-2's validation text, joined up again by simple rules, 95 %
    come back exactly; most others hold an abbreviation that is not known here and so
    loses its period to a token of its own.

    Args:
      line: Text without a line break.

    Returns:
      The line without spaces at its ends.
    """
    line = f" {' '.join(line.split())} "
    line = _INNER_NUMBER.sub(r" @\1@ ", line)
    line = _INNER_HYPHEN.sub(" @-@ ", line)
    line = _INNER_DASH.sub(r" \1 ", line)
    line = _FINAL_PERIOD.sub(" .", line)
    line = _ELLIPSIS.sub(r" \g<0> ", line)
    line = _CLITIC.sub(r" \1", line)
    line = _OPENING_QUOTE.sub(r"\1 ", line)
    line = _PUNCTUATION.sub(r" \1 ", line)
    return _SPACES.sub(" ", line).strip()


def respace_document(document: str) -> str:
    """Rewrites an article in WikiText's layout and spacing.

    Args:
      document: An optional title followed by an empty line, then paragraphs of one
        line each. A short line between others with no punctuation but a period at
        its end, as extractors of Wikipedia leave them, becomes a section heading.

    Returns:
      The rewritten article; one that already starts with a WikiText title unchanged.
    """
    if WIKITEXT_TITLE.match(document.partition("\n")[0]):
        return document
    title, empty_line, body = document.partition("\n\n")
    if not empty_line:
        title, body = "", document
    lines = [f" = {respace_line(title)} = ", " "] if title else []
    paragraphs = [line.strip() for line in body.split("\n") if line.strip()]
    for i, line in enumerate(paragraphs):
        if 0 < i < len(paragraphs) - 1 and _SECTION.match(line):
            lines += [" ", f" = = {respace_line(line[:-1])} = = ", " "]
        else:
            lines.append(f" {respace_line(line)} ")
    return "\n".join(lines)


# A new value makes old caches unreadable: raise it when documents are cut differently.
_CACHE_FORMAT = 1
_DOCUMENTS_PER_BATCH = 512


class TextSource(NamedTuple):
    """Text files and what is done to them before they become tokens.

    Attributes:
      paths: UTF-8 files, read in this order.
      separator: See `text_documents.split_documents`.
      wikitext_spacing: Share of the documents rewritten in WikiText's spacing.
      seed: Chooses these documents.
      even_paths: Files read after them, of which documents 0, 2, 4 ... are taken.
    """

    paths: tuple[Path, ...]
    separator: str
    wikitext_spacing: float
    seed: int
    even_paths: tuple[Path, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """All of them."""
        return (*self.paths, *self.even_paths)

    def documents(self) -> Iterator[str]:
        """Yields every document, rewritten or not, always in the same order."""
        chance = np.random.default_rng([self.seed, 0])
        for index, path in enumerate(self.files):
            found = read_documents(path, separator=self.separator)
            step = 1 if index < len(self.paths) else 2
            for document in itertools.islice(found, None, None, step):
                rewritten = chance.random() < self.wikitext_spacing
                yield respace_document(document) if rewritten else document

    def fingerprint(self) -> str:
        """Hash of the files' content and of the treatment, not of the files' names.

        Raises:
          DataError: If a file is missing, unreadable or empty.
        """
        digest = hashlib.sha256()
        for path in self.files:
            digest.update(_file_hash(path))
        seed = self.seed if self.wikitext_spacing else None
        treatment = [self.separator, self.wikitext_spacing, seed]
        # Named only where there are such files: the others keep their fingerprints.
        treatment += [len(self.even_paths)] if self.even_paths else []
        digest.update(json.dumps(treatment).encode())
        return digest.hexdigest()


class Corpus(NamedTuple):
    """Tokens of all documents, end to end.

    Attributes:
      tokens: Without separators; mapped from disk, 2 bytes each where they fit.
      offsets: Where each document starts, and the end of the last.
      separator: Token that stands before every document in the stream.
    """

    tokens: Shaped[np.ndarray, " n"]
    offsets: Int[np.ndarray, " d"]
    separator: int

    @property
    def epoch_tokens(self) -> int:
        """Tokens of one pass, separators included."""
        return len(self.tokens) + len(self.offsets) - 1


def corpus_fingerprint(source: TextSource, tokenizer: "Tokenizer") -> str:
    """Hash of a text, its treatment and a tokenizer; reads the text.

    Raises:
      DataError: If a file is missing, unreadable or empty.
    """
    parts = [str(_CACHE_FORMAT), source.fingerprint(), tokenizer.to_str()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def load_corpus(source: TextSource, tokenizer: "Tokenizer", cache_dir: Path) -> Corpus:
    """Tokenizes a text, or maps the tokens that an earlier call left on disk.

    Args:
      source: The text.
      tokenizer: Holds `</s>`; its post-processor is not used.
      cache_dir: Receives two files per combination of text, treatment and tokenizer.

    Raises:
      DataError: If a file cannot be read or the text holds no token.
      UsageError: If `cache_dir` cannot be written.
    """
    stem = cache_dir / corpus_fingerprint(source, tokenizer)[:24]
    files = _CacheFiles(stem.with_suffix(".tokens"), stem.with_suffix(".offsets.npy"))
    dtype = np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.uint32
    try:
        found = _read_cache(files, dtype)
        if found is None:
            cache_dir.mkdir(parents=True, exist_ok=True)
            _write_cache(source, tokenizer, dtype, files)
            found = _read_cache(files, dtype)
    except OSError as error:
        raise UsageError(
            f"`--cache_dir={cache_dir}` cannot be written ({error.strerror}); choose "
            "another."
        ) from error
    assert found is not None
    return Corpus(*found, end_of_text_id(tokenizer))


class ShuffledStream:
    """The endless stream of shuffled epochs of a corpus.

    Every epoch holds each document once, `</s>` in front, in an order that depends on
    the seed and the number of the epoch alone. Any position can be read without the
    ones before it, so the number of steps done is all that a resumed run has to know.
    """

    def __init__(self, corpus: Corpus, *, seed: int):
        self._corpus = corpus
        self._seed = seed
        self._order = _epoch_order(corpus, seed, 0)

    def read(self, start: int, length: int) -> Int[np.ndarray, " t"]:
        """Cuts out `length` tokens, as int32, from a position of the stream on."""
        pieces = []
        while length > 0:
            epoch, position = divmod(start, self._corpus.epoch_tokens)
            piece = self._read_epoch(epoch, position, length)
            pieces.append(piece)
            start, length = start + len(piece), length - len(piece)
        return np.concatenate(pieces)

    def _read_epoch(
        self, epoch: int, position: int, length: int
    ) -> Int[np.ndarray, " t"]:
        if self._order.epoch != epoch:
            self._order = _epoch_order(self._corpus, self._seed, epoch)
        _, documents, starts = self._order
        first = int(np.searchsorted(starts, position, side="right")) - 1
        last = int(np.searchsorted(starts, position + length, side="left"))
        separator = np.array([self._corpus.separator], np.int32)
        pieces = []
        for document in documents[first:last]:
            begin, end = self._corpus.offsets[document : document + 2]
            pieces += [separator, self._corpus.tokens[begin:end]]
        skipped = position - int(starts[first])
        return np.concatenate(pieces, dtype=np.int32)[skipped : skipped + length]


class _EpochOrder(NamedTuple):
    # Documents in order, and where each starts in the epoch.
    epoch: int
    documents: Int[np.ndarray, " d"]
    starts: Int[np.ndarray, " d"]


def _epoch_order(corpus: Corpus, seed: int, epoch: int) -> _EpochOrder:
    lengths = np.diff(corpus.offsets) + 1
    order = np.random.default_rng([seed, 1, epoch]).permutation(len(lengths))
    return _EpochOrder(epoch, order, np.cumsum(lengths[order]) - lengths[order])


class _CacheFiles(NamedTuple):
    tokens: Path
    offsets: Path


def _read_cache(
    files: _CacheFiles, dtype: type[np.generic]
) -> tuple[np.memmap, Int[np.ndarray, " d"]] | None:
    # None where there is nothing, or something that a crash or a full disk left.
    if not (files.tokens.exists() and files.offsets.exists()):
        return None
    try:
        offsets = np.load(files.offsets)
        tokens = np.memmap(files.tokens, dtype=dtype, mode="r")
    except (ValueError, EOFError):
        return None
    return (tokens, offsets) if tokens.size == offsets[-1] else None


def _write_cache(
    source: TextSource,
    tokenizer: "Tokenizer",
    dtype: type[np.generic],
    files: _CacheFiles,
) -> None:
    with atomic_path(files.tokens) as temporary, open(temporary, "wb") as file:
        lengths = _write_tokens(source, tokenizer, dtype, file)
        if not sum(lengths):
            names = ", ".join(f"`{path}`" for path in source.files)
            raise DataError(f"{names} holds no text; give `--text_file` a larger one.")
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    with atomic_path(files.offsets) as temporary, open(temporary, "wb") as file:
        np.save(file, offsets)


def _write_tokens(
    source: TextSource,
    tokenizer: "Tokenizer",
    dtype: type[np.generic],
    file: IO[bytes],
) -> list[int]:
    lengths = []
    size = sum(path.stat().st_size for path in source.files)
    with tqdm(
        total=size, desc="tokenize", unit="B", unit_scale=True, disable=None
    ) as bar:
        for batch in _batches(source.documents(), _DOCUMENTS_PER_BATCH):
            for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
                file.write(np.asarray(encoding.ids, dtype).tobytes())
                lengths.append(len(encoding.ids))
            bar.update(sum(len(document.encode()) for document in batch))
    return lengths


def _batches(items: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _file_hash(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise DataError(f"`{path}` is empty; give `--text_file` a larger text.")
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise DataError(
            f"`{path}` cannot be read ({error.strerror}); give `--text_file` an "
            "existing text."
        ) from error
