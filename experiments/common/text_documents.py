"""A text cut into documents: articles, or what stands between separating lines."""

import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from kashin_jax.errors import DataError

__all__ = ["WIKITEXT_TITLE", "read_documents", "split_documents"]

# The longest title in the 2014 Wikipedia sample has 88 characters, the shortest
# one-line article 620.
_TITLE_LENGTH = 200

WIKITEXT_TITLE = re.compile(r" = [^=\s].* = ?$")
"""The first line of an article in WikiText's layout."""


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
        if title and WIKITEXT_TITLE.match(chunk.partition("\n")[0]):
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
        starts = bool(WIKITEXT_TITLE.match(line))
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
