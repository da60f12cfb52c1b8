"""`python -m experiments.paper`: flags, files, interruptions."""

import json

import pytest

from experiments import fig7
from experiments.common.figures import Artifact
from experiments.common.results import read_jsonl
from experiments.common.tables import Column
from experiments.paper import program, registry
from experiments.paper.program import DEFAULT_MODEL, PaperConfig, main
from experiments.paper.registry import PARTS, Part
from tests.opt_checkpoints import GOLDEN

# A whole program on tiny models; its parts have tests of their own.
pytestmark = pytest.mark.slow

USAGE, FILE, INTERRUPTED = 2, 1, 130
MODEL = GOLDEN / "prenorm"


def test_the_paper_has_eight_figures_and_a_table():
    figures = [f"fig{number}" for number in range(1, 9)]
    assert [*figures, "table1"] == list(registry.PARTS)[:9]
    assert PaperConfig().parts == list(PARTS)
    assert PaperConfig(only=("fig5", "fig1", "fig5")).parts == ["fig1", "fig5"]


def test_chosen_figures_are_written_with_their_numbers(tmp_path, capsys):
    assert main(["--only=fig5,fig1", f"--out={tmp_path}"]) == 0
    names = {f"{name}.{end}" for name in ("fig1", "fig5")
             for end in ("png", "svg", "jsonl")}  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (tmp_path / "fig1.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (tmp_path / "fig5.svg").read_text()
    records = read_jsonl(tmp_path / "fig5.jsonl")
    factors = [r["factor"] for r in records if r["order"] == 8]
    assert factors == ["B8", "B4", "B2", "product"]
    assert all(r["jax_version"] and r["device"] for r in records)
    printed = capsys.readouterr().out
    assert printed.index("fig1:") < printed.index("fig5:")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["--only=fig1", f"--out={tmp_path}"]) == 0
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_records_of_another_seed_are_kept_beside_ours(tmp_path):
    assert main(["--only=fig5", "--seed=4", f"--out={tmp_path}"]) == 0
    assert main(["--only=fig5", f"--out={tmp_path}"]) == 0
    assert {path.stem for path in tmp_path.iterdir()} == {"fig5"}
    seeds = [r["seed"] for r in read_jsonl(tmp_path / "fig5.jsonl")]
    assert seeds == sorted([0, 4] * (len(seeds) // 2), reverse=True)


@pytest.mark.slow
def test_another_model_and_seed_stand_in_the_records(tmp_path, monkeypatch):
    monkeypatch.setattr(fig7, "GOOD", ("dct",))
    arguments = ["--only=fig7", f"--model={MODEL}", "--seed=4"]
    assert main([*arguments, f"--out={tmp_path}"]) == 0
    assert {path.stem for path in tmp_path.iterdir()} == {"fig7"}
    records = read_jsonl(tmp_path / "fig7.jsonl")
    assert {(r["model"], r["seed"]) for r in records} == {("prenorm", 4)}
    assert [len(r["centroids"]) for r in records] == [16]
    for record in records:
        assert record["layer"] == "decoder/layers/0/self_attn/q_proj"
        assert sum(record["shares"]) == pytest.approx(1)


def replaced(monkeypatch, **makers):
    parts = {name: Part(make, "a test") for name, make in makers.items()}
    monkeypatch.setattr(program, "PARTS", parts)


def numbers(setting):
    return Artifact("Numbers", [{"value": setting.seed}])


def interrupted(setting):
    raise KeyboardInterrupt


def test_an_interruption_keeps_what_is_written_and_names_the_rest(
    tmp_path, monkeypatch, capsys
):
    replaced(monkeypatch, fig1=numbers, fig2=interrupted, fig5=numbers)
    assert main([f"--out={tmp_path}"]) == INTERRUPTED
    assert [path.name for path in tmp_path.iterdir()] == ["fig1.jsonl"]
    assert "--only=fig2,fig5" in capsys.readouterr().err


def test_a_table_is_one_more_line_and_writes_markdown(tmp_path, monkeypatch):
    def table(setting):
        columns = [Column("value", "value")]
        return Artifact("A table", [{"value": 7}], columns=columns, facts=["A fact."])

    replaced(monkeypatch, table1=table)
    assert main(["--only=table1", f"--out={tmp_path}"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"table1.jsonl", "table1.md"}
    text = (tmp_path / "table1.md").read_text()
    assert "| value |" in text
    assert "python -m experiments.paper --only=table1" in text
    assert "- A fact." in text
    assert json.loads((tmp_path / "table1.jsonl").read_text())["value"] == 7


def test_a_failed_writer_leaves_the_old_picture(tmp_path, monkeypatch):
    class Broken:
        def savefig(self, path, **options):
            path.write_bytes(b"half")
            raise OSError("disk full")

    replaced(monkeypatch, a=lambda setting: Artifact("Broken", [], Broken()))
    (tmp_path / "a.png").write_bytes(b"old")
    assert main([f"--out={tmp_path}"]) == FILE
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--only=fig9", "`--only` must be all or a list of: fig1, fig2"),
        ("--only=fig1,all", "Got 'all'"),
        ("--only=", "`--only` must be given"),
        ("--model=", "`--model` must be given"),
        ("--out=", "`--out` must be given"),
        ("--seed=-1", "`--seed` must be in [0, 2147483647]. Got -1"),
        ("--seed=x", "--seed=x"),
        ("--figure=1", "figure"),
    ],
)
def test_a_wrong_flag_is_named(tmp_path, capsys, flag, says):
    assert main([f"--out={tmp_path}", flag]) == USAGE
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("paper: ")
    assert says in line
    assert list(tmp_path.iterdir()) == []


def test_a_missing_model_is_named_before_any_figure(tmp_path, capsys):
    missing = tmp_path / "nowhere"
    out = tmp_path / "out"
    assert main(["--only=fig1,fig6", f"--model={missing}", f"--out={out}"]) == FILE
    assert str(missing) in capsys.readouterr().err
    assert list(out.iterdir()) == []


def test_a_model_is_not_asked_for_where_no_figure_needs_it(tmp_path):
    arguments = ["--only=fig5", f"--model={tmp_path / 'nowhere'}"]
    assert main([*arguments, f"--out={tmp_path / 'out'}"]) == 0


def test_the_default_model_is_embedded():
    assert PaperConfig().model == DEFAULT_MODEL
    assert DEFAULT_MODEL.endswith("opt-wiki-18m")
