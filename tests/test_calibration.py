"""Language models quantized with a text: never worse than without, and resumable."""

import json
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from flax import nnx
from interruptions import Calls
from tiny_checkpoint import (
    CONTEXT,
    LINEARS,
    VOCABULARY,
    arguments,
    edit_tensors,
    make_checkpoint,
    row,
    table,
)

from experiments.common.calibration import NamedCalibration
from experiments.common.methods import CALIBRATED_METHODS
from experiments.opt_ppl import main as job
from kashin_jax import RTN, AlternatingKashin, JointKashin, Rules, quantize_model
from kashin_jax.cli import main
from kashin_jax.errors import DataError, NonFiniteError, UsageError
from kashin_jax.io import open_checkpoint
from kashin_jax.methods import ChannelKMeans
from kashin_jax.models.loading import load_language_model
from kashin_jax.pipeline import (
    REPORT_NAME,
    Calibration,
    Rule,
    calibrated_checkpoint,
    calibrated_model,
    calibration_windows,
    checkpoint,
    packed_layers,
    quantize_checkpoint,
)
from kashin_jax.pipeline.blocks import BlockRunner
from kashin_jax.pipeline.calibration import in_batches
from kashin_jax.pipeline.report import kept_without, read_report

GPTQ = Rules(config=RTN(bits=2, group_size=32))


def windows(count=16, seed=0):
    """Sentences of a language of its own: each token says which five may follow."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((count, CONTEXT), np.int32)
    for i in range(1, CONTEXT):
        tokens[:, i] = (7 * tokens[:, i - 1] + rng.integers(0, 5, count)) % VOCABULARY
    return tokens


TEXT = Calibration(windows=windows())
WEIGHTED = Calibration(windows=windows(), weighting="gradient")
BY_OUTPUTS = Calibration(windows=windows(), weighting="outputs")


def files(directory):
    names = ("*.safetensors", "*.json", REPORT_NAME)
    found = [file for name in names for file in directory.glob(name)]
    return {file.name: file.read_bytes() for file in found}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Not to be changed."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def fed(tiny, tmp_path_factory):
    """By GPTQ; not to be changed."""
    target = tmp_path_factory.mktemp("calibrated") / "fed"
    return quantize_checkpoint(tiny, target, GPTQ, calibration=TEXT)


def test_no_layer_is_worse_than_without_and_most_are_better(fed):
    reports = [report.calibration for report in fed.reports.values()]
    assert len(reports) == LINEARS and None not in reports
    for each in reports:
        assert each.output_error <= each.data_free_error
        assert (each.damping is None) == (each.output_error == each.data_free_error)
    whole, without = (
        np.mean([getattr(each, name) for each in reports])
        for name in ("output_error", "data_free_error")
    )
    assert whole < 0.8 * without


def test_reports_are_read_back(fed):
    assert read_report(fed.directory / REPORT_NAME).keys() == fed.reports.keys()
    for name, report in read_report(fed.directory / REPORT_NAME).items():
        assert report.calibration == fed.reports[name].calibration
        # Equal runs write equal bytes.
        assert report.seconds is report.calibration_seconds is None
    line = json.loads((fed.directory / REPORT_NAME).read_text().splitlines()[0])
    assert line["calibration"].keys() == {"output_error", "data_free_error", "damping"}


@pytest.mark.slow
def test_vectors_are_coded_with_a_text_along_outputs(tiny, tmp_path):
    """Guards the whole way of the follow-up's method, from rules to what is stored."""
    rules = Rules(config=AlternatingKashin(bits=2))
    found = quantize_checkpoint(tiny, tmp_path / "out", rules, calibration=TEXT)
    reports = [report.calibration for report in found.reports.values()]
    assert len(reports) == LINEARS
    assert all(each.output_error <= each.data_free_error for each in reports)
    assert sum(each.damping is not None for each in reports) > LINEARS / 2
    packed = packed_layers(open_checkpoint(found.directory)).values()
    assert {tensor.layout.axis for tensor in packed} == {1}


@pytest.mark.parametrize(
    "at", [1, *(pytest.param(at, marks=pytest.mark.slow) for at in (2, 6, LINEARS))]
)
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    tiny, fed, tmp_path, monkeypatch, at
):
    """Guards hidden states behind layers that an earlier run has quantized."""
    calls = Calls(calibrated_checkpoint.keep_tensor)
    calls.interrupted_at = at
    monkeypatch.setattr(calibrated_checkpoint, "keep_tensor", calls)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(tiny, tmp_path / "out", GPTQ, calibration=TEXT)
    with pytest.raises(UsageError, match="other calibration"):
        other = Calibration(windows=windows(seed=1))
        quantize_checkpoint(tiny, tmp_path / "out", GPTQ, calibration=other)
    with pytest.raises(UsageError, match="other calibration"):
        quantize_checkpoint(tiny, tmp_path / "out", GPTQ)
    calls.count, calls.interrupted_at = 0, None
    quantize_checkpoint(tiny, tmp_path / "out", GPTQ, calibration=TEXT)
    assert calls.count == LINEARS - at + 1
    assert files(tmp_path / "out") == files(fed.directory)


def test_shards_that_are_there_are_not_calibrated_again(
    tiny, fed, tmp_path, monkeypatch
):
    calls = Calls(checkpoint.write_index)
    calls.interrupted_at = 1
    monkeypatch.setattr(checkpoint, "write_index", calls)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(tiny, tmp_path / "out", GPTQ, calibration=TEXT)
    monkeypatch.setattr(calibrated_checkpoint, "quantize_calibrated", None)
    quantize_checkpoint(tiny, tmp_path / "out", GPTQ, calibration=TEXT)
    assert files(tmp_path / "out") == files(fed.directory)


def test_a_text_is_not_read_again_for_layers_that_are_kept(
    tiny, tmp_path, monkeypatch, caplog
):
    """Guards a resumed run whose other layers, coded without the text, are not done."""
    table = Rule("embed_tokens$", RTN(bits=4, group_size=32))
    rules = Rules(config=GPTQ.config, rules=[table], skip=["fc", "layers/1"])
    run = partial(quantize_checkpoint, tiny, tmp_path / "out", rules, calibration=TEXT)
    with monkeypatch.context() as patched:
        calls = Calls(calibrated_checkpoint.calibrate_checkpoint)
        patched.setattr(checkpoint, "calibrate_checkpoint", calls)
        patched.setattr(checkpoint, "_quantize", None)
        with pytest.raises(TypeError):
            run()
        assert calls.count == 1
    monkeypatch.setattr(BlockRunner, "first_call", None)
    found = run()
    without = [r.path for r in found.reports.values() if r.calibration is None]
    assert without == ["decoder/embed_tokens"]
    assert caplog.text.count("1 layers are coded without calibration") == 2


def test_layers_that_a_text_misleads_keep_the_code_without(tiny, tmp_path):
    """Guards "never worse": the held-out windows are in another language."""
    tokens = np.concatenate(
        [
            np.full((14, CONTEXT), 5, np.int32),
            np.random.default_rng(0)
            .integers(0, VOCABULARY, (2, CONTEXT))
            .astype(np.int32),
        ]
    )
    misled = Calibration(windows=tokens, dampings=(1e-4,))
    target = tmp_path / "out"
    found = quantize_checkpoint(tiny, target, GPTQ, calibration=misled)
    without = kept_without(found.reports)
    assert without
    plain = quantize_checkpoint(tiny, tmp_path / "plain", GPTQ)
    for name in without:
        each = found.reports[name]
        assert each.calibration.output_error == each.calibration.data_free_error
        errors = [r.reports[name].relative_squared_error for r in (found, plain)]
        assert errors[0] == errors[1]


def test_joint_coding_takes_low_blocks_and_loses_less(tiny, tmp_path):
    config = JointKashin(bits=2, effort="fast")
    found = quantize_checkpoint(
        tiny, tmp_path / "out", Rules(config=config), calibration=TEXT
    )
    for report in found.reports.values():
        assert report.config.block_height == 16
        assert report.calibration.output_error <= report.calibration.data_free_error
    assert len(kept_without(found.reports)) < LINEARS / 2


def test_the_network_in_full_precision_is_another_one(tiny, fed, tmp_path):
    """Guards `is_sequential`: the first input is the same, later ones are not."""
    whole = Calibration(windows=windows(), is_sequential=False)
    found = quantize_checkpoint(tiny, tmp_path / "out", GPTQ, calibration=whole).reports
    by_path = {report.path: report for report in found.values()}
    quantized = {report.path: report for report in fed.reports.values()}
    first, last = "decoder/layers/0/self_attn/q_proj", "decoder/layers/1/fc2"
    errors = [each[first].calibration.output_error for each in (by_path, quantized)]
    np.testing.assert_allclose(*errors, rtol=0.01)
    errors = [each[last].calibration.output_error for each in (by_path, quantized)]
    assert abs(errors[0] / errors[1] - 1) > 0.01


def test_tokens_weighed_alike_are_those_without_weights(tiny, fed, monkeypatch):
    """Guards layers that get moments of their own where they read the same input."""

    def alike(runner, wanted, batches, key, held_bytes):
        assert [len(layers) for layers in wanted] == [LINEARS // len(wanted)] * 2
        return [
            {path: [np.ones(b.shape, np.float32) for b in batches] for path in layers}
            for layers in wanted
        ]

    monkeypatch.setattr(calibrated_model, "gradient_weights", alike)
    model = load_language_model(tiny).model
    _, reports = quantize_model(model, rules=GPTQ, calibration=WEIGHTED)
    by_path = {report.path: report.calibration for report in fed.reports.values()}
    for path, report in reports.items():
        # Another program rounds otherwise, and one code of 4,096 costs .3 %.
        np.testing.assert_allclose(report.calibration[:2], by_path[path][:2], rtol=0.05)


@pytest.mark.slow
def test_hidden_states_on_disk_give_the_same_bytes(tiny, fed, tmp_path):
    """Guards a bound of memory that would be part of the result, or of its name."""
    on_disk = Calibration(windows=windows(), held_bytes=0)
    assert on_disk.digest == TEXT.digest
    found = quantize_checkpoint(tiny, tmp_path / "out", GPTQ, calibration=on_disk)
    assert files(found.directory) == files(fed.directory)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rules", "fields"),
    [
        (GPTQ, {"weighting": "gradient"}),
        (
            Rules(config=JointKashin(bits=2, effort="fast")),
            {"weighting": "outputs", "is_asymmetric": True},
        ),
    ],
)
def test_what_needs_more_passes_is_resumed_to_the_same_bytes(
    tiny, tmp_path, monkeypatch, rules, fields
):
    """Guards the draw of tokens, which must not depend on what is left to do.

    And the text in full precision, which goes on beside the other.
    """
    text = Calibration(windows=windows(), **fields)
    on_disk = Calibration(windows=windows(), **fields, held_bytes=0)
    whole = quantize_checkpoint(tiny, tmp_path / "whole", rules, calibration=on_disk)
    plain = quantize_checkpoint(tiny, tmp_path / "plain", rules, calibration=TEXT)
    assert files(whole.directory) != files(plain.directory)
    for report in whole.reports.values():
        assert report.calibration.output_error <= report.calibration.data_free_error
    calls = Calls(calibrated_checkpoint.keep_tensor)
    calls.interrupted_at = LINEARS // 2 + 2
    monkeypatch.setattr(calibrated_checkpoint, "keep_tensor", calls)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(tiny, tmp_path / "out", rules, calibration=text)
    with pytest.raises(UsageError, match="other calibration"):
        quantize_checkpoint(tiny, tmp_path / "out", rules, calibration=TEXT)
    calls.count, calls.interrupted_at = 0, None
    quantize_checkpoint(tiny, tmp_path / "out", rules, calibration=text)
    assert calls.count == LINEARS // 2 - 1
    assert files(tmp_path / "out") == files(whole.directory)


def test_asymmetric_layers_make_up_for_earlier_ones(tiny, fed):
    """Guards what layers are compared with: outputs of the network that was given."""
    model = load_language_model(tiny).model
    text = Calibration(windows=windows(), is_asymmetric=True)
    _, reports = quantize_model(model, rules=GPTQ, calibration=text)
    plain = {report.path: report.calibration for report in fed.reports.values()}
    first, last = "decoder/layers/0/self_attn/q_proj", "decoder/layers/1/fc2"
    # Nothing is quantized in front of it.
    found = reports[first].calibration
    np.testing.assert_allclose(found.output_error, plain[first].output_error, rtol=0.01)
    found = reports[last].calibration
    # What earlier layers lost counts.
    assert found.output_error > plain[last].output_error
    assert found.output_error < found.data_free_error


def test_a_model_in_memory_gets_the_codes_of_the_checkpoint(tiny, fed):
    """Guards the twin of `quantize_checkpoint`."""
    model = load_language_model(tiny).model
    small, reports = quantize_model(model, rules=GPTQ, calibration=TEXT)
    packed = packed_layers(open_checkpoint(fed.directory))
    assert reports.keys() == packed.keys()
    by_path = {report.path: report for report in fed.reports.values()}
    for path, report in reports.items():
        assert report.calibration == by_path[path].calibration
    layer = small.decoder.layers[1].fc2.kernel.get_value()
    expected = packed["decoder/layers/1/fc2"]
    np.testing.assert_array_equal(layer.packed_codes, expected.packed_codes)
    assert type(model.decoder.layers[1].fc2) is nnx.Linear
    with pytest.raises(UsageError, match="not both"):
        quantize_model(
            model, rules=GPTQ, calibration=TEXT, quantize_layer=lambda p, k: None
        )


@pytest.mark.slow
def test_a_layer_that_stands_in_two_places_is_coded_without(tiny, caplog):
    """Guards moments of one of the two inputs that it reads."""
    model = load_language_model(tiny).model
    model.decoder.layers[1].fc1 = model.decoder.layers[0].fc1
    _, reports = quantize_model(model, rules=GPTQ, calibration=TEXT)
    assert reports.keys() >= {"decoder/layers/0/fc1", "decoder/layers/1/fc2"}
    for path, report in reports.items():
        assert (report.calibration is None) == (path == "decoder/layers/0/fc1")
    assert "1 layers are coded without calibration" in caplog.text


def test_layers_outside_of_the_blocks_are_named(tiny, tmp_path, caplog):
    rules = Rules(
        config=RTN(bits=2, group_size=32),
        rules=[Rule("embed_tokens$", RTN(bits=4, group_size=32))],
        skip=["fc1$"],
    )
    found = quantize_checkpoint(tiny, tmp_path / "out", rules, calibration=TEXT)
    assert "1 layers are coded without calibration" in caplog.text
    assert "embed_tokens" in caplog.text
    without = [r.path for r in found.reports.values() if r.calibration is None]
    assert without == ["decoder/embed_tokens"]


def test_inputs_that_are_always_zero_lose_nothing(tiny, tmp_path):
    """Guards moments of nothing: a ReLU that no token passes."""
    source = tmp_path / "source"
    shutil.copytree(tiny, source)

    def dead(tensors):
        name = "model.decoder.layers.0.fc1.bias"
        tensors[name] = np.full_like(tensors[name], -1e4)

    edit_tensors(source, dead)
    found = quantize_checkpoint(source, tmp_path / "out", GPTQ, calibration=TEXT)
    (layer,) = (r for r in found.reports.values() if r.path == "decoder/layers/0/fc2")
    assert layer.calibration == (0.0, 0.0, None)
    assert np.isfinite(layer.relative_squared_error)


def test_inputs_that_overflow_are_refused(tiny, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny, source)

    def huge(tensors):
        name = "model.decoder.layers.0.fc1.bias"
        tensors[name] = np.full(tensors[name].shape, 1e20, np.float32)

    edit_tensors(source, huge)
    with pytest.raises(NonFiniteError, match=r"layers\.0\.fc2.* reads NaN"):
        quantize_checkpoint(source, tmp_path / "out", GPTQ, calibration=TEXT)


@pytest.mark.parametrize(
    ("rules", "text", "message"),
    [
        (Rules(config=ChannelKMeans()), TEXT, "takes no calibration"),
        (Rules(config=RTN(), share=["[qkv]_proj$"]), TEXT, "`share`"),
        (GPTQ, BY_OUTPUTS, "rtn takes no weighting of outputs"),
        (GPTQ, Calibration(windows=windows() + VOCABULARY), "has no token"),
    ],
)
def test_what_cannot_work_is_said_first(tiny, tmp_path, rules, text, message):
    with pytest.raises(UsageError, match=message):
        quantize_checkpoint(tiny, tmp_path / "out", rules, calibration=text)
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_run_here_is_refused(tiny, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "t5"}))
    with pytest.raises(UsageError, match="cannot be calibrated, as the"):
        quantize_checkpoint(source, tmp_path / "out", GPTQ, calibration=TEXT)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"windows": windows()[:1]}, "two windows"),
        ({"windows": windows(), "dampings": ()}, "`dampings`"),
        ({"windows": windows(), "dampings": (0.0,)}, "`dampings`"),
        ({"windows": windows(), "weighting": "loss"}, "`weighting`"),
        ({"windows": windows(), "held_bytes": -1}, "`held_bytes`"),
        (
            {"windows": windows(), "is_asymmetric": True, "is_sequential": False},
            "`is_asymmetric`",
        ),
    ],
)
def test_choices_are_checked(fields, message):
    with pytest.raises(UsageError, match=message):
        Calibration(**fields)


def test_windows_are_drawn_without_overlap():
    tokens = np.arange(100)
    found = calibration_windows(tokens, context=10, count=55, seed=1)
    assert found.shape == (5, 10)
    assert len({row[0] for row in found.tolist()}) == 5
    assert (found[:, 0] % 10 == 0).all() and (np.diff(found) == 1).all()
    assert (found != calibration_windows(tokens, context=10, count=55, seed=2)).any()
    with pytest.raises(UsageError, match="two windows of 10"):
        calibration_windows(tokens, context=10, count=19)
    with pytest.raises(DataError, match=r"100 tokens, 10 windows .* and 11 are"):
        calibration_windows(tokens, context=10, count=110)


@pytest.mark.parametrize(
    ("context", "windows", "batch"), [(512, 256, 16), (600, 216, 9), (1100, 112, 7)]
)
def test_windows_are_as_many_as_fill_batches(context, windows, batch):
    """Guards batches of one window, by which a text would be read slowly."""
    tokens = np.zeros(300 * context, np.int32)
    found = calibration_windows(tokens, context=context, count=131_072)
    assert len(found) == windows
    assert {len(each.tokens) for each in in_batches(found)} == {batch}


@pytest.mark.parametrize("count", [2, 7, 16, 256])
def test_batches_are_of_one_size_and_keep_what_is_held_out_apart(count):
    cut = np.zeros((count, 512), np.int32)
    batches = list(in_batches(cut))
    assert sum(len(batch.tokens) for batch in batches) == count
    assert len({batch.tokens.shape for batch in batches}) == 1
    assert batches[0].tokens.size <= 8192
    held_out = sum(len(b.tokens) for b in batches if b.is_held_out)
    assert held_out == max(1, count // 8)


def test_the_command_takes_a_text(tiny, tmp_path, capsys):
    text = str(tiny.with_suffix(".txt"))
    flags = ["--method=rtn", "--bits=2", "--set", "group_size=32"]
    command = ["quantize", str(tiny), str(tmp_path / "out"), *flags]
    calibrated = [f"--calibration={text}", "--calibration-tokens=256"]
    assert main([*command, *calibrated]) == 0
    printed = capsys.readouterr().out
    assert f"{LINEARS} layers calibrated: on held-out text" in printed
    (times,) = (line for line in printed.split("\n") if "Statistics took" in line)
    assert main([*command, *calibrated]) == 0
    again = capsys.readouterr().out
    # Those of the run that did the work.
    assert "Already done" in again and times in again
    weighted = "--calibration-weighting=gradient"
    for other in (weighted, "--calibration-asymmetric"):
        assert main([*command, *calibrated, other]) == 2
        assert "other calibration" in capsys.readouterr().err
    assert main([*command, weighted]) == 2
    assert "`--calibration-weighting` needs" in capsys.readouterr().err
    assert main([*command, "--calibration-tokens=256"]) == 2
    assert "`--calibration-tokens` needs" in capsys.readouterr().err
    assert main([*command, "--calibration-asymmetric"]) == 2
    assert "`--calibration-asymmetric` needs" in capsys.readouterr().err
    assert main([*command, "--calibration=/no/such.txt"]) == 1
    assert "/no/such.txt" in capsys.readouterr().err
    assert main([*command, f"--calibration={text}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "Give a longer text" in line
    assert main([*command, "--method=kashin", "--bits=4", *calibrated]) == 2


def test_the_main_job_has_calibrated_rows(tiny, tmp_path, capsys):
    """Guards rows that must tell one text, or amount of it, from another."""
    text = tmp_path / "learned.txt"
    text.write_text(tiny.with_suffix(".txt").read_text()[::-1])
    flags = [f"--calibration={text}", "--calibration_tokens=256", "--bits=3"]
    records = table(tiny, tmp_path / "out", *flags, "--methods=gptq-g128")
    assert [r["method"] for r in records] == ["full precision", "gptq-g128"]
    found = row(records, "gptq-g128")
    assert found["calibration"] == "text_file:learned.txt"
    assert found["calibration_tokens"] == 256 and len(found["calibration_sha256"]) == 64
    assert 0 < found["output_error"] <= found["data_free_output_error"]
    assert found["statistics_seconds"] > 0 and found["coding_seconds"] > 0
    assert "compile_seconds" in found
    assert (tmp_path / "out" / "calibrated_opt.jsonl").exists()
    flags[1] = "--calibration_tokens=128"
    records = table(tiny, tmp_path / "out", *flags, "--methods=gptq-g128")
    assert [record["calibration_tokens"] for record in records[1:]] == [256, 128]
    assert records[1] == {**found, "date": records[1]["date"]}


def test_rows_say_how_they_were_calibrated():
    """Guards tables of perplexity and of classifiers: one function records it."""
    text = NamedCalibration(
        name="t", text=SimpleNamespace(count=9), text_sha256="0" * 64
    )
    plain = text.record_fields()
    assert text.record_fields(CALIBRATED_METHODS["gptq-g128"]) == plain
    both = text.record_fields(CALIBRATED_METHODS["kashin-joint-two-sided"])
    assert both == {
        **plain, "calibration_weighting": "outputs", "calibration_asymmetric": True
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--methods=gptq-g128"], 2, "`gptq-g128` needs `--calibration`"),
        (["--methods=uniform", "--calibration=default"], 2, "name one, or leave it"),
        (["--methods=gptq-g128", "--calibration=/no.txt"], 1, "/no.txt"),
        (
            ["--methods=gptq-g128", "--calibration=default", "--calibration_tokens=40"],
            2,
            "two windows of",
        ),
    ],
)
def test_the_main_job_names_what_is_wrong(tiny, tmp_path, capsys, flags, code, message):
    assert job(arguments(tiny, tmp_path / "out", *flags)) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
