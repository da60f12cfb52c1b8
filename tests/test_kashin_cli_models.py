"""`kashin eval` and `kashin generate` say what the library says."""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quantized_sources import edit_json, make_source, method
from tiny_checkpoint import table
from tiny_classifier import make_classifier

from kashin_jax import Rules, quantize_model
from kashin_jax.cli import main
from kashin_jax.evaluation import (
    bits_per_byte,
    make_windows,
    perplexity,
    score_windows,
    window_nll,
)
from kashin_jax.models.generation import generate
from kashin_jax.models.loading import load_opt
from kashin_jax.models.tokenizer import load_tokenizer, with_bos

# Bits, or numbers that another program made, are compared.
# Whole programs on tiny models: their numbers, resumption and files.
pytestmark = [pytest.mark.optimized, pytest.mark.slow]

RULES = Rules(config=method("rtn", bits=3, group_size=128))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("checkpoints") / "source")


@pytest.fixture(scope="module")
def quantized(source):
    target = source.parent / "quantized"
    flags = ["--method=rtn", "--bits=3", "--seed=5"]
    assert main(["quantize", str(source), str(target), *flags]) == 0
    return target


@pytest.fixture(scope="module")
def in_memory(source):
    """The same model, quantized without a file."""
    return quantize_model(
        load_opt(source).model, key=jax.random.key(5), rules=RULES
    ).model


def perplexity_of(model, source, *, context, batch_size, max_tokens=None, stride=None):
    """Also bits per byte, and the number of predictions."""
    text = source.with_suffix(".txt").read_text("utf-8")
    tokens, sizes = with_bos(load_tokenizer(source), text)
    windows = make_windows(
        tokens[:max_tokens], context=context, stride=stride, drop_last=False,
        token_bytes=sizes[:max_tokens],
    )  # fmt: skip
    graphdef, state = nnx.split(model)

    @jax.jit
    def nll(ids, scored, state):
        return window_nll(nnx.merge(graphdef, state)(ids), ids, scored)

    batches = score_windows(
        lambda ids, scored: nll(ids, scored, state), windows, batch_size=batch_size
    )
    nlls = np.concatenate([batch.nlls for batch in batches])
    value, bits = perplexity(nlls, windows), bits_per_byte(nlls, windows)
    return float(value), bits, int(windows.scored.sum())


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        pytest.param([], {"context": 64, "batch_size": 4}, marks=pytest.mark.slow),
        (
            ["--context=16", "--batch-size=3", "--max-tokens=101"],
            {"context": 16, "batch_size": 3, "max_tokens": 101},
        ),
        (
            ["--context=16", "--batch-size=3", "--max-tokens=101", "--stride=5"],
            {"context": 16, "batch_size": 3, "max_tokens": 101, "stride": 5},
        ),
    ],
    ids=["default", "flags", "stride"],
)
def test_the_perplexity_printed_is_bit_for_bit_that_of_quantizing_in_memory(
    source, quantized, in_memory, capsys, flags, options
):
    text = f"--text={source.with_suffix('.txt')}"
    assert main(["eval", str(quantized), text, *flags]) == 0
    value, bits, count = perplexity_of(in_memory, source, **options)
    stride = f"stride {options['stride']}, " if "stride" in options else ""
    assert capsys.readouterr().out == (
        f"{value!r} perplexity, {bits:.4f} bits per byte, {count} predictions, "
        f"{stride}context {options['context']}, begins with </s>\n"
    )


@pytest.mark.slow
def test_a_dense_checkpoint_is_evaluated_too(source, capsys):
    assert main(["eval", str(source), f"--text={source.with_suffix('.txt')}"]) == 0
    value, *_ = perplexity_of(load_opt(source).model, source, context=64, batch_size=4)
    assert float(capsys.readouterr().out.split()[0]) == value


def test_the_perplexity_is_that_of_the_table_on_the_same_text(source, tmp_path, capsys):
    # Windows of all positions were cut, though the model was trained at fewer: 29.7
    # in place of 20.6 on one text.
    shutil.copytree(source, tmp_path / "source")
    (tmp_path / "source" / "asset.json").write_text('{"trained_context": 24}')
    text = source.with_suffix(".txt")
    assert main(["eval", str(tmp_path / "source"), f"--text={text}"]) == 0
    printed = capsys.readouterr().out
    value, context = printed.split()[0], re.findall(r"context (\d+)", printed)[0]
    flags = ("--methods=full precision", "--context=0")
    (record,) = table(tmp_path / "source", tmp_path / "out", *flags, text=text)
    assert (int(context), record["context"]) == (24, 24)
    assert float(value) == pytest.approx(record["perplexity"], rel=1e-6)


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_what_does_not_run_here_is_named_with_what_can_be_done(
    source, quantized, tmp_path, capsys, command
):
    for name, checkpoint, words in [
        ("dense", source, "`kashin quantize` takes others"),
        ("packed", quantized, "`kashin dequantize` writes"),
    ]:
        other = shutil.copytree(checkpoint, tmp_path / name)
        edit_json(other / "config.json", lambda c: c.update(model_type="mamba"))
        rest = [f"--text={source}.txt"] if command == "eval" else ["a prompt"]
        found = line(capsys, 1, command, other, *rest)
        assert "'mamba'; models that run here are bert, distilbert, opt" in found
        assert words in found


def test_a_prompt_is_continued_as_by_the_library(source, quantized, in_memory, capsys):
    tokenizer = load_tokenizer(source)
    ids = np.insert(tokenizer.encode("the of"), 0, tokenizer.bos_id)
    tokens = generate(in_memory, jnp.asarray(ids)[None], max_new_tokens=6)
    expected = tokenizer.decode(np.asarray(tokens[0, 1:]))
    assert main(["generate", str(quantized), "the of", "--max-new-tokens=6"]) == 0
    assert capsys.readouterr().out == f"{expected}\n"
    assert expected.startswith("the of") and len(expected) > len("the of")


def line(capsys, code, *arguments):
    assert main([str(argument) for argument in arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"kashin \w+: [^\n]+\n", err)
    return err


def test_what_cannot_be_evaluated_is_named(source, quantized, tmp_path, capsys):
    text = f"--text={source.with_suffix('.txt')}"
    assert "[2, 64]" in line(capsys, 2, "eval", quantized, text, "--context=65")
    assert "[2, 64]" in line(capsys, 2, "eval", quantized, text, "--context=1")
    assert "must not exceed the context, 64" in line(
        capsys, 2, "eval", quantized, text, "--stride=65"
    )
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert "UTF-8" in line(
        capsys, 1, "eval", quantized, f"--text={tmp_path / 'binary'}"
    )
    (tmp_path / "empty").write_text("")
    assert "2 tokens" in line(
        capsys, 1, "eval", quantized, f"--text={tmp_path / 'empty'}"
    )


def test_classifiers_have_no_perplexity(tmp_path, capsys):
    make_classifier(tmp_path / "bert", "sst2")
    assert "classifier" in line(capsys, 2, "generate", tmp_path / "bert", "a prompt")
