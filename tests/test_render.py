"""README and docs are rendered from result files, and what differs is named."""

import pytest
from PIL import Image

from experiments import render
from experiments.common.result_files import RESULT_FILES
from experiments.common.results import merge_records
from experiments.documents import pictures
from experiments.documents.views import VIEWS, select
from kashin_jax.errors import DataError

CHECK, WRITE = render.RenderConfig(check=True), render.RenderConfig()
VITAL = {"dataset": "wiki_vital", "model": "opt-wiki-18m", "max_tokens": 16384}


def row(method, bits, perplexity, seed=None):
    basis = None if seed is None else "hadamard"
    return {
        **VITAL, "method": method, "bits": bits, "stored_bits_per_weight": bits + 0.1,
        "perplexity": perplexity, "seed": seed, "basis": basis, "note": "a note",
    }  # fmt: skip


ROWS = [
    row("full precision", 16, 28.44), row("kashin-joint", 4, 28.5, 0),
    row("kashin-joint", 4, 28.7, 1), row("nf4-g64", 4, 28.9),
]  # fmt: skip
TEXT = """# A page
<!-- table: opt-wiki-vital-short -->
an old table
<!-- end of table -->
It has {} here and NF4 28.90.
"""
QUOTED = """
[[quote]]
document = "README.md"
text = "has {joint} here and NF4 {nf4}"
file = "table2_opt"
where = { dataset = "wiki_vital", bits = 4 }
field = "perplexity"
show = ".2f"
[quote.numbers]
joint = { where = { method = "kashin-joint" }, of = "mean" }
nf4 = { where = { method = "nf4-g64" } }
"""


@pytest.fixture
def root(tmp_path):
    (tmp_path / "results").mkdir()
    merge_records(tmp_path / "results", "table2_opt", ROWS)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "quoted.toml").write_text(QUOTED)
    (tmp_path / "README.md").write_text(TEXT.format("28.60"))
    return tmp_path


def test_a_table_is_replaced_and_then_found_to_be_right(root, capsys):
    assert render.run(CHECK, root) == 1
    assert capsys.readouterr().out == "README.md: table opt-wiki-vital-short\n"
    assert "an old table" in (root / "README.md").read_text()
    assert render.run(WRITE, root) == 0
    page = (root / "README.md").read_text()
    assert "| kashin-joint | 4.10 | 28.60 ± 0.14 |" in page
    assert "a note" not in page and page.startswith("# A page\n<!-- table: ")
    capsys.readouterr()
    assert render.run(CHECK, root) == 0
    assert capsys.readouterr().out == ""


def test_a_changed_record_is_named_by_its_table_and_its_quote(root, capsys):
    """Guards against a figure that stays after the measurement was repeated."""
    render.run(WRITE, root)
    merge_records(root / "results", "table2_opt", [row("nf4-g64", 4, 29.9)])
    capsys.readouterr()
    assert render.run(CHECK, root) == 1
    quote, table = capsys.readouterr().out.splitlines()
    assert quote == "README.md does not say `has 28.60 here and NF4 29.90`"
    assert table == "README.md: table opt-wiki-vital-short"
    assert render.run(WRITE, root) == 1


def test_a_picture_is_drawn_where_it_is_shown_and_known_by_its_records(root, capsys):
    (root / "docs" / "a.md").write_text("![Perplexity](img/perplexity.png)\n")
    assert render.run(WRITE, root) == 0
    path = root / "docs" / "img" / "perplexity.png"
    with Image.open(path) as image:
        assert image.size[0] > 500
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    capsys.readouterr()
    assert render.run(CHECK, root) == 0
    merge_records(root / "results", "table2_opt", [row("hqq-g64", 4, 29.0)])
    assert render.run(CHECK, root) == 1
    assert "docs/img/perplexity.png\n" in capsys.readouterr().out


def test_a_picture_of_points_is_taken_from_the_program_that_draws_it(root):
    (root / "docs" / "a.md").write_text("![Entries](img/fig6.png)\n")
    record = {"seed": 0, "layer": "a", "family": "haar"}
    merge_records(root / "results", "fig6", [record])
    with pytest.raises(DataError, match="run: make results ARTIFACT=fig6"):
        render.run(WRITE, root)
    Image.new("RGB", (8, 8)).save(root / "results" / "fig6.png")
    assert render.run(WRITE, root) == 0
    assert render.run(CHECK, root) == 0


@pytest.mark.parametrize(
    ("page", "says"),
    [
        (
            "<!-- table: sentiment -->\n<!-- end of table -->",
            "table3_glue.jsonl has no",
        ),
        ("<!-- table: magic -->\n<!-- end of table -->", "the table magic; there is"),
        ("![](img/sentiment.png)", "make results ARTIFACT=table3_glue"),
        ("![](img/magic.png)", "the picture magic; there is none"),
    ],
)
def test_what_has_no_records_or_no_name_is_an_error(root, page, says):
    (root / "README.md").write_text(page)
    with pytest.raises(DataError, match=says):
        render.run(CHECK, root)


@pytest.mark.parametrize("name", VIEWS)
def test_every_view_with_records_makes_a_table(name):
    view = VIEWS[name]
    files = render.read_files(render.ROOT / "results")
    if records := select(files[view.file], view.where):
        lines = view.markdown(records).splitlines()
        assert len(lines) > 2 and all(line.startswith("| ") for line in lines)
    else:
        assert name in ("sentiment", *(n for n in VIEWS if "wiki-vital" in n))


def test_every_picture_names_a_result_file():
    assert {one.file for one in pictures.PICTURES.values()} <= set(RESULT_FILES)
