"""Figures quoted in prose come from records, and none is overlooked."""

import pytest

from experiments.documents.quotes import (
    Constant,
    Quote,
    missing_quotes,
    numbers_without_source,
    read_quotes,
    rendered,
)
from experiments.documents.views import select
from kashin_jax.errors import DataError

ENTRY = """
[[quote]]
document = "README.md"
text = "has {a}"
file = "f"
field = "a"
show = ".2f"
[quote.numbers]
b = { where = { m = "x" } }
"""
FILES = {
    "f": [
        {"a": 1.5, "m": "x"},
        {"a": 2.25, "m": "x"},
        {"a": -0.125, "m": "y", "d": {"e": [3, 0.5]}},
    ]
}


def quote(text, **number):
    base = {"file": "f", "where": {"m": "x"}, "field": "a", "show": ".2f"}
    return Quote("D", text, {"n": base | number})


@pytest.mark.parametrize(
    ("number", "text"),
    [
        ({"of": "min"}, "1.50"),
        ({"of": "max"}, "2.25"),
        ({"of": "mean", "show": ".3f"}, "1.875"),
        ({"of": "spread", "show": ".2f"}, "0.53"),
        ({"of": "count", "show": "d"}, "2"),
        ({"where": {"m": ["y"]}, "show": "bare .3f"}, "-.125"),
        ({"where": {"m": "y"}, "show": ".1f", "scale": 100}, "-12.5"),
        ({"where": {"m": "y"}, "field": "d.e.1", "show": "bare .1f"}, ".5"),
    ],
)
def test_numbers_are_shown_as_the_entry_says(number, text):
    assert rendered(quote("has {n}", **number), FILES) == (
        f"has {text}", [(4, 4 + len(text))]
    )  # fmt: skip


def test_one_number_is_not_taken_from_several_that_differ():
    with pytest.raises(DataError, match="2 records fit; say more in `where`"):
        rendered(quote("{n}"), FILES)
    with pytest.raises(DataError, match="no record of f fits"):
        rendered(quote("{n}", where={"m": "z"}), FILES)


def test_quotes_are_found_however_lines_are_broken():
    quotes, contents = [quote("it\nhas {n} now", of="min")], {"D": "it has\n1.50\nnow"}
    assert list(missing_quotes(contents, quotes, [], FILES)) == []
    constants = [Constant("D", "has 7.5", "none"), Constant("E", "1", "no such page")]
    assert list(missing_quotes(contents, quotes, constants, FILES)) == [
        "D does not say `has 7.5`", "E does not say `1`",
    ]  # fmt: skip


def test_a_decimal_number_needs_a_source_outside_code_tables_and_links():
    content = """The first has 1.50, not 2.5, and .75 of [it](a-3.5.md).

    code 4.5

| 5.5 |
`6.5` in v0.1.0, and 1.50 again."""
    quotes = [quote("first has {n}, not 2.5", of="min")]
    constants = [Constant("D", "and .75", "a reason")]

    def left(quotes, constants):
        found = numbers_without_source("D", content, quotes, constants, FILES)
        return [words.split("The first has ")[-1] for words in found]

    assert len(left([], [])) == 4
    second, last = left(quotes, constants)
    assert "not 2.5" in second and "1.50 again" in last


def test_an_entry_whose_names_do_not_fit_its_text_is_refused(tmp_path):
    path = tmp_path / "quoted.toml"
    path.write_text(ENTRY)
    with pytest.raises(DataError, match="cannot be used .*not those in its braces"):
        read_quotes(path)
    with pytest.raises(DataError, match="cannot be used"):
        read_quotes(tmp_path / "nowhere.toml")


def test_filters_take_one_value_or_any_of_a_list():
    assert select(FILES["f"], {"m": ["x", "y"], "a": 2.25}) == [FILES["f"][1]]
    assert select(FILES["f"], {"d": None}) == FILES["f"][:2]
