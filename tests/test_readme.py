"""What the README promises is run and compared, not believed."""

import re
import subprocess
from pathlib import Path

import pytest

from experiments import render
from experiments.common.methods import FULL_PRECISION, METHODS
from experiments.common.result_files import RESULT_FILES
from experiments.common.results import read_jsonl, record_key
from experiments.documents.quotes import numbers_without_source, read_quotes
from experiments.documents.views import VIEWS, select

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
# Specification and search notes quote constants of the code and single trials.
WITHOUT_RECORDS = ("docs/format.md", "docs/joint-coding.md")


def test_the_readme_is_short():
    """Guards against tables and manuals growing back into the first page."""
    assert len(README.splitlines()) <= 150
    assert len(EXAMPLES[0].splitlines()) <= 12


@pytest.mark.slow
def test_the_library_examples_run_as_they_stand(capsys):
    names: dict = {}
    assert len(EXAMPLES) == 2
    for code in EXAMPLES:
        exec(compile(code, "README.md", "exec"), names)
    # What the comments of the first example say.
    bits, error = map(float, capsys.readouterr().out.split())
    assert bits == pytest.approx(4.06, abs=0.005)
    assert error == pytest.approx(0.0054, abs=0.0001)
    assert names["y"].shape == (8, 1536)
    assert names["logits"].shape == (8, 10)
    assert len(names["reports"]) == 2


def test_tables_pictures_and_quotes_are_what_the_result_files_say(capsys):
    """Guards README and docs against figures that no record holds any more."""
    code = render.run(render.RenderConfig(check=True))
    assert code == 0, capsys.readouterr().out


def test_the_readme_shows_tables():
    assert re.findall(r"<!-- table: (\S+) -->", README)


def test_every_decimal_number_of_the_prose_has_a_source():
    """Guards against a figure written into README or a page by hand."""
    files = render.read_files(ROOT / "results")
    quotes, constants = read_quotes(ROOT / render.QUOTED)
    documents = render.documents(ROOT)
    assert {"README.md", "docs/results.md"} < set(documents)
    left = {
        name: numbers_without_source(name, text, quotes, constants, files)
        for name, text in documents.items()
        if name not in WITHOUT_RECORDS
    }
    assert {name: numbers for name, numbers in left.items() if numbers} == {}


def test_the_whole_wikitext_was_scored_with_every_method():
    view = VIEWS["opt-wikitext2-whole"]
    files = render.read_files(ROOT / "results")
    records = select(files[view.file], view.where)
    assert {record["method"] for record in records} == {FULL_PRECISION, *METHODS}
    assert {record["text_sha256"][:12] for record in records} == {"173c87a53759"}
    assert all(record["tokens"] > 320_000 for record in records)


def test_results_hold_one_file_for_each_artifact_and_short_names():
    """Guards against a return of file names that encode flags."""
    names = {path.name for path in (ROOT / "results").glob("*.jsonl")}
    assert names == {f"{name}.jsonl" for name in RESULT_FILES}
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    )
    assert max(map(len, tracked.stdout.splitlines()), default=0) <= 60


@pytest.mark.parametrize("name", RESULT_FILES)
def test_no_two_committed_records_have_one_configuration(name):
    records = read_jsonl(ROOT / "results" / f"{name}.jsonl")
    fields = RESULT_FILES[name].key
    assert records and len({record_key(r, fields) for r in records}) == len(records)
    environment = {"kashin_jax_version", "jax_version", "device", "date"}
    assert all(environment <= record.keys() for record in records)
    assert all(any(field in record for record in records) for field in fields)


@pytest.mark.parametrize("target", ["run", "test"])
def test_both_commands_are_make_targets(target):
    makefile = (ROOT / "Makefile").read_text()
    assert f"    make {target}\n" in README
    assert re.search(rf"^{target}: setup", makefile, re.MULTILINE)
