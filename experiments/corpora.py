"""The exact texts that are scored: embedded files first, else the hub's `datasets`.

Each reader takes the directory that holds `wikitext2/` and `lambada/`, returns one
string whose UTF-8 bytes are what a result's `text_sha256` is taken of, and raises
`DataError` naming the file (and line) when it cannot.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kashin_jax.errors import DataError

__all__ = [
    "HubTable",
    "hub_table",
    "lambada",
    "read_utf8",
    "wiki_vital",
    "wikitext2_gptq",
    "wikitext2_raw",
]

_TIMEOUT_SECONDS = 10.0


def read_utf8(path: Path) -> str:
    """Reads a text file without changing a byte of it.

    Raises:
      DataError: If it is missing, not UTF-8, or blank.
    """
    try:
        # Not `read_text`, which would translate line ends and so change the tokens.
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(
            f"`{path}` cannot be read ({error.strerror}); check the path."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"`{path}` is not UTF-8 text (byte {error.start}); convert it to UTF-8."
        ) from error
    if not text.strip():
        raise DataError(f"`{path}` is empty; give a file with text in it.")
    return text


class HubTable(NamedTuple):
    """Columns of a data set on the hub, and what the hub says about each by name."""

    columns: tuple[list[Any], ...]
    features: Mapping[str, Any]


def hub_table(
    repository: str,
    config: str,
    split: str,
    columns: Sequence[str],
    *,
    missing: str,
    remedy: str = "put the file there",
) -> HubTable:
    """Columns of a data set on the hub, in place of a file; asks once, and briefly.

    Args:
      repository: The data set.
      config: Its configuration.
      split: Which part.
      columns: Their names there.
      missing: The file that would have been read, for the message.
      remedy: What to do about that.

    Raises:
      DataError: If `datasets` is not installed, or the hub does not answer or has no
        such columns.
    """
    try:
        import datasets
        import huggingface_hub as hub
    except ImportError as error:
        raise DataError(
            f"`{missing}` is missing and the `datasets` library, which could fetch it, "
            f"is not installed; {remedy} or run: "
            "pip install 'kashin_jax[experiments]'"
        ) from error
    try:
        if not hub.constants.HF_HUB_OFFLINE:
            # Asks once; `load_dataset` would retry for 25 s before it gives up.
            hub.HfApi().dataset_info(repository, timeout=_TIMEOUT_SECONDS)
        table = datasets.load_dataset(repository, config, split=split)
        read = tuple(list(table[name]) for name in columns)
        return HubTable(read, getattr(table, "features", None) or {})
    # The hub's client lets exceptions of whatever it is built on through.
    except Exception as error:
        raise DataError(
            f"`{missing}` is missing and `{repository}` cannot be loaded from the hub "
            f"({type(error).__name__}); {remedy} or go online."
        ) from error


def _hub_rows(missing: Path, repository: str, config: str) -> list[str]:
    table = hub_table(repository, config, "test", ["text"], missing=str(missing))
    return table.columns[0]


def wiki_vital(data_dir: Path) -> str:
    """Lead sections of Wikipedia's vital articles, the test file as it is."""
    return read_utf8(data_dir / "wiki_vital" / "test.txt")


def wikitext2_raw(data_dir: Path) -> str:
    """WikiText-2 raw, the test file as it is."""
    path = data_dir / "wikitext2" / "wiki.test.raw"
    if path.is_file():
        return read_utf8(path)
    # The hub keeps the rows as they are, except that it empties the blank ones.
    rows = _hub_rows(path, "Salesforce/wikitext", "wikitext-2-raw-v1")
    return "".join(row or " \n" for row in rows)


def wikitext2_gptq(data_dir: Path) -> str:
    """WikiText-2 raw, the test rows of the hub joined by blank lines, as in GPTQ."""
    # Only blank rows lose their " \n". The text has 287,644 tokens in GPT-2's
    # vocabulary, the count shown in the perplexity guide of Hugging Face; stripping
    # every row would give 281,862.
    lines = wikitext2_raw(data_dir).removesuffix("\n").split("\n")
    return "\n\n".join("" if line == " " else line + "\n" for line in lines)


def lambada(data_dir: Path) -> str:
    """The LAMBADA test texts (OpenAI's version) joined by one space."""
    path = data_dir / "lambada" / "lambada_test.jsonl"
    if not path.is_file():
        return " ".join(_hub_rows(path, "EleutherAI/lambada_openai", "default"))
    lines = read_utf8(path).removesuffix("\n").split("\n")
    return " ".join(_jsonl_text(path, i, line) for i, line in enumerate(lines, 1))


def _jsonl_text(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"`{path}` line {number} is not JSON ({error.msg}); restore the file."
        ) from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise DataError(
            f"`{path}` line {number} has no string under the key `text`; "
            "restore the file."
        )
    return row["text"]
