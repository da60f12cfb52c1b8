"""The ablation of bases: quality as `quantize` reports it, cost, one compilation."""

import json

import jax
import numpy as np
import pytest
from compilations import compiled_programs

from experiments import ablate_bases
from experiments.ablate_bases import (
    FEW,
    AblationConfig,
    ablate,
    cost_fields,
    draw_trade_off,
    main,
    seeded_bases,
)
from experiments.common.checkpoints import EMBEDDED, model_kernels
from kashin_jax import BasisSpec, GreedyKashin, quantize
from kashin_jax.bases import FAMILIES
from kashin_jax.pipeline import path_key
from tests.tiny_checkpoint import make_checkpoint

# A whole program on tiny models; its parts have tests of their own.
pytestmark = pytest.mark.slow

KEY = jax.random.key(4)
FAST = GreedyKashin(bits=3, num_restarts=2, sample=128, max_steps=12)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Records by layer and basis, and the files of a run on a tiny model."""
    root = tmp_path_factory.mktemp("ablation")
    make_checkpoint(root / "tiny")
    arguments = [f"--model={root / 'tiny'}", "--bases=hadamard,identity", "--seeds=2"]
    arguments += ["--steps=12", "--restarts=2", "--repeats=1", f"--out={root / 'out'}"]
    arguments += [
        "--layers=decoder/layers/1/self_attn/q_proj,decoder/layers/0/self_attn/q_proj"
    ]
    assert main(arguments) == 0
    files = {path.suffix: path for path in (root / "out").iterdir()}
    records = list(map(json.loads, files[".jsonl"].read_text().splitlines()))
    kernels = model_kernels(root / "tiny")
    return {(r["layer"], r["basis"]): r for r in records}, files, kernels


@pytest.mark.slow
@pytest.mark.parametrize("family", ["haar"])
def test_errors_residuals_and_steps_are_those_that_quantize_reports(family):
    kernel = jax.random.normal(KEY, (24, 20))
    keys = jax.random.split(KEY, 2)
    found = ablate(kernel, seeded_bases(family, keys, (24, 20)), FAST)
    spec = BasisSpec(family, family)
    config = GreedyKashin(bits=3, num_restarts=2, sample=128, max_steps=12, basis=spec)
    for seed, key in enumerate(keys):
        _, report = quantize(kernel, config, key)
        course = report.decomposition
        assert found.relative_squared_error[seed] == pytest.approx(
            float(report.relative_squared_error), rel=1e-3
        )
        assert found.steps[seed] == course["num_steps"][0, 0]
        for name, other in (("residual", "residual"), ("u_level", "max_u")):
            value = float(course[other][0, 0])
            assert float(getattr(found, name)[seed]) == pytest.approx(value, rel=1e-3)


@pytest.mark.slow
def test_a_family_compiles_once_per_shape_for_all_seeds_and_layers(caplog):
    kinds = [("sign-dct", (12, 10)), ("sign-dct", (10, 12)), ("householder", (12, 10))]

    def run():
        for index in range(2):
            keys = jax.random.split(jax.random.key(index), 2)
            for family, shape in kinds:
                layer = jax.random.normal(keys[0], shape)
                ablate(layer, seeded_bases(family, keys, shape), FAST)

    compiled = compiled_programs(caplog, run)
    for stage in ("_decompose_blocks", "_error_of_code"):
        assert compiled.count(stage) == len(kinds)
    # Of one size are all.
    for stage in ("lloyd_pairs", "assign_pairs"):
        assert compiled.count(stage) == 1


def test_costs_are_those_of_both_sides():
    kernel = jax.random.normal(KEY, (16, 8))
    seeded = seeded_bases("haar", KEY[None], (16, 8))
    fields = cost_fields("haar", kernel, seeded, 1)
    # Dense products, left 16 x 16 and right 8 x 8, in both directions.
    assert fields["flops_per_step"] == 2 * (2 * 16 * 16 * 8 + 2 * 8 * 8 * 16)
    assert fields["basis_bytes"] == 4 * (16 * 16 + 8 * 8)
    assert fields["ms_per_step"] > 0
    assert cost_fields("dct", kernel, seeded_bases("dct", KEY[None], (16, 8)), 1)[
        "basis_bytes"
    ] == 0  # fmt: skip


def test_a_run_measures_the_layers_and_bases_it_was_given(small):
    records, _, kernels = small
    paths = ("decoder/layers/0/self_attn/q_proj", "decoder/layers/1/self_attn/q_proj")
    assert list(records) == [(p, f) for p in paths for f in ("identity", "hadamard")]
    for (path, family), record in records.items():
        assert record["shape"] == list(kernels[path].shape)
        assert record["kind"] == (
            "none" if family == "identity" else "random structured"
        )
        for name in ("relative_squared_error", "residual", "steps", "level"):
            values = record[name]
            assert len(values) == 2
            assert record[f"{name}_mean"] == pytest.approx(np.mean(values))
            assert record[f"{name}_spread"] == pytest.approx(np.std(values))
        assert 0 < record["relative_squared_error_mean"] < 1
    for path in paths:
        left = [records[path, f]["residual_mean"] for f in ("hadamard", "identity")]
        assert left[0] < left[1]


def test_the_seeds_of_a_layer_are_folded_from_its_path(small):
    records, _, kernels = small
    path = "decoder/layers/1/self_attn/q_proj"
    record = records[path, "hadamard"]
    root = path_key(jax.random.key(0), f"tiny/{path}")
    config = GreedyKashin(bits=4, num_restarts=2, max_steps=12)
    _, report = quantize(kernels[path], config, jax.random.split(root, 2)[1])
    assert record["relative_squared_error"][1] == pytest.approx(
        float(report.relative_squared_error), rel=1e-3
    )


def test_files_hold_both_tables_the_command_and_a_picture(small):
    records, files, _ = small
    assert set(files) == {".jsonl", ".md", ".png"}
    assert files[".png"].read_bytes().startswith(b"\x89PNG")
    text = files[".md"].read_text()
    assert (
        "--layers=decoder/layers/1/self_attn/q_proj,decoder/layers/0/self_attn/q_proj"
        in text
    )
    rows = [line for line in text.splitlines() if line.startswith("| tiny: ")]
    assert len(rows) == len(records)
    figure = draw_trade_off(list(records.values()), "two layers")
    figure.draw_without_rendering()
    assert len(figure.axes) == 4
    assert figure.axes[0].get_ylabel() == "relative squared error"


def test_the_default_has_several_layers_of_several_models_and_all_bases():
    config = AblationConfig()
    assert set(config.model) == set(EMBEDDED) == set(FEW)
    for model, paths in FEW.items():
        assert len(paths) >= 2
        assert set(paths) <= set(model_kernels(EMBEDDED[model]))
    assert config.bases == ("all",) and len(FAMILIES) >= 8


def test_an_interruption_leaves_no_file(tmp_path, monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(ablate_bases, "measure", interrupted)
    assert main([f"--out={tmp_path}"]) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--model=", "`--model` must be given"),
        ("--layers=", "`--layers` must be given"),
        ("--layers=fc9", "`--layers` has 'fc9', which is in none of the models"),
        ("--bases=qr", "`--bases` must be all or a list of: identity, dct"),
        ("--bits=0", "`--bits` must be in [1, 8]. Got 0"),
        ("--seeds=0", "`--seeds` must be at least 1. Got 0"),
        ("--steps=0", "`--steps` must be at least 1. Got 0"),
        ("--rtol=0", "`--rtol` must be positive"),
        ("--restarts=0", "`--restarts` must be at least 1. Got 0"),
        ("--repeats=0", "`--repeats` must be at least 1. Got 0"),
        ("--out=", "`--out` must be given"),
    ],
)
def test_a_wrong_flag_is_named(tmp_path, capsys, flag, says):
    assert main([f"--out={tmp_path}", flag]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("ablate_bases: ") and says in line
    assert not list(tmp_path.iterdir())


def test_a_missing_model_is_named(tmp_path, capsys):
    absent = tmp_path / "absent"
    absent.mkdir()
    assert main([f"--out={tmp_path / 'out'}", f"--model={absent}"]) == 1
    assert str(absent) in capsys.readouterr().err
