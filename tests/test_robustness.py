"""The robustness program: records, files, a picture, and wrong flags."""

import itertools
import json

import numpy as np
import pytest

from experiments import robustness
from experiments.common.seeds import spread_fields
from experiments.robustness import (
    MATRICES,
    WORST,
    RobustnessConfig,
    draw_heat_map,
    main,
)
from kashin_jax.bases import FAMILIES

MATRICES_HERE = ("gaussian", "constant", "constant-rows", "worst-rank-one")
BASES = ("dct", "haar")
MEASURED = {
    "steps", "residual", "log10_residual", "rate", "tail_rate", "u_level", "v_level",
    "level",
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Records by matrix and basis, and the files of a small run."""
    out = tmp_path_factory.mktemp("robustness")
    arguments = ["--size=24", "--seeds=2", "--steps=30", "--rtol=1e-3"]
    arguments += [f"--bases={','.join(BASES)}"]
    arguments += [f"--families={','.join(reversed(MATRICES_HERE))}"]
    assert main([f"--out={out}", *arguments]) == 0
    files = {path.suffix: path for path in out.iterdir()}
    records = list(map(json.loads, files[".jsonl"].read_text().splitlines()))
    return {(r["matrix"], r["basis"]): r for r in records}, files


def test_there_is_a_record_for_every_matrix_and_basis(small):
    records, _ = small
    expected = itertools.product(MATRICES_HERE, BASES)
    assert set(records) == set(expected)
    for record in records.values():
        for name in MEASURED:
            values = [v for v in record[name] if v != "nan"]
            assert len(record[name]) == record["seeds"] == 2
            if values:
                assert record[f"{name}_mean"] == pytest.approx(np.mean(values))
                assert record[f"{name}_spread"] == pytest.approx(np.std(values))
        verdicts = np.array(record["residual"]) <= record["rtol"]
        assert record["converged_share"] == verdicts.mean()


def test_failures_are_where_the_theory_has_them(small):
    records, _ = small
    for basis in BASES:
        assert records["gaussian", basis]["converged_share"] == 1
        assert records["constant", basis]["steps"] == [1, 1]
        assert records[WORST, basis]["converged_share"] == 0
    # Q2 turns equal entries into a single one, so the second basis never helps.
    rows = {basis: records["constant-rows", basis] for basis in BASES}
    assert rows["dct"]["converged_share"] < rows["haar"]["converged_share"] == 1


def test_files_hold_the_tables_the_command_and_a_picture(small):
    _, files = small
    assert set(files) == {".jsonl", ".md", ".png"}
    assert files[".png"].read_bytes().startswith(b"\x89PNG")
    text = files[".md"].read_text()
    assert "python -m experiments.robustness --size=24 --seeds=2 --steps=30" in text
    assert text.count("| matrix | dct | haar |") == 5
    assert "| constant | -7.0 | -7.0 |" in text


def test_the_heat_map_writes_every_cell(small):
    records, _ = small
    figure = draw_heat_map(list(records.values()), "cells")
    figure.draw_without_rendering()
    panels = [axes for axes in figure.axes if axes.texts]
    cells = len(MATRICES_HERE) * len(BASES)
    assert [len(axes.texts) for axes in panels] == [cells, cells]
    assert "-7.0" in {text.get_text() for text in panels[0].texts}


def test_by_default_the_sweep_is_as_large_as_promised():
    config = RobustnessConfig()
    assert (config.size, config.seeds, config.steps) == (128, 8, 100)
    assert config.bases == config.families == ("all",)
    assert len(FAMILIES) >= 8 and len(MATRICES) >= 12


def test_values_that_are_not_finite_do_not_count():
    fields = spread_fields("x", [1.0, float("nan"), 3.0])
    assert (fields["x_mean"], fields["x_spread"]) == (2.0, 1.0)
    assert len(fields["x"]) == 3
    assert spread_fields("x", [float("nan")])["x_mean"] is None


def test_an_interruption_leaves_no_file(tmp_path, monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(robustness, "measure", interrupted)
    assert main([f"--out={tmp_path}"]) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--size=7", "`--size` must be in [8, 384]. Got 7"),
        ("--size=385", "`--size` must be in [8, 384]. Got 385"),
        ("--seeds=0", "`--seeds` must be at least 1. Got 0"),
        ("--steps=1", "`--steps` must be at least 2. Got 1"),
        ("--rtol=0", "`--rtol` must be positive"),
        ("--bases=qr", "`--bases` must be all or a list of: identity, dct"),
        ("--bases=", "`--bases` must be given"),
        ("--families=cauchy", "`--families` must be all or a list of: gaussian"),
        ("--families=", "`--families` must be given"),
        ("--out=", "`--out` must be given"),
    ],
)
def test_a_wrong_flag_is_named(tmp_path, capsys, flag, says):
    out = tmp_path / "out"
    assert main([f"--out={out}", flag]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("robustness: ") and says in line
    assert not out.exists()
