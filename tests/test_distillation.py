"""Distillation: a Llama that starts as an OPT, its loss, its end, and its text."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx
from tiny_training import ASSETS, config_of

from experiments import write_text as writing
from experiments.common.results import append_jsonl, read_jsonl
from experiments.train.bpe import load_tokenizer
from experiments.train.corpus import TextSource
from experiments.train.distill import distillation_loss, language_loss
from experiments.train.transplant import kept_layers, transplant
from experiments.train_lm import has_converged
from experiments.write_text import WriteConfig, split_texts, write_text
from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.models import DecoderForCausalLM, OPTConfig, OPTForCausalLM

TEACHER = {
    "vocab_size": 12,
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "ffn_dim": 12,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}


def _random(x, seed, scale=0.5):
    shift = 1.0 if x.ndim == 1 else 0.0
    values = scale * np.random.default_rng(seed).standard_normal(x.shape)
    return jnp.asarray(values + shift, jnp.float32)


@pytest.fixture(scope="module")
def teacher():
    """An OPT with random parameters, biases and scales of norms included."""
    model = OPTForCausalLM(OPTConfig(**TEACHER), rngs=nnx.Rngs(0))
    leaves, tree = jax.tree.flatten(nnx.state(model))
    nnx.update(
        model, jax.tree.unflatten(tree, [_random(x, i) for i, x in enumerate(leaves)])
    )
    return model


def _student(**changes):
    sizes = {
        "architecture": "llama",
        "teacher": "t",
        "start": "teacher",
        "layers": 3,
        "hidden_size": 8,
        "heads": 2,
        "ffn_dim": 12,
        "max_positions": 16,
    }
    config = config_of(**sizes | changes).model_config(12)
    return DecoderForCausalLM(config, rngs=nnx.Rngs(1))


def test_a_llama_of_all_its_sizes_computes_what_the_opt_does(teacher):
    """Guards centring, norms and biases: all that is exact where no position counts.

    Gates are far from zero on either side, positions are alike, and one token looks
    back at itself only.
    """
    opt = nnx.merge(*nnx.split(teacher))
    decoder = opt.decoder
    decoder.embed_positions.embedding[...] = jnp.ones((18, 8)) * 0.3
    decoder.final_layer_norm.bias[...] = jnp.zeros(8)
    table = decoder.embed_tokens.embedding[...]
    # The tied head, too, is without a mean then.
    decoder.embed_tokens.embedding[...] = table - table.mean(axis=1, keepdims=True)
    for layer in decoder.layers:
        layer.fc1.bias[...] = jnp.where(jnp.arange(12) % 3 == 0, -30.0, 30.0)
    student = _student()
    transplant(opt, student, jax.random.key(0), up_std=0.0)
    tokens = jnp.arange(12)[:, None]
    ours, theirs = (
        np.asarray(jax.nn.log_softmax(m(tokens)), np.float64) for m in (student, opt)
    )
    np.testing.assert_allclose(ours, theirs, atol=2e-3)
    assert np.ptp(theirs) > 1


def test_fewer_layers_heads_and_features_are_a_choice_of_the_teachers(teacher):
    student = _student(layers=2, kv_heads=1, ffn_dim=5)
    transplant(teacher, student, jax.random.key(0))
    last = teacher.decoder.layers[2]
    mean = np.asarray(last.self_attn.k_proj.kernel[...]).reshape(8, 2, 4).mean(axis=1)
    ours = student.layers[1]
    np.testing.assert_allclose(ours.self_attn.k_proj.kernel[...], mean, rtol=1e-6)
    gates = np.asarray(ours.mlp.gate_proj.kernel[...]) / 4
    theirs = np.asarray(last.fc1.kernel[...])
    sizes = np.linalg.norm(theirs, axis=0) * np.linalg.norm(
        np.asarray(last.fc2.kernel[...]), axis=1
    )
    kept = np.sort(np.argsort(-sizes)[:5])
    np.testing.assert_allclose(gates, theirs[:, kept], rtol=1e-6)
    assert kept_layers(7, 8) == [0, 1, 2, 4, 5, 6, 7]
    assert kept_layers(2, 3) == [0, 2]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": 16}, "`--hidden_size`=16 must be the teacher's 8"),
        ({"heads": 4}, "`--heads`=4 must be the teacher's 2"),
        ({"layers": 4}, "`--layers`=4 must be at most the teacher's 3"),
        ({"ffn_dim": 13}, "`--ffn_dim`=13 must be at most the teacher's 12"),
    ],
)
def test_a_llama_that_is_no_smaller_copy_is_refused(teacher, changes, named):
    with pytest.raises(UsageError, match=named):
        transplant(teacher, _student(**changes), jax.random.key(0))


def test_the_loss_is_the_divergence_from_the_teacher_and_that_of_the_text(teacher):
    student = _student()
    graphdef, params = nnx.split(student)
    theirs, frozen = nnx.split(teacher)
    tokens = jnp.asarray([[1, 5, 3, 2], [4, 4, 0, 11]])
    key = jax.random.key(0)

    def loss(weight):
        loss_fn = distillation_loss(graphdef, theirs, weight=weight)
        return float(loss_fn(params, frozen, tokens, key))

    log_p, log_q = (
        scipy.special.log_softmax(np.asarray(m(tokens[:, :-1]), np.float64), axis=-1)
        for m in (teacher, student)
    )
    apart = float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)))
    text = float(language_loss(graphdef)(params, (), tokens, key))
    assert apart > 0.1
    assert loss(1.0) == pytest.approx(apart, rel=1e-5)
    assert loss(0.0) == pytest.approx(text, rel=1e-6)
    assert loss(0.25) == pytest.approx(0.25 * apart + 0.75 * text, rel=1e-5)


def test_a_run_has_converged_once_its_patience_is_over(tmp_path):
    log = tmp_path / "log.jsonl"
    config = config_of(patience=2, eval_file="e", eval_every=10, steps=60)
    seen = []
    for step, loss in [
        (10, 5.0),
        (20, 4.0),
        (30, 4.5),
        (40, 3.9),
        (50, 3.9),
        (60, 4.2),
    ]:
        append_jsonl(log, {"step": step, "loss": 0.0})
        # Of a call that was cut short, which an uninterrupted run has not.
        append_jsonl(log, {"step": step - 1, "validation_loss": 1.0})
        append_jsonl(log, {"step": step, "validation_loss": loss})
        seen.append(has_converged(log, config))
    assert seen == [False, False, False, False, False, True]
    assert not has_converged(log, config_of(eval_every=10, steps=60))


def test_of_an_even_file_every_second_document_is_taken(tmp_path):
    """Guards the half that is left for calibration."""
    whole, half = tmp_path / "whole.txt", tmp_path / "half.txt"
    whole.write_text("A first whole text.\nIt ends.\n\nAnother one.\nIt ends, too.\n")
    half.write_text("".join(f"Text number {i}.\nIt ends.\n\n" for i in range(5)))
    source = TextSource((whole,), "", 0.0, 0, (half,))
    starts = [document.split("\n")[0] for document in source.documents()]
    evens = [f"Text number {i}." for i in (0, 2, 4)]
    assert starts == ["A first whole text.", "Another one.", *evens]
    both = TextSource((whole, half), "", 0.0, 0)
    assert source.fingerprint() != both.fingerprint()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"start": "teacher"}, "`--start=teacher` needs `--teacher` and"),
        ({"patience": 2}, "`--patience` needs an `--eval_file`"),
        ({"kv_heads": 3}, "`--kv_heads`=3 must divide `--heads`=2"),
        ({"text_file": ()}, "`--text_file` must be given"),
        ({"architecture": "gpt"}, "`--architecture` must be opt or llama"),
    ],
)
def test_flags_that_do_not_go_together_are_named(changes, named):
    with pytest.raises(UsageError, match=named):
        config_of(**changes)


class _Writer:
    """Writes the number of the batch in place of a model, and fails when told to."""

    def __init__(self, fails_at=None):
        self.fails_at = fails_at

    def draw(self, model, config, start, index):
        if index == self.fails_at:
            raise KeyboardInterrupt
        word = load_tokenizer(ASSETS / "opt-wiki-18m").encode(f"Batch {index}\n\n end")
        row = [start, *word.ids[1:], start, *word.ids[1:]]
        return np.asarray([row] * config.batch_size)


def test_written_text_goes_on_behind_the_last_batch(tmp_path, monkeypatch):
    config = WriteConfig(
        out=str(tmp_path / "text.txt"), tokens=40, context=8, batch_size=2
    )
    parts = tmp_path / "text.txt.parts.jsonl"
    loaded = types.SimpleNamespace(model=None, directory=ASSETS / "opt-wiki-18m")
    monkeypatch.setattr(writing, "load_language_model", lambda name: loaded)
    monkeypatch.setattr(writing, "_draw", _Writer(fails_at=2).draw)
    with pytest.raises(KeyboardInterrupt):
        write_text(config)
    assert len(read_jsonl(parts)) == 1 + 2 and not (tmp_path / "text.txt").exists()
    other = WriteConfig(out=config.out, tokens=40, context=8, batch_size=2, seed=1)
    with pytest.raises(CheckpointError, match="holds a text of"):
        write_text(other)
    monkeypatch.setattr(writing, "_draw", _Writer().draw)
    text = write_text(config).read_text("utf-8")
    expected = [f"Batch {index}\n end" for index in range(3) for _ in range(4)]
    assert text == "".join(f"{document}\n\n" for document in expected)
    assert not parts.exists()


def test_pieces_without_a_word_are_no_documents():
    tokenizer = load_tokenizer(ASSETS / "opt-wiki-18m")
    spaces = tokenizer.encode("  \n ", add_special_tokens=False).ids
    rows = np.asarray([[2, *spaces, 2, 2, *spaces, 2]])
    assert list(split_texts(rows, tokenizer)) == []
