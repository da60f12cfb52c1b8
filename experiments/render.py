"""Renders the tables and pictures of README and docs from `results/*.jsonl`.

    python -m experiments.render
    python -m experiments.render --check

Whatever stands between `<!-- table: NAME -->` and `<!-- end of table -->` is replaced
by the view NAME of `experiments/documents/views.py`, and every picture `img/NAME.png`
that a document shows is drawn anew unless it is of just these records
(`experiments/documents/pictures.py`). Numbers in prose are not replaced but compared:
`docs/quoted.toml` says what they quote. With `--check` nothing is written.

Exit code 0: all is as it should be; 1: something differs, named line by line, or has no
records; 2: wrong flag.
"""

import dataclasses
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from experiments.common.flags import flag, run_program
from experiments.common.result_files import RESULT_FILES
from experiments.common.results import read_jsonl
from experiments.common.tables import Column, Record, markdown_table
from experiments.documents.pictures import PICTURES, draw_picture, is_current
from experiments.documents.quotes import missing_quotes, read_quotes
from experiments.documents.views import VIEWS, select
from kashin_jax.errors import DataError
from kashin_jax.io import atomic_path

__all__ = ["RenderConfig", "documents", "main", "read_files", "run", "with_tables"]

ROOT = Path(__file__).resolve().parents[1]
QUOTED = "docs/quoted.toml"
INDEX = "result-files"
"""The table of the result files themselves."""

PROGRAMS = "programs"
"""The table of the programs that make them."""

_TABLE = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
_PICTURE = re.compile(r"img/([\w-]+)\.png")

Files = Mapping[str, Sequence[Record]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RenderConfig:
    """What is done; meanings are in the flags."""

    check: bool = flag(False, "Write nothing; exit with 1 if something differs.")


def documents(root: Path) -> dict[str, str]:
    """Texts of README and docs by their path in the repository."""
    paths = [root / "README.md", *root.glob("docs/**/*.md")]
    paths += [root / "experiments/README.md", root / "results/README.md"]
    return {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(paths)
        if path.is_file()
    }


def read_files(results: Path) -> dict[str, list[Record]]:
    """The records of all result files, by name.

    Raises:
      DataError: If one is damaged.
    """
    return {name: [*read_jsonl(results / f"{name}.jsonl")] for name in RESULT_FILES}


def _records(files: Files, kind: str, name: str, place: str) -> list[Record]:
    known: Mapping[str, object] = VIEWS if kind == "table" else PICTURES
    if name not in known:
        raise DataError(
            f"`{place}` names the {kind} {name}; there is none of this name."
        )
    source = VIEWS[name] if kind == "table" else PICTURES[name]
    found = select(files.get(source.file, ()), source.where)
    if not found:
        raise DataError(
            f"`{place}` shows the {kind} {name}, for which results/{source.file}.jsonl "
            f"has no record; run: make results ARTIFACT={source.file}"
        )
    return found


def with_tables(place: str, content: str, files: Files) -> str:
    """A document with its tables as the records have them.

    Args:
      place: Its path, for messages.
      content: Its text.
      files: Records by result file.

    Raises:
      DataError: If there is no table of a name, or no record for one.
    """

    def table(match: re.Match[str]) -> str:
        start, name, _, end = match.groups()
        if name == INDEX:
            return f"{start}{_index()}\n{end}"
        if name == PROGRAMS:
            return f"{start}{_programs()}\n{end}"
        records = _records(files, "table", name, place)
        return f"{start}{VIEWS[name].markdown(records)}\n{end}"

    return _TABLE.sub(table, content)


def _index() -> str:
    rows = [
        {
            "file": f"`{name}.jsonl`",
            "about": own.about,
            "command": "<br>".join(f"`{command}`" for command in own.commands),
        }
        for name, own in RESULT_FILES.items()
    ]
    columns = (
        Column("file", "file"), Column("about", "what"),
        Column("command", "`python -m ...`"),
    )  # fmt: skip
    return markdown_table(rows, columns)


def _programs() -> str:
    rows = [
        {
            "about": own.about,
            "command": f"`python -m {own.commands[0].split()[0]}`",
            "file": f"[`{name}.jsonl`](../results/{name}.jsonl)",
        }
        for name, own in RESULT_FILES.items()
    ]
    columns = (
        Column("about", "artifact"), Column("command", "program"),
        Column("file", "result file"),
    )  # fmt: skip
    return markdown_table(rows, columns)


def run(config: RenderConfig, root: Path = ROOT) -> int:
    """Renders or compares; returns the exit code.

    Raises:
      DataError: If a table, a picture or a quote has no records.
    """
    files = read_files(root / "results")
    contents = documents(root)
    different = []
    for place, content in contents.items():
        contents[place] = with_tables(place, content, files)
        if contents[place] != content:
            different += _names_of_changed(place, content, contents[place])
            if not config.check:
                with atomic_path(root / place) as temporary:
                    temporary.write_text(contents[place], encoding="utf-8")
    different += _pictures(config, root, contents, files)
    wrong = list(missing_quotes(contents, *read_quotes(root / QUOTED), files))
    wrong += different if config.check else []
    print("\n".join(wrong if config.check else [*different, *wrong]), end="\n" * any(
        (wrong, different)
    ))  # fmt: skip
    return 1 if wrong else 0


def _names_of_changed(place: str, old: str, new: str) -> list[str]:
    pairs = zip(_TABLE.findall(old), _TABLE.findall(new), strict=True)
    return [f"{place}: table {mine[1]}" for mine, theirs in pairs if mine != theirs]


def _pictures(
    config: RenderConfig, root: Path, contents: Mapping[str, str], files: Files
) -> Iterator[str]:
    """Draws, or only names, the pictures that are shown and not of these records."""
    shown = {
        n: place for place, text in contents.items() for n in _PICTURE.findall(text)
    }
    for name, place in sorted(shown.items()):
        records = _records(files, "picture", name, place)
        path = root / "docs/img" / f"{name}.png"
        if not is_current(path, records):
            yield f"docs/img/{name}.png"
            if not config.check:
                path.parent.mkdir(exist_ok=True)
                drawn = root / "results" / f"{PICTURES[name].file}.png"
                draw_picture(name, records, path, drawn=drawn)


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_program("render", __doc__, RenderConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
