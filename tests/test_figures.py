"""The programs of the figures: flags, files, interruptions."""

import importlib
import json

import pytest
from decoders import GOLDEN as DECODERS

from experiments import fig1, fig5, fig7, paper
from experiments.common import figures
from experiments.common.figures import Artifact, FigureConfig, ModelFigureConfig
from experiments.common.results import read_jsonl
from experiments.common.tables import Column
from tests.opt_checkpoints import GOLDEN

# A whole program on tiny models; its parts have tests of their own.
pytestmark = pytest.mark.slow

USAGE, FILE, INTERRUPTED = 2, 1, 130
MODEL = GOLDEN / "prenorm"
WITH_MODEL = ("fig3", "fig6", "fig7", "fig8")


def test_the_paper_has_eight_figures_and_each_is_a_program(capsys):
    for number in range(1, 9):
        name = f"fig{number}"
        assert importlib.import_module(f"experiments.{name}").main(["--help"]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith(f"Figure {number}: ")
        assert f"python -m experiments.{name}\n" in shown
        assert ("--model" in shown) == (name in WITH_MODEL)


def test_a_figure_is_written_with_its_numbers(tmp_path, capsys):
    assert fig5.main([f"--out={tmp_path}"]) == 0
    assert fig1.main([f"--out={tmp_path}"]) == 0
    names = {f"{name}.{end}" for name in ("fig1", "fig5")
             for end in ("png", "svg", "jsonl")}  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (tmp_path / "fig1.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (tmp_path / "fig5.svg").read_text()
    records = read_jsonl(tmp_path / "fig5.jsonl")
    factors = [r["factor"] for r in records if r["order"] == 8]
    assert factors == ["B8", "B4", "B2", "product"]
    assert all(r["jax_version"] and r["device"] for r in records)
    assert "fig1:" in capsys.readouterr().out
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert fig1.main([f"--out={tmp_path}"]) == 0
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_records_of_another_seed_are_kept_beside_ours(tmp_path):
    assert fig5.main(["--seed=4", f"--out={tmp_path}"]) == 0
    assert fig5.main([f"--out={tmp_path}"]) == 0
    assert {path.stem for path in tmp_path.iterdir()} == {"fig5"}
    seeds = [r["seed"] for r in read_jsonl(tmp_path / "fig5.jsonl")]
    assert seeds == sorted([0, 4] * (len(seeds) // 2), reverse=True)


@pytest.mark.parametrize(("model", "layer"), [
    (MODEL, "decoder/layers/0/self_attn/q_proj"),
    (DECODERS / "llama", "layers/1/self_attn/o_proj"),
])  # fmt: skip
def test_another_model_and_seed_stand_in_the_records(
    tmp_path, monkeypatch, model, layer
):
    monkeypatch.setattr(fig7, "FAMILIES_SHOWN", ("dct",))
    arguments = [f"--model={model}", "--seed=4", f"--out={tmp_path}"]
    assert fig7.main(arguments) == 0
    assert {path.stem for path in tmp_path.iterdir()} == {"fig7"}
    records = read_jsonl(tmp_path / "fig7.jsonl")
    assert {(r["model"], r["seed"]) for r in records} == {(model.name, 4)}
    assert [len(r["centroids"]) for r in records] == [16]
    for record in records:
        assert record["layer"] == layer
        assert sum(record["shares"]) == pytest.approx(1)


def run(make, out, *arguments):
    flags = [f"--out={out}", *arguments]
    return figures.run_figure("fig5", "A manual.", make, FigureConfig, flags)


def test_an_interruption_keeps_what_is_written(tmp_path, capsys):
    def interrupted(setting):
        raise KeyboardInterrupt

    numbers = [{"order": 2, "factor": "B2"}]
    assert run(lambda setting: Artifact("Numbers", numbers), tmp_path) == 0
    before = (tmp_path / "fig5.jsonl").read_bytes()
    assert run(interrupted, tmp_path) == INTERRUPTED
    assert [path.name for path in tmp_path.iterdir()] == ["fig5.jsonl"]
    assert (tmp_path / "fig5.jsonl").read_bytes() == before
    assert "fig5: interrupted; nothing was written." in capsys.readouterr().err


def test_columns_write_a_table_in_markdown(tmp_path):
    def table(setting):
        columns = [Column("value", "value")]
        return Artifact("A table", [{"value": 7}], columns=columns, facts=["A fact."])

    assert run(table, tmp_path, "--seed=3") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"fig5.jsonl", "fig5.md"}
    text = (tmp_path / "fig5.md").read_text()
    assert "| value |" in text
    assert "python -m experiments.fig5" in text and "--seed=3" in text
    assert "- A fact." in text
    record = json.loads((tmp_path / "fig5.jsonl").read_text())
    assert (record["value"], record["seed"]) == (7, 3)


def test_a_failed_writer_leaves_the_old_picture(tmp_path):
    class Broken:
        def savefig(self, path, **options):
            path.write_bytes(b"half")
            raise OSError("disk full")

    (tmp_path / "fig5.png").write_bytes(b"old")
    assert run(lambda setting: Artifact("Broken", [], Broken()), tmp_path) == FILE
    assert [path.name for path in tmp_path.iterdir()] == ["fig5.png"]
    assert (tmp_path / "fig5.png").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--model=", "`--model` must be given"),
        ("--out=", "`--out` must be given"),
        ("--seed=-1", "`--seed` must be in [0, 2147483647]. Got -1"),
        ("--seed=x", "--seed=x"),
        ("--figure=1", "figure"),
    ],
)
def test_a_wrong_flag_is_named(tmp_path, capsys, flag, says):
    assert fig7.main([f"--out={tmp_path}", flag]) == USAGE
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("fig7: ")
    assert says in line
    assert list(tmp_path.iterdir()) == []


def test_a_missing_model_is_named(tmp_path, capsys):
    missing, out = tmp_path / "nowhere", tmp_path / "out"
    assert fig7.main([f"--model={missing}", f"--out={out}"]) == FILE
    assert str(missing) in capsys.readouterr().err
    assert list(out.iterdir()) == []


def test_the_default_model_is_embedded():
    assert ModelFigureConfig().model.endswith("opt-wiki-18m")


def test_the_old_program_of_all_figures_names_the_new_ones(tmp_path, capsys):
    assert paper.main(["--only=fig5,fig1", f"--out={tmp_path}", "--seed=2"]) == 0
    printed = capsys.readouterr()
    assert printed.out.index("fig1:") < printed.out.index("fig5:")
    assert "DeprecationWarning" in printed.err
    for name in ("fig1", "fig5"):
        assert f"python -m experiments.{name}\n" in printed.err
        assert {r["seed"] for r in read_jsonl(tmp_path / f"{name}.jsonl")} == {2}
    assert paper.main(["--only=fig9", f"--out={tmp_path}"]) == USAGE
    assert "`--only` must be all or a list of: fig1, fig2" in capsys.readouterr().err


def test_the_old_program_hands_the_model_on_and_ends_with_what_fails(tmp_path, capsys):
    missing = tmp_path / "nowhere"
    flags = [f"--model={missing}", f"--out={tmp_path / 'out'}"]
    assert paper.main(["--only=fig5", *flags]) == 0
    assert paper.main(["--only=fig6,table1", *flags]) == FILE
    printed = capsys.readouterr().err
    assert str(missing) in printed and "experiments.table1" not in printed
