"""`python -m experiments.depth_curves`: committed numbers, drawn again."""

import pytest

from experiments import depth_curves
from experiments.common.figures import ModelFigureConfig, Setting
from experiments.common.results import read_jsonl, write_jsonl
from experiments.depth_curves import main

FILE = 1
NAME = "opt-wiki-18m"


def records(values, model=NAME, data="text"):
    """A study of weight errors at one width, one record per number of steps."""
    return [
        {
            "metric": "error", "axis": "steps", "bits": 4, "max_steps": steps,
            "rtol": 1e-6, "seed": 0, "value": value, "model": model,
            "data": data, "data_sha256": "ab", "protocol": "windows",
        }
        for steps, value in values.items()
    ]  # fmt: skip


@pytest.fixture
def committed(tmp_path, monkeypatch):
    """The file of results, with two studies of the model and one of another."""
    path = tmp_path / "depth.jsonl"
    monkeypatch.setattr(depth_curves, "RESULTS", path)
    small = records({1: 0.4, 8: 0.02}, data="another")
    large = records({1: 0.4, 2: 0.2, 4: 0.0504, 8: 0.05, 16: 0.06})
    other = records({k: 0.1 for k in range(1, 9)}, model="other")
    write_jsonl(path, [*small, *large, *other])
    return path


def test_the_largest_study_of_the_model_is_drawn(committed, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([f"--out={out}"]) == 0
    assert {path.name for path in out.iterdir()} == {
        "depth_curves.png", "depth_curves.svg", "depth_curves.jsonl",
    }  # fmt: skip
    (curve,) = read_jsonl(out / "depth_curves.jsonl")
    assert (curve["source"], curve["model"]) == ("depth.jsonl", NAME)
    assert (curve["x"], curve["mean"][0]) == ([1, 2, 4, 8, 16], 0.4)
    assert (curve["enough"], curve["best_at"], curve["best"]) == (4, 8, 0.05)
    assert "error, 4 bits: 4 steps are enough (0.05040; best 0.05000 at 8)." in (
        capsys.readouterr().out
    )


def test_missing_results_are_an_error_that_names_the_command(
    committed, tmp_path, capsys
):
    write_jsonl(committed, records({1: 0.4}, model="other"))
    out = tmp_path / "out"
    assert main([f"--out={out}"]) == FILE
    (line,) = capsys.readouterr().err.splitlines()
    assert f"depth.jsonl` has no record of {NAME};" in line
    assert "run: python -m experiments.depth --model=" in line
    assert list(out.iterdir()) == []


def test_the_figure_has_rows_of_metrics_and_columns_of_limits(committed):
    tolerances = [
        {**record, "metric": "perplexity", "axis": "rtol", "rtol": rtol}
        for record in records({200: 30.0})
        for rtol in (1e-1, 1e-3)
    ]
    full = {
        **tolerances[0], "axis": None, "bits": None, "max_steps": None, "rtol": None,
    }  # fmt: skip
    write_jsonl(committed, [full, *read_jsonl(committed), *tolerances])
    artifact = depth_curves.make(Setting(model=ModelFigureConfig().model, seed=0))
    panels = artifact.figure.axes
    assert len(panels) == 4
    assert [axes.get_xlabel() != "" for axes in panels] == [False, False, True, True]
    assert panels[3].xaxis_inverted()
    assert not panels[2].xaxis_inverted()
    assert [record["full_precision"] for record in artifact.records] == [None, 30.0]
