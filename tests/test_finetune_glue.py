"""Fine-tuning from the command line: learning, export, resumption."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from tiny_finetuning import arguments, config_of, tokenizer, write_model, write_tasks

from experiments.common.results import read_jsonl, write_jsonl
from experiments.finetune_glue import main
from experiments.finetuning.model import load_start
from experiments.finetuning.run import finetune
from experiments.train.optimizer import decays, make_optimizer
from experiments.train.step import init_state
from experiments.train.stored import Checkpoints
from kashin_jax.models import load_classifier

# A whole program on tiny models; its parts have tests of their own.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Flags that name the tiny model and its data."""
    directory = tmp_path_factory.mktemp("given")
    model = write_model(directory / "model")
    return {"model": str(model), "data_dir": str(write_tasks(directory / "glue"))}


@pytest.fixture(scope="module")
def finished(given, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    result = finetune(config_of(out=str(out), **given))
    # 90 examples four times, in batches of 16.
    assert result.steps == result.total == 23
    return result, out


def _epochs(out):
    return [r for r in read_jsonl(out / "log.jsonl") if "epoch" in r]


def _losses(out):
    return [r for r in read_jsonl(out / "log.jsonl") if "loss" in r]


def _rows(given, task):
    path = Path(given["data_dir"]) / task / "dev.tsv"
    lines = path.read_text("utf-8").splitlines()[1:]
    return [line.split("\t") for line in lines]


def _outputs(model, texts):
    """One example at a time, without padding."""
    forward = jax.jit(model)
    rows = []
    for text in texts:
        encoding = tokenizer().encode(*text)
        ids = jnp.asarray([encoding.ids]), None, jnp.asarray([encoding.type_ids])
        rows.append(np.asarray(forward(*ids))[0])
    return np.stack(rows)


def test_a_separable_task_is_learnt_and_the_log_says_how(finished):
    result, out = finished
    losses = _losses(out)
    assert [r["step"] for r in losses] == [1, *range(2, 23, 2), 23]
    assert losses[-1]["loss"] < 0.3 < 0.5 < losses[0]["loss"]
    assert losses[-1]["examples"] == 23 * 16
    # Warm-up is int(0.1 * 23) = 2 steps; step 11 is 9 of 21 steps down.
    assert losses[0]["learning_rate"] == 0.0
    assert losses[6]["step"] == 12
    assert losses[6]["learning_rate"] == pytest.approx(5e-3 * 12 / 21, rel=1e-4)
    epochs = _epochs(out)
    # ceil(90 k / 16)
    assert [(r["step"], r["epoch"]) for r in epochs] == [
        (6, 1.0),
        (12, 2.0),
        (17, 3.0),
        (23, 4.0),
    ]
    assert epochs[-1]["accuracy"] == result.metrics["accuracy"] >= 95.0
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_export_has_the_recorded_accuracy_and_the_weights_of_the_run(
    finished, given
):
    result, out = finished
    loaded = load_classifier(out / "hf")
    assert loaded.stored_dtype == "float32"
    assert loaded.config.id2label == ("negative", "positive")
    rows = _rows(given, "SST-2")
    outputs = _outputs(loaded.model, [row[:1] for row in rows])
    hits = outputs.argmax(axis=1) == [int(row[1]) for row in rows]
    written = json.loads((out / "metrics.json").read_text())
    assert written["metrics"] == {"accuracy": 100 * hits.mean()} == result.metrics
    assert written["training_examples"] == 90

    config = config_of(out=str(out), **given)
    start = load_start(config)
    optimizer = make_optimizer(lambda step: 0.0, weight_decay=0.0, clip=1.0)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    checkpoints = Checkpoints(out / "checkpoints")
    state = checkpoints.restore_latest(init_state(start.params, optimizer), device)
    checkpoints.close()
    model = start.evaluation(state.params, start.frozen)
    np.testing.assert_array_equal(
        outputs, _outputs(model, [row[:1] for row in rows]), strict=True
    )


def test_the_export_is_in_the_layout_of_transformers(finished, given):
    from transformers import AutoConfig

    _, out = finished
    config = AutoConfig.from_pretrained(out / "hf")
    assert config.architectures == ["BertForSequenceClassification"]
    assert config.id2label == {0: "negative", 1: "positive"}
    assert config.label2id == {"negative": 0, "positive": 1}
    assert config.problem_type == "single_label_classification"
    assert config.finetuning_task == "sst2"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        original = Path(given["model"]) / name
        assert (out / "hf" / name).read_bytes() == original.read_bytes()
    tensors = safetensors.numpy.load_file(out / "hf" / "model.safetensors")
    assert tensors["classifier.weight"].shape == (2, 32)
    assert "bert.encoder.layer.0.attention.output.LayerNorm.weight" in tensors
    assert {tensor.dtype.name for tensor in tensors.values()} == {"float32"}


def test_a_resumed_run_ends_with_the_bytes_of_an_uninterrupted_one(
    finished, given, tmp_path, capsys
):
    _, out = finished
    flags = arguments(out=tmp_path, **given)
    assert main([*flags, "--stop_after=8"]) == 3
    assert "Stopped after 8 of 23 steps" in capsys.readouterr().out
    assert not (tmp_path / "hf").exists()
    assert not (tmp_path / "metrics.json").exists()
    assert main(flags) == 0
    assert "Finished 23 steps: accuracy" in capsys.readouterr().out
    for name in ("hf/model.safetensors", "hf/config.json", "metrics.json"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
    # The stop has an evaluation of its own.
    assert [r["step"] for r in _epochs(tmp_path)] == [6, 8, 12, 17, 23]
    assert [r["loss"] for r in _losses(tmp_path)] == [r["loss"] for r in _losses(out)]

    metrics = (tmp_path / "metrics.json").read_bytes()
    log = read_jsonl(tmp_path / "log.jsonl")
    write_jsonl(tmp_path / "log.jsonl", [r for r in log if "epoch" not in r])
    (tmp_path / "metrics.json").unlink()
    assert main(flags) == 0, "a finished run may be asked for again"
    assert (tmp_path / "metrics.json").read_bytes() == metrics


@pytest.mark.slow
def test_a_batch_in_parts_learns_what_the_whole_one_does(given, tmp_path):
    changes = {"dropout": 0.0, "stop_after": 3, "log_every": 1}
    for parts in (1, 4):
        out = tmp_path / str(parts)
        config = config_of(out=str(out), grad_accumulation=parts, **given, **changes)
        finetune(config)
    whole, cut = _losses(tmp_path / "1"), _losses(tmp_path / "4")
    assert len(whole) == 3
    for field in ("loss", "grad_norm"):
        expected = [record[field] for record in whole]
        assert [record[field] for record in cut] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_activations_in_bfloat16_leave_weights_in_float32(finished, given, tmp_path):
    _, out = finished
    config = config_of(out=str(tmp_path), dtype="bfloat16", epochs=0.2, **given)
    assert finetune(config).steps == 2
    assert load_classifier(tmp_path / "hf").stored_dtype == "float32"
    first, expected = (_losses(path)[0] for path in (tmp_path, out))
    assert first["loss"] == pytest.approx(expected["loss"], rel=2e-2)
    assert first["loss"] != expected["loss"]


@pytest.mark.slow
def test_a_regression_learns_scores(given, tmp_path):
    config = config_of(
        task="stsb", out=str(tmp_path), epochs=10.0, dropout=0.0, **given
    )
    config = dataclasses.replace(config, learning_rate=2e-3)
    metrics = finetune(config).metrics
    assert metrics["pearson"] > 90 and metrics["spearman"] > 90
    losses = _losses(tmp_path)
    # Before the first update outputs are about 0, so the loss is the mean square.
    assert 4.0 < losses[0]["loss"] < 15.0
    # Scores are 0 to 5, each as often: the best constant has 35 / 12 = 2.9.
    assert losses[-1]["loss"] < 2.0
    loaded = load_classifier(tmp_path / "hf")
    assert loaded.config.is_regression and loaded.config.num_labels == 1
    rows = _rows(given, "STS-B")
    outputs = _outputs(loaded.model, [row[:2] for row in rows])[:, 0]
    scores = [float(row[2]) for row in rows]
    correlation = 100 * np.corrcoef(outputs, scores)[0, 1]
    assert metrics["pearson"] == pytest.approx(correlation, abs=1e-3)


def test_a_stored_head_is_kept_whatever_the_order_of_its_labels(
    finished, given, tmp_path
):
    result, out = finished
    turned = tmp_path / "turned"
    shutil.copytree(out / "hf", turned)
    tensors = safetensors.numpy.load_file(turned / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        tensors[name] = np.ascontiguousarray(tensors[name][::-1])
    safetensors.numpy.save_file(tensors, turned / "model.safetensors")
    content = json.loads((turned / "config.json").read_text())
    labels = {"id2label": {"0": "Positive", "1": "Negative"}}
    (turned / "config.json").write_text(json.dumps(content | labels))
    changes = {"model": str(turned), "head": "stored", "learning_rate": 1e-12}
    config = config_of(**given | changes, out=str(tmp_path / "run"), epochs=0.5)
    assert finetune(config).metrics == result.metrics
    assert _losses(tmp_path / "run")[0]["loss"] < 0.3
    loaded = load_classifier(tmp_path / "run" / "hf")
    assert loaded.config.id2label == ("positive", "negative")


def test_biases_and_norms_are_not_decayed(given):
    marked, _ = jax.tree_util.tree_flatten_with_path(
        decays(load_start(config_of(**given)).params)
    )
    names = {jax.tree_util.keystr(path).split("'")[-2]: flag for path, flag in marked}
    assert names == {"kernel": True, "embedding": True, "bias": False, "scale": False}


def test_a_seed_has_a_head_of_its_own_and_dropout_is_the_one_asked_for(given):
    starts = [load_start(config_of(seed=seed, dropout=0.3, **given)) for seed in (0, 1)]
    kernels = [start.params["classifier"]["out_proj"]["kernel"] for start in starts]
    assert not np.array_equal(*(kernel[...] for kernel in kernels))
    bodies = [start.params["encoder"]["layers"][0]["query"] for start in starts]
    np.testing.assert_array_equal(*(body["kernel"][...] for body in bodies))
    model = starts[0].training(starts[0].params, starts[0].frozen)
    assert model.encoder.layers[0].attention_dropout.rate == 0.3
    assert model.classifier.dropout.rate == 0.3
    assert model.encoder.layers[0].dropout.deterministic is False
    model = starts[0].evaluation(starts[0].params, starts[0].frozen)
    assert model.encoder.layers[0].dropout.deterministic is True
