"""What the pages of the site promise; `make docs` builds them, strictly."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

import kashin_jax
from kashin_jax import layers, methods, pipeline, tensors
from kashin_jax.cli import main
from kashin_jax.methods import base

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
EXAMPLE = re.compile(r"```python\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED = re.compile(
    r"\b(?:experiments|results|notebooks|tests|kashin_jax|benchmarks|docs)/[\w./-]+\w"
)
MODULE = re.compile(r"python -m ((?:experiments|benchmarks)[\w.]*\w)")


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def examples(path):
    return EXAMPLE.findall(path.read_text(encoding="utf-8"))


def dead_links(path):
    """Links to files that are not there; anchors and other servers are not followed."""
    targets = LINK.findall(path.read_text(encoding="utf-8"))
    files = [t.split("#")[0] for t in targets if not re.match(r"\w+:|#", t)]
    return [file for file in files if not (path.parent / file).exists()]


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    named = re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)
    assert sorted(named) == sorted(p.relative_to(DOCS).as_posix() for p in PAGES)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_link_leads_somewhere(path):
    assert dead_links(path) == []


def test_the_search_for_dead_links_finds_them(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("[a](page.md#b) [b](no.md) [c](https://a.org) [d](#e) ![f](g.png)")
    assert dead_links(page) == ["no.md", "g.png"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_path_and_program_that_is_named_exists(path):
    text = path.read_text(encoding="utf-8")
    missing = [name for name in NAMED.findall(text) if not (ROOT / name).exists()]
    programs = set(MODULE.findall(text))
    missing += [name for name in programs if importlib.util.find_spec(name) is None]
    assert missing == []


def test_the_search_for_paths_sees_those_of_the_readme():
    text = DOCUMENTS[0].read_text(encoding="utf-8")
    assert "docs/results.md" in NAMED.findall(text)
    assert "experiments.opt_ppl" in MODULE.findall(text)


def test_the_first_example_is_that_of_the_readme():
    assert examples(ROOT / "docs/index.md")[0] == examples(ROOT / "README.md")[0]


MEMBERS = re.compile(
    r"^::: (\S+)\n    options:\n      members: \[(.*)\]$", re.MULTILINE
)


def documented():
    """Module and name of everything on the pages of the API."""
    for page in sorted((DOCS / "api").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        found = MEMBERS.findall(text)
        assert len(found) == text.count("\n:::") > 0, page.name
        for module, names in found:
            yield from ((module, name) for name in names.split(", "))


def test_the_pages_of_the_api_name_only_what_exists():
    # The site leaves out, without a warning, what has no docstring.
    for module, name in documented():
        member = getattr(importlib.import_module(module), name)
        is_constant = isinstance(member, str | int | tuple)
        assert is_constant or member.__doc__, f"{module}.{name}"


def test_every_public_name_is_on_a_page_of_the_api():
    packages = (kashin_jax, methods, tensors, pipeline, layers)
    public = {name for package in packages for name in package.__all__}
    constants = {"DEFAULT_CONFIG", "REPORT_NAME"}
    assert public - {name for _, name in documented()} == constants


def test_help_and_messages_point_to_pages_that_exist(capsys):
    assert main(["quantize", "--help"]) == 0
    assert "docs/guides/rules.md" in capsys.readouterr().out
    sources = [*(ROOT / "kashin_jax").rglob("*.py"), *ROOT.glob("experiments/**/*.py")]
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    named = set(re.findall(r"docs/[\w./-]+\w", text))
    missing = [name for name in named if not (ROOT / name).exists()]
    # Stands for any name.
    assert missing == ["docs/img/NAME.png"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["index.md", "method.md"])
def test_the_examples_of_a_page_run_as_they_stand(name, capsys, monkeypatch):
    # One of them registers a method, which other tests are not to meet.
    monkeypatch.setattr(base, "_METHODS", dict(base._METHODS))
    names: dict = {}
    for code in examples(ROOT / "docs" / name):
        exec(compile(code, name, "exec"), names)
    error = float(names["report"].relative_squared_error)
    if name == "method.md":
        assert names["parts"].converged
        # The paper's method at 4 bits, as the page says.
        assert error == pytest.approx(0.017, abs=0.001)
        return
    assert error == pytest.approx(0.0054, abs=0.0001)
    assert names["logits"].shape == (8, 10)
    assert set(names["mixed_reports"]) == {f"layers/{i}" for i in range(5)}
    assert "layers/2" in capsys.readouterr().out
