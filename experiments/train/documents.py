"""Plain text cut into documents, and the rewrite into WikiText's spacing.

WikiText separates punctuation by spaces, writes `-`, `,` and `.` inside words and
numbers as `@-@`, `@,@` and `@.@`, and marks headings as ` = Title = `. A model trained
on ordinary prose only is surprised by all of it.
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from kashin_jax.errors import DataError

__all__ = ["read_documents", "respace_document", "respace_line", "split_documents"]

# The longest title in the 2014 Wikipedia sample has 88 characters, the shortest
# one-line article 620.
_TITLE_LENGTH = 200

_WIKITEXT_TITLE = re.compile(r" = [^=\s].* = ?$")
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
    if _WIKITEXT_TITLE.match(document.partition("\n")[0]):
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


def split_documents(lines: Iterable[str], *, separator: str = "") -> Iterator[str]:
    """Cuts lines into documents.

    A line equal to `separator` ends a document, and a WikiText title starts one. With
    the default, an empty line, a lone short line is the title of what follows it, a
    WikiText title too; so
    prose whose paragraphs are separated by empty lines becomes one document per
    paragraph, unless another separator is given.

    Args:
      lines: Lines with or without their line break.
      separator: The whole text of a separating line, such as `<|endoftext|>`.

    Yields:
      Documents that hold more than white space, without line breaks at their ends.
    """
    title = ""
    for chunk in _chunks(lines, separator):
        if title and _WIKITEXT_TITLE.match(chunk.partition("\n")[0]):
            yield title
            title = ""
        if not separator and not title and _is_title(chunk):
            title = chunk
            continue
        yield f"{title}\n\n{chunk}" if title else chunk
        title = ""
    if title:
        yield title


def _is_title(chunk: str) -> bool:
    return "\n" not in chunk and len(chunk) <= _TITLE_LENGTH


def _chunks(lines: Iterable[str], separator: str) -> Iterator[str]:
    chunk: list[str] = []
    for line in itertools.chain(lines, [separator]):
        line = line.rstrip("\r\n")
        starts = bool(_WIKITEXT_TITLE.match(line))
        if starts or line == separator:
            text = "\n".join(chunk).strip("\n")
            if text.strip():
                yield text
            chunk = []
        if starts or line != separator:
            chunk.append(line)


def read_documents(path: Path, *, separator: str = "") -> Iterator[str]:
    """Reads the documents of a UTF-8 text file, one at a time.

    Raises:
      DataError: If the file is missing, unreadable or not UTF-8.
    """
    try:
        with open(path, encoding="utf-8") as file:
            yield from split_documents(file, separator=separator)
    except OSError as error:
        raise DataError(
            f"`{path}` cannot be read ({error.strerror}); give an existing text file."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"`{path}` is not UTF-8 text (byte {error.start}); convert it first."
        ) from error
