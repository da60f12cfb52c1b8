"""Quality against the depth of the decomposition: steps, tolerances, enough."""

import math

import numpy as np
import pytest
from interruptions import quantize
from tiny_checkpoint import LINEARS, as_in_tests, tiny
from tiny_classifier import LINEARS as CLASSIFIER_LINEARS
from tiny_classifier import MAX_LENGTH, TASKS_OF_TABLE, given

from experiments.common.results import read_jsonl
from experiments.depth import DepthConfig, main
from experiments.depth_curves import (
    Curve,
    CurvePoint,
    curves,
    setting_rows,
    summary_rows,
)

__all__ = ["given", "quantize", "tiny"]  # fixtures

# Quantizing takes longer than compiling does.
# Whole programs on tiny models: their numbers, resumption and files.
pytestmark = [pytest.mark.optimized, pytest.mark.slow]

USAGE, FILE, INTERRUPTED = 2, 1, 130
SETTINGS = 2 * (2 + 1)
LAYERS = LINEARS + len(TASKS_OF_TABLE) * CLASSIFIER_LINEARS["bert"]
FIELDS = {
    "metric", "value", "scores", "axis", "bits", "max_steps", "rtol", "seed",
    "basis", "stored_bits_per_weight", "relative_error", "residual", "steps_taken",
    "converged_share", "quantize_seconds", "model", "data", "protocol", "examples",
    "data_sha256", "weights_sha256", "kashin_jax_version", "jax_version", "device",
    "date",
}  # fmt: skip


def arguments(tiny, given, out, *flags):
    """A small study; later flags replace earlier ones."""
    return [
        "--bits=2,4", "--steps=1,8", "--rtols=1e-2", f"--model={tiny}",
        f"--text_file={tiny.with_suffix('.txt')}", f"--glue_model={given.template}",
        f"--tasks={','.join(TASKS_OF_TABLE)}", f"--data_dir={given.data}",
        f"--max_length={MAX_LENGTH}", f"--out={out}", *flags,
    ]  # fmt: skip


def study(out):
    (path,) = out.glob("*.jsonl")
    return read_jsonl(path)


def timeless(records):
    left_out = ("quantize_seconds", "date")
    return [{k: v for k, v in r.items() if k not in left_out} for r in records]


@pytest.fixture(scope="session")
def finished(tiny, given, tmp_path_factory):
    """The small study, made once; not to be changed."""
    out = tmp_path_factory.mktemp("depth")
    with as_in_tests():
        assert main(arguments(tiny, given, out)) == 0
    return out


def pick(records, **fields):
    return [r for r in records if all(r[key] == fields[key] for key in fields)]


def value(records, **fields):
    (record,) = pick(records, **fields)
    return record["value"]


def test_every_metric_has_a_record_at_every_setting(finished):
    records = study(finished)
    assert all(set(record) == FIELDS for record in records)
    full = [r["metric"] for r in records if r["axis"] is None]
    assert full == ["perplexity", "glue"]
    settings = [
        (r["metric"], r["axis"], r["max_steps"], r["rtol"], r["bits"])
        for r in records[len(full) :]
    ]
    assert settings == [
        (metric, *limit, bits)
        for limit in (("steps", 1, 1e-6), ("steps", 8, 1e-6), ("rtol", 200, 1e-2))
        for bits in (2, 4)
        for metric in ("error", "perplexity", "glue")
    ]


def test_one_step_loses_more_than_eight(finished):
    records = study(finished)
    for bits in (2, 4):
        one, eight = (
            value(records, metric="error", axis="steps", max_steps=steps, bits=bits)
            for steps in (1, 8)
        )
        assert one > 1.5 * eight
    # One step leaves two pairs at most, whatever the codebook could hold.
    two, four = pick(records, metric="error", axis="steps", max_steps=1)
    assert two["value"] == pytest.approx(four["value"], rel=1e-3)


def test_records_say_how_deep_the_decomposition_went(finished):
    records = study(finished)
    for record in pick(records, axis="steps"):
        assert record["steps_taken"] == record["max_steps"]
        assert record["converged_share"] == 0
    for record in pick(records, axis="rtol"):
        assert 8 < record["steps_taken"] < 30
        assert record["residual"] <= 1e-2
        assert record["converged_share"] == 1
    left = {
        r["max_steps"]: r["residual"]
        for r in pick(records, axis="steps", metric="error", bits=4)
    }
    # A step on Gaussian weights leaves sqrt(1 - 2/pi) of their norm.
    law = math.sqrt(1 - 2 / math.pi)
    assert left[1] == pytest.approx(law, rel=0.02)
    assert left[8] == pytest.approx(law**8, rel=0.5)


def test_metrics_of_a_setting_share_their_layers_and_bits_are_stored_bits(finished):
    for error in pick(study(finished), metric="error"):
        fields = {key: error[key] for key in ("axis", "bits", "max_steps", "rtol")}
        (perplexity,) = pick(study(finished), metric="perplexity", **fields)
        assert error["value"] == error["relative_error"]
        assert perplexity["relative_error"] == error["relative_error"]
        # Codes, pairs of float32, a scale and a seed for each 64 x 64 matrix.
        side = (2 ** error["bits"] * 64 + 32 + 64) / 64**2
        assert error["stored_bits_per_weight"] == pytest.approx(error["bits"] + side)


def test_the_glue_score_is_the_mean_over_tasks_of_their_metrics(finished):
    for record in pick(study(finished), metric="glue"):
        scores = record["scores"]
        assert list(scores) == ["sst2", "stsb"]
        assert set(scores["stsb"]) == {"pearson", "spearman"}
        task_means = [np.mean(list(metrics.values())) for metrics in scores.values()]
        assert record["value"] == pytest.approx(np.mean(task_means))


def test_tables_and_figure_are_written_with_the_command(finished):
    files = {path.suffix: path for path in finished.iterdir()}
    assert set(files) == {".jsonl", ".md", ".png"}
    assert len({path.stem for path in files.values()}) == 1
    assert files[".png"].read_bytes().startswith(b"\x89PNG")
    text = files[".md"].read_text()
    assert "python -m experiments.depth --bits=2,4 --steps=1,8 --rtols=1e-2" in text
    records = study(finished)
    summary, settings = summary_rows(records), setting_rows(records)
    assert [(row["metric"], row["bits"]) for row in summary] == [
        (metric, bits) for metric in ("error", "perplexity", "tasks") for bits in (2, 4)
    ]
    assert len(settings) == SETTINGS
    assert sum(row["error"].endswith(" *") for row in settings) == 4
    # With a heading and a rule for each of the two tables.
    assert text.count("\n| ") == 4 + len(summary) + len(settings)


# Two settings of the small study, all metrics.
FEW = ("--bits=2", "--rtols=")


def few(finished):
    """What these two have to give, in full precision too."""
    return [
        record
        for record in timeless(study(finished))
        if record["axis"] != "rtol" and record["bits"] != 4
    ]


def test_an_uninterrupted_study_quantizes_each_layer_once(
    tiny, given, tmp_path, finished, quantize
):
    assert main(arguments(tiny, given, tmp_path, *FEW)) == 0
    assert quantize.count == 2 * LAYERS
    assert timeless(study(tmp_path)) == few(finished)


@pytest.mark.parametrize(
    ("at", "copies"),
    [
        pytest.param(2, 1, marks=pytest.mark.slow),
        (LAYERS + LINEARS + 3, 2),
    ],
)
def test_an_interrupted_study_goes_on_where_it_was(
    tiny, given, tmp_path, finished, quantize, capsys, at, copies
):
    command = arguments(tiny, given, tmp_path, *FEW)
    quantize.interrupted_at = at
    assert main(command) == INTERRUPTED
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "interrupted; what is finished is kept" in printed.err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
    # Models quantized for finished settings are not kept.
    assert len({path.parent for path in tmp_path.rglob("*.safetensors")}) == copies
    quantize.count, quantize.interrupted_at = 0, None
    assert main(command) == 0
    assert quantize.count == 2 * LAYERS - (at - 1)
    assert timeless(study(tmp_path)) == few(finished)
    assert {path.suffix for path in tmp_path.iterdir()} == {".jsonl", ".md", ".png"}


def test_records_of_other_weights_are_not_taken_for_ours(
    tiny, given, tmp_path, quantize
):
    flags = ("--metrics=error", "--bits=2", "--rtols=", "--steps=1,8")
    quantize.interrupted_at = LINEARS + 1
    command = arguments(tiny, given, tmp_path, *flags)
    assert main(command) == INTERRUPTED
    (kept,) = tmp_path.rglob("records.jsonl")
    kept.write_text(kept.read_text().replace('"weights_sha256": "', '"x": "'))
    quantize.count, quantize.interrupted_at = 0, None
    assert main(command) == 0
    assert quantize.count == 2 * LINEARS


def test_one_metric_and_several_seeds_make_a_study(tiny, given, tmp_path):
    flags = ("--metrics=error", "--bits=2", "--rtols=", "--seed=0,1")
    assert main(arguments(tiny, given, tmp_path, *flags)) == 0
    records = study(tmp_path)
    assert [(r["max_steps"], r["seed"]) for r in records] == [
        (1, 0), (8, 0), (1, 1), (8, 1),
    ]  # fmt: skip
    (curve,) = curves(records)
    assert curve.points[0].spread > 0
    mean = np.mean([r["value"] for r in records if r["max_steps"] == 8])
    assert curve.points[1].mean == pytest.approx(mean)


def curve(metric, values, axis="steps", spreads=None):
    spreads = spreads or [0.0] * len(values)
    points = [
        CurvePoint(x, mean, spread)
        for x, (mean, spread) in enumerate(zip(values, spreads, strict=True), 1)
    ]
    return Curve(metric, axis, 4, tuple(points))


def test_enough_is_the_first_within_a_percent_of_the_best():
    assert curve("error", [1.0, 0.5, 0.1009, 0.1]).enough.x == 3
    assert curve("error", [1.0, 0.5, 0.1011, 0.1]).enough.x == 4
    # The best may lie before the end: deeper can be worse.
    assert curve("perplexity", [90, 30.2, 30, 31, 33]).enough.x == 2
    assert curve("perplexity", [90, 30.2, 30, 31, 33]).best.x == 3


def test_of_scores_the_greatest_is_the_best():
    assert curve("glue", [40, 86.5, 87, 80]).best.x == 3
    assert curve("glue", [40, 86.5, 87, 80]).enough.x == 2
    assert curve("glue", [-5.0, -1.0, -1.001]).enough.x == 2


def test_a_spread_over_seeds_widens_what_counts_as_good():
    spreads = [9.0, 0.0, 0.0, 4.0]
    assert curve("perplexity", [50, 33, 31, 30], spreads=spreads).enough.x == 2
    assert curve("perplexity", [50, 33, 31, 30]).enough.x == 4


def test_values_that_are_not_finite_are_never_enough():
    values = [math.inf, math.nan, 31.0, 30.9]
    assert curve("perplexity", values).enough.x == 3
    assert curve("perplexity", [math.inf, math.nan]).enough is None
    assert curve("perplexity", [math.inf, math.nan]).best is None


def record(metric, axis, bits, max_steps, rtol, value, seed=0):
    return {
        "metric": metric, "axis": axis, "bits": bits, "max_steps": max_steps,
        "rtol": rtol, "value": value, "seed": seed,
    }  # fmt: skip


def test_marks_go_from_loose_to_tight_tolerances():
    records = [
        record("perplexity", None, None, None, None, 20.0, None),
        *(
            record("perplexity", "rtol", 3, 200, rtol, value)
            for rtol, value in ((1e-4, 30.0), (1e-1, 50.0), (1e-2, 30.1))
        ),
        *(record("error", "steps", 3, k, 1e-6, 1 / k) for k in (4, 1, 2)),
        record("error", "steps", 2, 1, 1e-6, math.inf),
    ]
    found = curves(records)
    assert [(c.metric, c.axis, c.bits) for c in found] == [
        ("error", "steps", 2), ("error", "steps", 3), ("perplexity", "rtol", 3),
    ]  # fmt: skip
    assert [point.x for point in found[2].points] == [1e-1, 1e-2, 1e-4]
    assert [c.enough and c.enough.x for c in found] == [None, 4, 1e-2]


def test_the_default_study_is_the_one_described():
    config = DepthConfig()
    assert len(config.points) == 4 * (13 + 7)
    assert {p.rtol for p in config.points if p.axis == "steps"} == {1e-6}
    assert {p.max_steps for p in config.points if p.axis == "rtol"} == {200}


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--bits=2.5", "`--bits` must list whole numbers in [1, 8]. Got '2.5'"),
        ("--bits=", "`--bits` must be given"),
        ("--steps=0", "`--steps` must list whole numbers in [1, 100000]. Got '0'"),
        ("--steps=four", "`--steps` must list whole numbers"),
        ("--rtols=1e-3,1", "`--rtols` must list numbers in (0, 1). Got '1'"),
        ("--rtols=nan", "`--rtols` must list numbers in (0, 1). Got 'nan'"),
        ("--rtols=small", "`--rtols` must list numbers in (0, 1). Got 'small'"),
        ("--metrics=accuracy", "`--metrics` must be a list of error, perplexity, glue"),
        ("--metrics=", "`--metrics` must be a list of"),
        ("--tasks=squad", "`--tasks` must name some of"),
        ("--max_tokens=few", "`--max_tokens` must be `all` or a whole number"),
        ("--dataset=c5", "`--dataset` must be one of wiki_vital"),
        ("--basis=fourier", "`--basis`"),
        ("--seed=-1", "`--seed` must list whole numbers"),
        ("--rtol=0", "`--rtol` must be in (0, 1). Got 0.0"),
        ("--max_steps=0", "`--max_steps` must be at least 1. Got 0"),
        ("--max_length=0", "`--max_length` must be at least 1. Got 0"),
        ("--max_length=41", "`--max_length`=41 exceeds the 40 positions"),
        ("--model=", "`--model` must be given"),
        ("--glue_model=", "`--glue_model` must be given"),
        ("--out=", "`--out` must be given"),
        ("--depth=3", "Unknown command line flag 'depth'"),
    ],
)
def test_a_wrong_flag_is_named(tiny, given, tmp_path, capsys, flag, says):
    out = tmp_path / "out"
    assert main([*arguments(tiny, given, out), flag]) == USAGE
    assert says in complaint(capsys, out)


def complaint(capsys, out):
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("depth: ")
    assert not out.is_dir() or list(out.iterdir()) == []
    return line


def test_a_study_of_no_depth_is_refused(tiny, given, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*arguments(tiny, given, out), "--steps=", "--rtols="]) == USAGE
    assert "`--steps` and `--rtols` are both empty" in complaint(capsys, out)


def test_a_missing_model_is_named(tiny, given, tmp_path, capsys):
    out, missing = tmp_path / "out", tmp_path / "nowhere"
    assert main([*arguments(tiny, given, out), f"--model={missing}"]) == FILE
    assert str(missing) in complaint(capsys, out)
    no_tasks = [f"--glue_model={given.root / 'bert-sst2'}", "--tasks="]
    assert main([*arguments(tiny, given, out), *no_tasks]) == USAGE
    assert "`--glue_model=" in complaint(capsys, out)
