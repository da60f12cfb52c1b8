"""BERT, RoBERTa and DistilBERT: equal to Hugging Face's, blind to padding."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kashin_jax.models import ClassifierConfig, SequenceClassifier, load_classifier
from kashin_jax.pipeline import selected_kernels

# Bits, or numbers that another program made, are compared.
pytestmark = pytest.mark.optimized

HERE = pathlib.Path(__file__).parent
GOLDEN = HERE / "golden" / "classifier"
MINILM = HERE.parent / "experiments" / "assets" / "minilm-glue"
SMALL = ["bert", "bert-regression", "roberta", "distilbert"]
PAD = {"bert": 0, "bert-regression": 0, "roberta": 1, "distilbert": 0}
NUM_PADDED = {"none": 0, "right": 5}
TINY = ClassifierConfig(
    model_type="bert",
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=12,
)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "golden.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def models():
    return {name: load_classifier(GOLDEN / name).model for name in SMALL}


@nnx.jit
def both(model, ids, mask, types):
    return model.hidden_states(ids, mask, types), model(ids, mask, types)


# As one program: layer by layer every test would take seconds.
call = nnx.jit(lambda model, *inputs, **options: model(*inputs, **options))


def outputs(model, ids, mask, types):
    arrays = (jnp.asarray(a, jnp.int32) for a in (ids, mask, types))
    hidden, logits = both(model, *arrays)
    return np.asarray(hidden), np.asarray(logits)


def padded(ids, padding, pad):
    ids, mask = ids.copy(), np.ones(ids.shape)
    start = ids.shape[1] - NUM_PADDED[padding]
    ids[1, start:], mask[1, start:] = pad, 0
    return ids, mask


def relative_difference(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("name", SMALL)
def test_hidden_states_and_logits_are_those_of_hugging_face(
    name, padding, models, golden
):
    ids, mask = padded(golden[f"{name}/ids"], padding, PAD[name])
    hidden, logits = outputs(models[name], ids, mask, golden[f"{name}/types"])
    expected = golden[f"{name}/{padding}/hidden"]
    real = mask.astype(bool)
    assert relative_difference(hidden[real], expected[real]) < 1e-5
    assert relative_difference(logits, golden[f"{name}/{padding}/logits"]) < 1e-5


@pytest.mark.parametrize(
    "head",
    [*(pytest.param(h, marks=pytest.mark.slow) for h in ("mrpc", "stsb")), "sst2"],
)
def test_the_embedded_encoder_gives_hugging_faces_values_with_every_head(head, golden):
    model = load_classifier(MINILM, head=head).model
    ids, mask, types = (golden[f"minilm/{key}"] for key in ("ids", "mask", "types"))
    hidden, logits = outputs(model, ids, mask, types)
    real = mask.astype(bool)
    found, expected = hidden[:, :, ::8], golden["minilm/hidden"]
    assert relative_difference(found[real], expected[real]) < 1e-5
    assert relative_difference(logits, golden[f"minilm/{head}/logits"]) < 1e-5


@pytest.mark.parametrize("name", ["bert", "roberta"])  # of other padding tokens
def test_more_padding_changes_nothing(name, models, golden):
    ids, types = golden[f"{name}/ids"], golden[f"{name}/types"]
    _, expected = outputs(models[name], ids, np.ones(ids.shape), types)
    extra = ((0, 0), (0, 6))
    longer = np.pad(ids, extra, constant_values=PAD[name])
    mask = np.pad(np.ones(ids.shape), extra)
    _, found = outputs(models[name], longer, mask, np.pad(types, extra))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_later_tokens_and_token_types_matter(models, golden):
    ids, types = golden["bert/ids"], golden["bert/types"]
    ones = np.ones(ids.shape)
    _, usual = outputs(models["bert"], ids, ones, types)
    _, others = outputs(models["bert"], ids, ones, 1 - types)
    changed = ids.copy()
    changed[:, -1] = (changed[:, -1] + 1) % 61
    _, last = outputs(models["bert"], changed, ones, types)
    assert np.abs(others - usual).max() > 1e-2
    assert np.abs(last - usual).max() > 1e-2


def test_masks_and_types_default_to_ones_and_zeros(models, golden):
    model, ids = models["bert"], jnp.asarray(golden["bert/ids"], jnp.int32)
    explicit = call(model, ids, jnp.ones_like(ids), jnp.zeros_like(ids))
    # Ones that are known to the compiler are not multiplied by.
    np.testing.assert_allclose(call(model, ids), explicit, rtol=1e-5, atol=1e-6)


def test_dropout_needs_training_mode_and_a_key():
    model = SequenceClassifier(TINY, rngs=nnx.Rngs(0))
    ids = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)
    calm = call(model, ids)
    np.testing.assert_array_equal(calm, call(model, ids))
    model.train()
    first, second = (
        call(model, ids, rngs=nnx.Rngs(dropout=jax.random.key(i))) for i in (0, 1)
    )
    assert np.abs(np.asarray(first - second)).max() > 1e-4


def test_the_state_of_a_model_is_its_parameters():
    model = SequenceClassifier(TINY, rngs=nnx.Rngs(0))
    state = nnx.state(model)
    assert len(jax.tree.leaves(state)) == len(
        jax.tree.leaves(nnx.state(model, nnx.Param))
    )


@pytest.mark.parametrize(
    "dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)]
)
def test_low_precision_gives_nearly_the_same_logits(dtype, golden):
    ids = golden["minilm/ids"], golden["minilm/mask"], golden["minilm/types"]
    model = load_classifier(MINILM, head="sst2", dtype=dtype).model
    _, logits = outputs(model, *ids)
    assert logits.dtype == np.float32
    assert relative_difference(logits, golden["minilm/sst2/logits"]) < 0.05


@pytest.mark.parametrize(
    ("name", "skipped"),
    [("bert", 1), ("roberta", 2), ("distilbert", 2)],
)
def test_by_default_all_matrices_but_those_of_the_head_are_quantized(
    name, skipped, models
):
    linears = [
        node for _, node in nnx.iter_graph(models[name]) if type(node) is nnx.Linear
    ]
    selected = selected_kernels(models[name])
    assert len(linears) - len(selected) == skipped
    assert not [path for path in selected if "classifier" in path]
    assert ("pooler" in selected) == (name == "bert")


def test_a_sequence_longer_than_the_positions_is_refused():
    model = SequenceClassifier(TINY, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"13 tokens; at most 12 have positions"):
        model(jnp.zeros((1, 13), jnp.int32))


def test_roberta_has_fewer_positions_than_rows():
    config = dataclasses.replace(
        TINY, model_type="roberta", pad_token_id=1, type_vocab_size=1
    )
    assert config.max_length == 10
    model = SequenceClassifier(config, rngs=nnx.Rngs(0))
    logits = call(model, jnp.asarray(np.full((1, 10), 5, np.int32)))
    assert np.isfinite(np.asarray(logits)).all()
    with pytest.raises(ValueError, match=r"11 tokens; at most 10"):
        model(jnp.asarray(np.full((1, 11), 5, np.int32)))


@pytest.mark.parametrize("name", ["attention_mask", "token_type_ids"])
def test_an_argument_of_another_shape_is_refused(name):
    model = SequenceClassifier(TINY, rngs=nnx.Rngs(0))
    wrong = {name: jnp.ones((2, 4), jnp.int32)}
    with pytest.raises(Exception, match=name):
        model(jnp.zeros((2, 5), jnp.int32), **wrong)
