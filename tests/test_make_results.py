"""`make results`: the commands of every result file, and where programs write."""

import dataclasses
import subprocess

import pytest

from benchmarks import calibration_cost, core, generate, joint, matmul, peers, streaming
from experiments import (
    ablate_bases,
    glue,
    learn_butterfly,
    make_results,
    opt_ppl,
    rate_distortion,
    refine_glue,
    render,
    robustness,
    sizes,
    table1,
)
from experiments.common.figures import FigureConfig, ModelFigureConfig
from experiments.common.flags import parse_flags
from experiments.common.result_files import RESULT_FILES
from experiments.depth import DepthConfig
from experiments.make_results import commands
from experiments.train.recipe import TrainConfig
from experiments.write_text import WriteConfig

PROGRAMS = {
    "benchmarks.calibration_cost": calibration_cost.CostConfig,
    "benchmarks.core": core.BenchConfig,
    "benchmarks.generate": generate.GenerateConfig,
    "benchmarks.joint": joint.JointBenchConfig,
    "benchmarks.matmul": matmul.MatmulConfig,
    "benchmarks.peers": peers.PeersConfig,
    "benchmarks.streaming": streaming.StreamingConfig,
    "experiments.ablate_bases": ablate_bases.AblationConfig,
    "experiments.depth": DepthConfig,
    "experiments.glue": glue.GlueConfig,
    "experiments.learn_butterfly": learn_butterfly.LearnButterflyConfig,
    "experiments.opt_ppl": opt_ppl.OptPplConfig,
    "experiments.depth_curves": ModelFigureConfig,
    **{f"experiments.fig{number}": FigureConfig for number in (1, 2, 4, 5)},
    **{f"experiments.fig{number}": ModelFigureConfig for number in (3, 6, 7, 8)},
    "experiments.rate_distortion": rate_distortion.RateDistortionConfig,
    "experiments.refine_glue": refine_glue.RefineConfig,
    "experiments.robustness": robustness.RobustnessConfig,
    "experiments.sizes": sizes.SizesConfig,
    "experiments.table1": table1.Table1Config,
    "experiments.train_lm": TrainConfig,
    "experiments.write_text": WriteConfig,
}


@pytest.mark.parametrize("name", RESULT_FILES)
def test_the_commands_of_every_result_file_have_flags_that_exist(name):
    """Guards the one table of commands against flags that were renamed."""
    made, left_out = commands(name, "DATA")
    assert made and not left_out
    for _, program, *arguments in made:
        config = parse_flags(PROGRAMS[program], program, arguments)
        trains = name == "train_lm"
        assert config.out.startswith("runs/") if trains else config.out == "results"


def test_what_programs_write_by_default_is_ignored_by_git():
    """Guards `make run` against changing a committed file."""
    for program, config in PROGRAMS.items():
        if program not in ("experiments.train_lm", "experiments.write_text"):
            (out,) = (f for f in dataclasses.fields(config) if f.name == "out")
            assert out.default == "runs"
    lines = (render.ROOT / ".gitignore").read_text().splitlines()
    assert "/runs/" in lines and "/results/*" in lines


def test_commands_that_need_data_are_left_out_by_name(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(
        make_results.subprocess, "run",
        lambda words, cwd: ran.append(words) or subprocess.CompletedProcess(words, 0),
    )  # fmt: skip
    assert make_results.main(["--only=refine_glue,sizes"]) == 0
    assert [words[2] for words in ran] == ["experiments.sizes"]
    assert "refine_glue: left out, needs `--data_dir`" in capsys.readouterr().err
    assert make_results.main(["--only=refine_glue", "--data_dir=here"]) == 0
    assert any(word.endswith("/here") for word in ran[-1])


def test_the_first_command_that_fails_ends_it(monkeypatch):
    monkeypatch.setattr(
        make_results.subprocess, "run",
        lambda words, cwd: subprocess.CompletedProcess(words, 3),
    )  # fmt: skip
    assert make_results.main(["--only=sizes,table1"]) == 3
