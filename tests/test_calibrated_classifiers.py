"""Classifiers quantized with a text: padding counts nothing, examples are theirs."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_checkpoint import edit_tensors, make_checkpoint
from tiny_classifier import (
    LONG,
    arguments,
    given,
    make_classifier,
    sentence,
    table,
    write_rows,
    write_tasks,
)

from experiments.classification.calibration import text_sentences
from experiments.glue import main as job
from kashin_jax import RTN, Rules, quantize_model
from kashin_jax.cli import main
from kashin_jax.errors import DataError, UsageError
from kashin_jax.io import open_checkpoint
from kashin_jax.models import load_classifier
from kashin_jax.models.bert import ClassifierConfig, SequenceClassifier
from kashin_jax.models.tokenizer import Encoded
from kashin_jax.pipeline import (
    Calibration,
    CalibrationExamples,
    calibration_text,
    packed_layers,
    quantize_checkpoint,
)
from kashin_jax.pipeline.blocks import BlockRunner
from kashin_jax.pipeline.moments import whole_of
from kashin_jax.pipeline.passes import EncoderInputs

__all__ = ["given"]  # a fixture

GPTQ = Rules(config=RTN(bits=2, group_size=32))
# Within the blocks; the pooler is behind them.
LINEARS = 2 * 6


def text(lines=120, seed=0):
    """Some lines are pairs, and one is longer than the model's 40 positions."""
    rng = np.random.default_rng(seed)
    words = [sentence(rng, 2, 12) for _ in range(lines)]
    words[::3] = [f"{line}\t{sentence(rng, 2, 12)}" for line in words[::3]]
    return "\n".join([*words, "", f"{LONG} {LONG}"])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Not to be changed."""
    return make_classifier(tmp_path_factory.mktemp("classifier") / "source", "sst2")


@pytest.fixture(scope="module")
def examples(source):
    return calibration_text(open_checkpoint(source), text(), 700)


@pytest.fixture(scope="module")
def model(source):
    """Not to be changed."""
    return load_classifier(source).model


def test_moments_are_those_of_each_example_alone(model):
    """Guards padding in sums and in attention, and token types that get lost."""
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 44, (2, 9)).astype(np.int32)
    types = rng.integers(0, 2, (2, 9)).astype(np.int32)
    mask = (np.arange(9) < np.asarray([[9], [5]])).astype(np.int32)
    runner = BlockRunner(model, "encoder/layers", EncoderInputs(ids, mask, types))
    batch = EncoderInputs(ids, mask, types)
    x = runner.outputs(0, runner.blocks[0], batch, runner.first(batch))
    stages = runner.stages(1, ["query", "key", "value"])
    assert stages == [("query", "key", "value")]
    call = runner.moments_call(1, runner.blocks[1], stages)
    (half,) = call(batch, x, None, None)
    expected = np.zeros((64, 64))
    for row, length in enumerate((9, 5)):
        one, kind = ids[row : row + 1, :length], types[row : row + 1, :length]
        alone = model.encoder.embeddings(jnp.asarray(one), jnp.asarray(kind))
        visible = jnp.ones((1, 1, 1, length), bool)
        alone = np.asarray(model.encoder.layers[0](alone, visible))[0]
        expected += alone.T @ alone
    found = whole_of(np.asarray(half, np.float64), 64)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_no_layer_is_worse_and_the_checkpoint_has_the_same_codes(
    source, examples, model, tmp_path, caplog
):
    """Guards both ways to a quantized encoder, and layers outside of its blocks."""
    calibration = examples.calibration(0)
    small, reports = quantize_model(model, rules=GPTQ, calibration=calibration)
    assert "1 layers are coded without calibration" in caplog.text
    without = [path for path, r in reports.items() if r.calibration is None]
    assert without == ["pooler"] and len(reports) == LINEARS + 1
    found = [r.calibration for r in reports.values() if r.calibration]
    assert all(each.output_error <= each.data_free_error for each in found)
    whole, free = np.sum([each[:2] for each in found], axis=0)
    assert whole < 0.9 * free
    # As pretraining leaves it, of a head that the model does not have.
    foreign, pretrained = "cls.predictions.transform.dense", tmp_path / "source"
    shutil.copytree(source, pretrained)
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    edit_tensors(pretrained, lambda t: t.update({f"{foreign}.weight": weight}))
    written = quantize_checkpoint(
        pretrained, tmp_path / "out", GPTQ, calibration=calibration
    )
    packed = packed_layers(open_checkpoint(written.directory))
    assert packed.keys() == reports.keys() | {foreign.replace(".", "/")}
    layer = small.encoder.layers[1].output.kernel.get_value()
    expected = packed["encoder/layers/1/output"]
    np.testing.assert_array_equal(layer.packed_codes, expected.packed_codes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("roberta", {"pad_token_id": 1, "type_vocab_size": 1}),
        ("distilbert", {"type_vocab_size": 0}),
    ],
)
def test_other_encoders_are_calibrated(examples, kind, fields):
    """Guards encoders that count positions by padding, or have no token types."""
    config = ClassifierConfig(**{
        "model_type": kind, "vocab_size": 44, "hidden_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64,
        "max_position_embeddings": 60, "initializer_range": 0.15,
        "id2label": ("a", "b"), **fields,
    })  # fmt: skip
    model = SequenceClassifier(config, rngs=nnx.Rngs(0))
    calibration = examples.calibration(0)
    # RoBERTa has one type of token.
    calibration = Calibration(windows=calibration.windows, mask=calibration.mask)
    _, reports = quantize_model(model, rules=GPTQ, calibration=calibration)
    found = [r.calibration for r in reports.values() if r.calibration]
    assert len(found) == 6
    assert sum(each.damping is not None for each in found) > 3


class Pooled(nnx.Module):
    """A block with a layer that reads one vector of a whole example."""

    def __init__(self):
        self.inner = nnx.Linear(8, 8, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return x + self.inner(x.mean(axis=1))[:, None]


class PooledModel(nnx.Module):
    def __init__(self):
        self.embed = nnx.Embed(10, 8, rngs=nnx.Rngs(0))
        self.blocks = nnx.List([Pooled()])

    def __call__(self, ids, attention_mask=None):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x.mean(axis=1)


IDS = np.ones((8, 4), np.int32)


def test_a_layer_whose_padding_nobody_knows_is_refused():
    masked = Calibration(windows=IDS, mask=IDS)
    with pytest.raises(UsageError, match=r"`blocks/\*/inner` reads .* \(1, 8\)"):
        quantize_model(PooledModel(), rules=GPTQ, calibration=masked)


def test_weights_by_gradients_need_a_loss_at_every_token():
    weighted = Calibration(windows=IDS, weighting="gradient")
    with pytest.raises(UsageError, match="`weighting` by gradients is for models"):
        quantize_model(PooledModel(), rules=GPTQ, calibration=weighted)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask": IDS[:, :2]}, "`mask` must have the shape"),
        ({"token_types": IDS[:2]}, "`token_types` must have the shape"),
        ({"mask": np.triu(IDS, -3)}, "no token of window 7"),
        ({"mask": IDS, "weighting": "gradient"}, "`weighting` is for language"),
    ],
)
def test_inputs_of_encoders_are_checked(fields, message):
    with pytest.raises(UsageError, match=message):
        Calibration(windows=IDS, **fields)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (Calibration(windows=IDS, token_types=2 * IDS), "has 2 token types"),
        (Calibration(windows=np.ones((8, 41), np.int32)), "has 40 positions"),
        (Calibration(windows=IDS, weighting="gradient"), "is a classifier, and"),
    ],
)
def test_what_a_checkpoint_cannot_read_is_said_first(
    source, tmp_path, calibration, message
):
    with pytest.raises(UsageError, match=message):
        quantize_checkpoint(source, tmp_path / "out", GPTQ, calibration=calibration)
    assert not (tmp_path / "out").exists()


def test_a_language_model_takes_no_mask(tmp_path):
    source = make_checkpoint(tmp_path / "tiny")
    masked = Calibration(windows=IDS, mask=IDS)
    with pytest.raises(UsageError, match="is a language model, which takes neither"):
        quantize_checkpoint(source, tmp_path / "out", GPTQ, calibration=masked)


def test_runs_with_other_masks_are_told_apart():
    """Guards directories of unfinished runs, which are named after the digest."""
    ones, types = np.ones_like(IDS), np.tril(IDS)
    digests = {
        Calibration(windows=IDS).digest,
        Calibration(windows=IDS, mask=ones).digest,
        Calibration(windows=IDS, token_types=ones).digest,
        Calibration(windows=IDS, mask=types).digest,
        Calibration(windows=IDS, mask=types, token_types=ones).digest,
        Calibration(windows=IDS, mask=ones, token_types=types).digest,
    }
    assert len(digests) == 6


def test_lines_become_examples(examples):
    """Guards pairs, and lines that are longer than the model's positions."""
    found = examples.examples
    assert len(found) == 120 + 2
    assert max(len(each.input_ids) for each in found) == 40
    assert sum(len(each.input_ids) == 40 for each in found) == 1
    # 66 words and the ends of two pieces: nothing is lost.
    pieces = [each for each in found if each.truncated]
    assert sum(len(each.input_ids) for each in pieces) == 66 + 2 * 2
    assert all(each.input_ids[0] == 2 and each.input_ids[-1] == 3 for each in found)
    assert sum(max(each.token_type_ids) for each in found) == 40


def test_examples_are_drawn_and_padded():
    encoded = [
        Encoded([2, i, 3][: 2 + i % 2], [0, 1, 1][: 2 + i % 2], False)
        for i in range(200)
    ]
    found = CalibrationExamples(examples=encoded, pad_id=9, count=400).calibration(0)
    # 160 examples or so have 400 tokens: whole batches of eight stay held out.
    assert (
        found.windows.shape == found.mask.shape == found.token_types.shape == (128, 3)
    )
    assert (found.mask[:, :2] == 1).all() and 0 < found.mask[:, 2].mean() < 1
    assert (found.windows[found.mask == 0] == 9).all()
    assert (found.token_types[found.mask == 0] == 0).all()
    other = CalibrationExamples(examples=encoded, pad_id=9, count=400).calibration(1)
    assert (found.windows != other.windows).any()
    with pytest.raises(DataError, match="500 tokens in 200 examples, and 501"):
        CalibrationExamples(examples=encoded, pad_id=9, count=501).calibration(0)
    with pytest.raises(UsageError, match="two examples at least"):
        CalibrationExamples(examples=encoded, pad_id=9, count=3).calibration(0)


def test_the_command_takes_a_classifier(source, tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_text(text(), "utf-8")
    command = [
        "quantize", str(source), str(tmp_path / "out"), "--method=rtn", "--bits=2",
        "--set", "group_size=32", f"--calibration={file}", "--calibration-tokens=700",
    ]  # fmt: skip
    assert main(command) == 0
    assert f"{LINEARS} layers calibrated: on held-out text" in capsys.readouterr().out
    assert main([*command, "--calibration-weighting=gradient"]) == 2
    assert "for language models" in capsys.readouterr().err


def test_sentences_of_a_text():
    found = text_sentences(' = Head = \n\n One is 1.5 m. "Two" is! It? is so. \n x\n')
    assert found == ["One is 1.5 m.", '"Two" is!', "It? is so.", "x"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Development sets of two tasks, and their training sets."""
    root = write_tasks(tmp_path_factory.mktemp("data") / "glue")
    rng = np.random.default_rng(1)
    rows = [f"{sentence(rng, 3, 12)}\t1" for _ in range(90)]
    write_rows(root / "SST-2" / "train.tsv", ["sentence\tlabel", *rows])
    rows = [f"{sentence(rng, 2, 9)}\t{sentence(rng, 2, 9)}\t1" for _ in range(90)]
    header = "sentence1\tsentence2\tscore"
    write_rows(root / "STS-B" / "train.tsv", [header, *rows])
    return root


CALIBRATED = (
    "--calibration=train", "--calibration_tokens=500", "--bits=3",
    "--methods=gptq-g128,rtn-g128",
)  # fmt: skip


@pytest.mark.slow
def test_the_main_job_has_calibrated_rows(given, data, tmp_path):
    """Guards each task's own training set, and rows that must tell texts apart."""
    out = tmp_path / "out"
    records = table(given.template, data, out, *CALIBRATED)
    assert [file.name for file in out.glob("*.jsonl")] == ["calibrated_glue.jsonl"]
    fed = [r for r in records if r["method"] == "gptq-g128"]
    assert {r["task"] for r in fed} == {"sst2", "stsb"}
    assert {(r["calibration"], r["calibration_tokens"]) for r in fed} == {
        ("train", 500)
    }
    assert len({r["calibration_sha256"] for r in fed}) == 2
    assert all(r["output_error"] < r["data_free_output_error"] for r in fed)
    assert not any("calibration" in r for r in records if r["method"] != "gptq-g128")
    shown = (out / "calibrated_glue.md").read_text("utf-8")
    assert "| calibration |" in shown and "| train |" in shown
    flags = (*CALIBRATED[1:], "--calibration_tokens=400", "--calibration=train")
    again = table(given.template, data, out, *flags)
    counts = {r["calibration_tokens"] for r in again if r["method"] == "gptq-g128"}
    assert counts == {400, 500}


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--calibration={data}/SST-2/dev.tsv"], 2, "is a file that is scored"),
        (["--tasks=sentiment-nyt"], 2, "has no training set"),
        (["--calibration_tokens=9999"], 1, "Give a longer text"),
        (["--calibration_tokens=3"], 2, "two examples at least"),
        (["--methods=uniform"], 2, "name one, or leave it out"),
        (["--methods=kashin-joint-refined"], 2, "has no `kashin-joint-refined`"),
        (["--calibration="], 2, "`gptq-g128` needs `--calibration`"),
    ],
)
def test_the_main_job_names_what_is_wrong(
    given, data, tmp_path, capsys, flags, code, message
):
    model = given.root / "bert-sst2"
    own = [flag.format(data=data) for flag in flags]
    first = [*CALIBRATED, "--tasks=sst2"]
    assert job(arguments(model, data, tmp_path / "out", *first, *own)) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
