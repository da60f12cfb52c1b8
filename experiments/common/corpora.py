"""The exact texts that are scored, and the protocol of each.

A file of the user's folder comes first, then the embedded one, then the hub's
`datasets`; nothing stands in for a text that is in none of the three. Each reader takes
the user's folder, returns one string whose UTF-8 bytes are what a result's
`text_sha256` is taken of, and raises `DataError` naming the file (and line) when it
cannot.
"""

import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kashin_jax.errors import DataError
from kashin_jax.evaluation import Weighting, count_new, count_scored

__all__ = [
    "ASSETS",
    "DATASETS",
    "LAMBADA_STRIDE",
    "PUBLISHED_CONTEXT",
    "Dataset",
    "HubTable",
    "c4",
    "c4_train",
    "check_data_dir",
    "hub_table",
    "lambada",
    "ptb",
    "read_utf8",
    "wiki_vital",
    "wikitext2_gptq",
    "wikitext2_raw",
    "wikitext2_train",
]

ASSETS = Path(__file__).resolve().parents[1] / "assets"
LAMBADA_STRIDE = 512
PUBLISHED_CONTEXT = 2048
_TIMEOUT_SECONDS = 10.0
_C4_TEXTS = 1100
_C4_TRAINING_TEXTS = 10_000
_C4_WINDOWS = 256


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
    config: str | None,
    split: str,
    columns: Sequence[str],
    *,
    missing: str,
    files: str | None = None,
    revision: str | None = None,
) -> HubTable:
    """Columns of a data set on the hub, in place of a file; asks once, and briefly.

    Args:
      repository: The data set.
      config: Its configuration.
      split: Which part.
      columns: Their names there.
      missing: The file that would have been read, for the message.
      files: The files of the part in the repository, where only these are wanted.
      revision: Branch of the repository.

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
            f"is not installed; {_REMEDY} or run: "
            "pip install 'kashin_jax[experiments]'"
        ) from error
    try:
        if not hub.constants.HF_HUB_OFFLINE:
            # Asks once; `load_dataset` would retry for 25 s before it gives up.
            hub.HfApi().dataset_info(repository, timeout=_TIMEOUT_SECONDS)
        table = datasets.load_dataset(
            repository, config, split=split, revision=revision,
            data_files=None if files is None else {split: files},
        )  # fmt: skip
        read = tuple(list(table[name]) for name in columns)
        return HubTable(read, getattr(table, "features", None) or {})
    # The hub's client lets exceptions of whatever it is built on through.
    except Exception as error:
        raise DataError(
            f"`{missing}` is missing and `{repository}` cannot be loaded from the hub "
            f"({type(error).__name__}); {_REMEDY} or go online."
        ) from error


_REMEDY = "put the file into a folder that `--data_dir` names"


def check_data_dir(data_dir: Path | None) -> None:
    """Raises DataError if the user's folder is given and is none."""
    if data_dir is not None and not data_dir.is_dir():
        raise DataError(f"`--data_dir`={data_dir} is not a folder; check the path.")


def _find(data_dir: Path | None, names: Sequence[str]) -> tuple[Path | None, str]:
    """The user's file of one of these names, and how to call it if it is missing."""
    check_data_dir(data_dir)
    if data_dir is None:
        return None, names[0]
    found = next((data_dir / n for n in names if (data_dir / n).is_file()), None)
    return found, str(data_dir / names[0])


def wiki_vital(data_dir: Path | None) -> str:
    """Lead sections of Wikipedia's vital articles, the test file as it is."""
    name = "wiki_vital/test.txt"
    return read_utf8(_find(data_dir, [name])[0] or ASSETS / name)


def wikitext2_raw(data_dir: Path | None, split: str = "test") -> str:
    """WikiText-2 raw, a file as it is."""
    path, missing = _find(data_dir, [f"wikitext2/wiki.{split}.raw"])
    if path is not None:
        return read_utf8(path)
    # The hub keeps the rows as they are, except that it empties the blank ones.
    (rows,) = hub_table(
        "Salesforce/wikitext", "wikitext-2-raw-v1", split, ["text"], missing=missing
    ).columns
    return "".join(row or " \n" for row in rows)


def wikitext2_gptq(data_dir: Path | None) -> str:
    """WikiText-2 raw, the test rows of the hub joined by blank lines, as in GPTQ."""
    # Only blank rows lose their " \n". The text has 287,644 tokens in GPT-2's
    # vocabulary, as in Hugging Face's guide; stripping every row would give 281,862.
    lines = wikitext2_raw(data_dir).removesuffix("\n").split("\n")
    return "\n\n".join("" if line == " " else line + "\n" for line in lines)


def lambada(data_dir: Path | None) -> str:
    """The LAMBADA test texts (OpenAI's version) joined by one space."""
    path, missing = _find(data_dir, ["lambada/lambada_test.jsonl"])
    if path is not None:
        lines = read_utf8(path).removesuffix("\n").split("\n")
        return " ".join(_jsonl_texts(path, lines))
    (rows,) = hub_table(
        "EleutherAI/lambada_openai", "default", "test", ["text"], missing=missing
    ).columns
    return " ".join(rows)


def ptb(data_dir: Path | None) -> str:
    """The Penn Treebank test sentences joined by one space, as GPTQ's `get_ptb_new`.

    The file is that of Mikolov's release, with `<unk>` and `N`: a sentence a line.
    """
    path, missing = _find(data_dir, ["ptb/ptb.test.txt"])
    if path is not None:
        lines = read_utf8(path).split("\n")
        return " ".join(line.strip() for line in lines if line.strip())
    # The repository itself holds a script, which `datasets` does not run any more.
    (rows,) = hub_table(
        "ptb-text-only/ptb_text_only", None, "test", ["sentence"], missing=missing,
        files="penn_treebank/test/0000.parquet", revision="refs/convert/parquet",
    ).columns  # fmt: skip
    return " ".join(rows)


def c4(data_dir: Path | None) -> str:
    """The first 1,100 validation texts of C4 joined by one space.

    As GPTQ's `get_c4_new`. Its `get_c4`, which draws windows from the whole file at
    random, is another text.
    """
    name = "c4-validation.00000-of-00008.json.gz"
    return " ".join(_c4_texts(data_dir, "validation", name, _C4_TEXTS))


def wikitext2_train(data_dir: Path | None) -> str:
    """WikiText-2 raw, the training file as it is, for calibration."""
    return wikitext2_raw(data_dir, "train")


def c4_train(data_dir: Path | None) -> str:
    """The first 10,000 texts of C4's first training file, an empty line between two.

    GPTQ and others after it draw windows from the same file.
    """
    name = "c4-train.00000-of-01024.json.gz"
    return "\n\n".join(_c4_texts(data_dir, "train", name, _C4_TRAINING_TEXTS))


def _c4_texts(
    data_dir: Path | None, split: str, name: str, count: int
) -> Sequence[str]:
    """The first texts of a file of C4, of the user's or the hub's."""
    path, missing = _find(data_dir, [f"c4/{name}", f"c4/{name.removesuffix('.gz')}"])
    if path is not None:
        return _first_texts(path, count)
    (rows,) = hub_table(
        "allenai/c4", None, split, ["text"], missing=missing, files=f"en/{name}"
    ).columns
    return rows[:count]


def _first_texts(path: Path, count: int) -> list[str]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            # A tenth of it is used; nobody wants to wait for the rest.
            lines = [line.decode("utf-8") for line in itertools.islice(file, count)]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"`{path}` cannot be read ({error}); restore it.") from error
    if not lines:
        raise DataError(f"`{path}` is empty; restore the file.")
    return _jsonl_texts(path, lines)


def _jsonl_texts(path: Path, lines: Iterable[str]) -> list[str]:
    return [_jsonl_text(path, number, line) for number, line in enumerate(lines, 1)]


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


class Dataset(NamedTuple):
    """A text and how it is cut into windows.

    Attributes:
      read: Makes the text of the user's folder.
      described: The text in words.
      max_stride: Greatest distance between windows, in tokens.
      max_windows: Windows that are scored, from the first on.
      drop_last: Whether a last partial window is dropped.
      weigh: How windows are averaged.
      is_published: Whether there are published numbers, for windows of 2048 tokens.
    """

    read: Callable[[Path | None], str]
    described: str
    max_stride: int | None = None
    max_windows: int | None = None
    drop_last: bool = False
    weigh: Weighting = count_scored
    is_published: bool = False


DATASETS: Mapping[str, Dataset] = {
    "wiki_vital": Dataset(wiki_vital, "wiki_vital test file"),
    "wikitext2": Dataset(wikitext2_raw, "WikiText-2 raw test file"),
    "wikitext2-gptq": Dataset(
        wikitext2_gptq,
        "WikiText-2 raw test rows joined by blank lines",
        drop_last=True,
        is_published=True,
    ),
    "lambada": Dataset(
        lambada,
        "LAMBADA test texts joined by one space",
        max_stride=LAMBADA_STRIDE,
        weigh=count_new,
        is_published=True,
    ),
    "ptb": Dataset(
        ptb,
        "Penn Treebank test sentences joined by one space",
        drop_last=True,
        is_published=True,
    ),
    "c4": Dataset(
        c4,
        f"the first {_C4_TEXTS:,} C4 validation texts joined by one space",
        max_windows=_C4_WINDOWS,
        drop_last=True,
        is_published=True,
    ),
}
