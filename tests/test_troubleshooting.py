"""Every message that the page of messages explains is one that the library has."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
# Those of other libraries have no backticks around them.
HEADINGS = re.findall(r"^### `(.+)`$", PAGE, re.MULTILINE)
VARIES = "…"
# `%.1f %%` of the logging module: what is filled in, and a percent sign.
FORMATTED = re.compile(r"%%|%[.\d]*[a-z]")


def template(node):
    """A string of the source, what is filled in being `…`; None for other nodes."""
    if isinstance(node, ast.JoinedStr):
        parts = (template(part) or VARIES for part in node.values)
        return "".join(parts)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return FORMATTED.sub(lambda m: "%" if m[0] == "%%" else VARIES, node.value)
    return None


def templates():
    """All strings of the library that can be shown, docstrings excluded."""
    for path in sorted((ROOT / "kashin_jax").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        statements = {
            id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)
        }
        for node in ast.walk(tree):
            if id(node) not in statements and (text := template(node)):
                yield " ".join(text.replace("`", "").split())


def unknown(headings):
    """Headings that no message of the library has, their words in order."""
    known = [*templates()]
    return [h for h in headings if not any(says(text, h) for text in known)]


def says(text, heading):
    """Whether a message has what a heading quotes; a short quote is all of it."""
    words = [" ".join(part.split()) for part in heading.split(VARIES)]
    pattern = re.compile(".*?".join(map(re.escape, words)))
    is_short = len(" ".join(words).split()) < 3
    return bool(pattern.fullmatch(text) if is_short else pattern.search(text))


def test_every_message_that_is_explained_is_in_the_source():
    assert len({*HEADINGS}) == len(HEADINGS) > 40
    assert unknown(HEADINGS) == []


def test_a_message_that_has_changed_is_found():
    """Guards against a search that everything passes."""
    changed = ["holds an unfinished walk", "is not empty; name … that exists"]
    assert unknown(changed) == changed
