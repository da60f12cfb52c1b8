"""Figures quoted in prose: `docs/quoted.toml` says which records they come from.

The top of that file describes it.
"""

import math
import re
import statistics
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.common.tables import Record
from experiments.documents.views import select
from kashin_jax.errors import DataError

__all__ = [
    "Constant",
    "Quote",
    "missing_quotes",
    "numbers_without_source",
    "read_quotes",
    "rendered",
]

_OF: dict[str, Callable[[list[float]], float]] = {
    "mean": statistics.fmean,
    "min": min,
    "max": max,
    "spread": statistics.stdev,
    "sum": math.fsum,
    "count": len,
}
_PLACE = re.compile(r"\{(\w+)\}")


class Quote(NamedTuple):
    """A sentence, or a part of one, with the numbers in it.

    Attributes:
      document: Its path in the repository.
      text: With `{name}` in place of each number.
      numbers: By name.
    """

    document: str
    text: str
    numbers: Mapping[str, Mapping[str, Any]]


class Constant(NamedTuple):
    """A number that no record holds, with the words around it, and why it is none."""

    document: str
    text: str
    reason: str


def read_quotes(path: Path) -> tuple[list[Quote], list[Constant]]:
    """What `docs/quoted.toml` lists.

    Raises:
      DataError: If it is missing or not as described at its top.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
        quotes = [_quote(entry) for entry in found.get("quote", [])]
        constants = [Constant(**entry) for entry in found.get("constant", [])]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"`{path}` cannot be used ({error}); see its top.") from error
    return quotes, constants


def _quote(entry: dict[str, Any]) -> Quote:
    document, text = entry.pop("document"), entry.pop("text")
    own = entry.pop("numbers")
    where = entry.pop("where", {})
    numbers = {
        name: entry | number | {"where": where | number.get("where", {})}
        for name, number in own.items()
    }
    if set(_PLACE.findall(text)) != set(numbers):
        raise ValueError(f"the numbers of {text!r} are not those in its braces")
    return Quote(document, text, numbers)


def _shown(quote: Quote, name: str, files: Mapping[str, Sequence[Record]]) -> str:
    """One number as the document has it.

    Raises:
      DataError: If no record, or more than one value, is there for it.
    """
    number = quote.numbers[name]
    place = f"`docs/quoted.toml`, {quote.text!r}, {name}"
    found = select(files.get(number["file"], []), number["where"])
    values = [_field(record, number["field"]) for record in found]
    # A list is the values of several seeds.
    values = [v for value in values for v in _several(value) if v is not None]
    if not values:
        raise DataError(
            f"{place}: no record of {number['file']} fits {found or number}"
        )
    of = number.get("of")
    if of is None and len(set(values)) > 1:
        raise DataError(
            f"{place}: {len(values)} records fit; say more in `where`, or give `of`."
        )
    value = values[0] if of is None else _OF[of](values)
    value *= number.get("scale", 1)
    text = format(value, number["show"].removeprefix("bare "))
    if number["show"].startswith("bare "):
        text = re.sub(r"^(-?)0\.", r"\1.", text)
    return text


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _field(record: Record, path: str) -> Any:
    """A field, `a.b` being the entry b of the field a; a list's entry by its index."""
    value: Any = record
    for part in path.split("."):
        if value is None:
            return None
        value = value[int(part)] if isinstance(value, list) else value.get(part)
    return value


def rendered(
    quote: Quote, files: Mapping[str, Sequence[Record]]
) -> tuple[str, list[tuple[int, int]]]:
    """The text with its numbers, and where in it they stand.

    Raises:
      DataError: If a number cannot be found.
    """
    text, spans, last = "", [], 0
    source = " ".join(quote.text.split())
    for match in _PLACE.finditer(source):
        text += source[last : match.start()]
        shown = _shown(quote, match[1], files)
        spans.append((len(text), len(text) + len(shown)))
        text, last = text + shown, match.end()
    return text + source[last:], spans


_NO_PROSE = re.compile(
    r"<!-- table: .*?<!-- end of table -->|```.*?```|^ {4}.*?$|`[^`]*`|^\|.*?$"
    r"|\]\([^)]*\)|<!--.*?-->|https?://\S+",
    re.DOTALL | re.MULTILINE,
)
_DECIMAL = re.compile(r"(?<![\w.])\d*\.\d+(?![\w.]*\w)")


def missing_quotes(
    contents: Mapping[str, str],
    quotes: Sequence[Quote],
    constants: Sequence[Constant],
    files: Mapping[str, Sequence[Record]],
) -> Iterator[str]:
    """What documents do not say, however their lines are broken.

    Args:
      contents: Text by document.
      quotes: Each with the numbers of its records must be in its document.
      constants: Each must be in its document.
      files: Records by result file.

    Raises:
      DataError: If a number cannot be found.
    """
    said = [(q.document, rendered(q, files)[0]) for q in quotes]
    said += [(c.document, c.text) for c in constants]
    for document, text in said:
        if _squeezed(text) not in _squeezed(contents.get(document, "")):
            yield f"{document} does not say `{' '.join(text.split())}`"


def numbers_without_source(
    document: str,
    content: str,
    quotes: Sequence[Quote],
    constants: Sequence[Constant],
    files: Mapping[str, Sequence[Record]],
) -> list[str]:
    """Decimal numbers of the prose that neither a record nor a constant stands behind.

    Args:
      document: Path of the document.
      content: Its text.
      quotes: Of all documents.
      constants: Of all documents.
      files: Records by result file.

    Returns:
      Each with some words around it.
    """
    # Code and tables are blanked, not cut out: quotes may contain code.
    prose = _NO_PROSE.sub(lambda match: re.sub(r"\S", " ", match[0]), content)
    spots = {m.start(): i for i, m in enumerate(re.finditer(r"\S", content))}
    covered: set[int] = set()
    for text, spans in _passages(document, quotes, constants, files):
        for at in re.finditer(re.escape(_squeezed(text)), _squeezed(content)):
            for start, end in spans:
                first = at.start() + len(_squeezed(text[:start]))
                covered.update(range(first, first + len(_squeezed(text[start:end]))))
    return [
        " ".join(content[max(0, m.start() - 40) : m.end() + 20].split())
        for m in _DECIMAL.finditer(prose)
        if spots[m.start()] not in covered
    ]


def _passages(
    document: str,
    quotes: Sequence[Quote],
    constants: Sequence[Constant],
    files: Mapping[str, Sequence[Record]],
) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Texts of a document, and where in each stands what has a source."""
    yield from (rendered(q, files) for q in quotes if q.document == document)
    for constant in constants:
        if constant.document == document:
            yield constant.text, [(0, len(constant.text))]


def _squeezed(text: str) -> str:
    return "".join(text.split())
