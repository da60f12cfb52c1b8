"""The OPT model: equal to Hugging Face's, causal, blind to padding, made of linears."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kashin_jax.models.loading import load_opt
from kashin_jax.models.opt import OPTForCausalLM

# Bits, or numbers that another program made, are compared.
pytestmark = pytest.mark.optimized

HERE = pathlib.Path(__file__).parent
GOLDEN = HERE / "golden" / "opt"
WIKI = HERE.parent / "experiments" / "assets" / "opt-wiki-18m"
SMALL = ["prenorm", "postnorm", "untied"]
VOCABULARY = 61
# The columns of the second row that padding takes.
PAD = {"none": slice(0, 0), "left": slice(0, 5), "right": slice(-5, None)}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "golden.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def models():
    small = {name: load_opt(str(GOLDEN / name)).model for name in SMALL}
    return small | {"wiki": load_opt(str(WIKI)).model}


@nnx.jit
def forward(model, ids, mask):
    return model(ids, mask)


def logits_of(model, ids, mask=None):
    mask = np.ones(ids.shape) if mask is None else mask
    return np.asarray(
        forward(model, jnp.asarray(ids, jnp.int32), jnp.asarray(mask, jnp.int32))
    )


def rebuilt(model, config, value_of=lambda path, value: value, **options):
    """A model of another configuration, with the parameters of the first."""
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: OPTForCausalLM(config, rngs=nnx.Rngs(0), **options))
    )
    source = dict(nnx.to_flat_state(nnx.state(model)))
    flat = {
        path: variable.replace(value_of(path, source[path][...]))
        for path, variable in nnx.to_flat_state(state)
    }
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def padding(ids, side):
    """Ones, with padding in the second row only."""
    mask = np.ones(ids.shape, np.int32)
    mask[1, PAD[side]] = 0
    return mask


def relative_difference(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("side", PAD)
@pytest.mark.parametrize("name", [*SMALL, "wiki"])
def test_logits_equal_those_of_hugging_face(models, golden, name, side):
    ids = golden[f"{name}/ids"]
    mask = padding(ids, side)
    logits = logits_of(models[name], ids, mask)
    real = mask.astype(bool)
    if name == "wiki":  # stored at every 8th position and every 16th token
        logits, real = logits[:, ::8, ::16], real[:, ::8]
    expected = golden[f"{name}/{side}/logits"]
    assert relative_difference(logits[real], expected[real]) < 1e-5


@pytest.mark.parametrize("name", SMALL)
def test_what_fills_the_padding_does_not_matter(models, golden, name):
    ids = golden[f"{name}/ids"]
    for side in ("left", "right"):
        mask = padding(ids, side)
        other = np.where(mask, ids, (ids + 7) % VOCABULARY)
        first = logits_of(models[name], ids, mask)
        second = logits_of(models[name], other, mask)
        assert not np.array_equal(first, second)
        np.testing.assert_array_equal(first[mask > 0], second[mask > 0])
        assert np.isfinite(second).all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", SMALL)
def test_a_padded_row_has_the_logits_of_the_row_alone(models, golden, name, side):
    ids = golden[f"{name}/ids"]
    mask = padding(ids, side)
    alone = logits_of(models[name], ids[1:, mask[1] > 0])
    padded = logits_of(models[name], ids, mask)[1:, mask[1] > 0]
    assert relative_difference(padded, alone) < 1e-5


@pytest.mark.parametrize("name", SMALL)
def test_later_tokens_do_not_change_earlier_logits(models, golden, name):
    ids = golden[f"{name}/ids"]
    changed = ids.copy()
    changed[:, 8:] = (changed[:, 8:] + 1) % VOCABULARY
    first, second = (logits_of(models[name], x) for x in (ids, changed))
    np.testing.assert_allclose(first[:, :8], second[:, :8], rtol=1e-5, atol=1e-5)
    assert relative_difference(first[:, 8:], second[:, 8:]) > 0.1


@pytest.mark.parametrize("name", SMALL)
def test_cached_decoding_equals_reading_everything_again(models, golden, name):
    model, ids = models[name], golden[f"{name}/ids"]
    mask = padding(ids, "left")
    full = logits_of(model, ids, mask)
    ids, mask = jnp.asarray(ids, jnp.int32), jnp.asarray(mask)
    cache = model.init_cache(2, 20)
    decode = nnx.jit(lambda model, *args: model.decode(*args))
    for start, stop in [(0, 6), (6, 12), (12, 13), (13, 14)]:
        window = slice(start, stop)
        logits, cache = decode(model, ids[:, window], cache, mask[:, window])
        assert relative_difference(np.asarray(logits), full[:, stop - 1]) < 1e-5
    assert cache.length == 14


@pytest.mark.slow
def test_bfloat16_computes_nearly_the_same(models, golden):
    exact = models["wiki"]
    computed = rebuilt(exact, exact.config, dtype=jnp.bfloat16)
    stored = load_opt(str(WIKI), dtype=jnp.bfloat16).model
    assert {x.dtype.name for x in jax.tree.leaves(nnx.state(stored))} == {"bfloat16"}
    expected = logits_of(exact, golden["wiki/ids"])
    for half in (computed, stored):
        found = logits_of(half, golden["wiki/ids"])
        assert found.dtype == np.float32
        # The unit roundoff of bfloat16 is 4e-3, and 8 layers add theirs.
        assert 1e-4 < relative_difference(found, expected) < 3e-2


def test_split_merge_and_jit_give_the_same_logits(models, golden):
    model, ids = models["postnorm"], jnp.asarray(golden["postnorm/ids"], jnp.int32)
    graphdef, state = nnx.split(model)
    pure = jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids))
    eager = np.asarray(model(ids))
    for compiled in (logits_of(model, ids), pure(state, ids)):
        assert relative_difference(np.asarray(compiled), eager) < 1e-5


class Opaque(nnx.Module):
    """A linear of which nothing can be read; it can only be called."""

    def __init__(self, linear):
        self._wrapped = linear

    def __call__(self, x):
        return self._wrapped(x)


@pytest.mark.parametrize("name", ["postnorm", "untied"])
def test_every_linear_can_be_replaced_by_anything_callable(golden, name):
    model = load_opt(str(GOLDEN / name)).model
    ids = golden[f"{name}/ids"]
    before = logits_of(model, ids)
    replaced = []
    for path, module in list(nnx.iter_modules(model)):
        for attribute, child in list(vars(module).items()):
            if type(child) is nnx.Linear:
                setattr(module, attribute, Opaque(child))
                replaced.append(".".join(map(str, (*path, attribute))))
    extra = ["lm_head"] if name == "untied" else []
    if name == "postnorm":
        extra = ["decoder.project_in", "decoder.project_out"]
    projections = [f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")]
    assert sorted(replaced) == sorted(
        [
            f"decoder.layers.{i}.{linear}"
            for i in range(2)
            for linear in (*projections, "fc1", "fc2")
        ]
        + extra
    )
    np.testing.assert_array_equal(logits_of(model, ids), before)


@pytest.mark.parametrize(
    ("switch", "is_gone"),
    [
        ("enable_bias", lambda path: path[-1] == "bias" and "norm" not in path[-2]),
        ("layer_norm_elementwise_affine", lambda path: "norm" in path[-2]),
    ],
)
def test_a_part_switched_off_equals_the_part_set_neutral(
    models, golden, switch, is_gone
):
    model, ids = models["prenorm"], golden["prenorm/ids"]
    config = dataclasses.replace(model.config, **{switch: False})
    off = rebuilt(model, config)
    assert not any(is_gone(path) for path, _ in nnx.to_flat_state(nnx.state(off)))

    def neutral_value(path, value):
        return jnp.full_like(value, path[-1] == "scale") if is_gone(path) else value

    neutral = rebuilt(model, model.config, neutral_value)
    found = logits_of(off, ids)
    assert relative_difference(found, logits_of(neutral, ids)) < 1e-6
    assert relative_difference(found, logits_of(model, ids)) > 0.01


def test_dropout_acts_in_training_mode_only(models):
    source = models["prenorm"]
    config = dataclasses.replace(source.config, dropout=0.5, attention_dropout=0.2)
    model = rebuilt(source, config)
    ids = jnp.arange(28, dtype=jnp.int32).reshape(2, 14)
    before = logits_of(model, ids)
    model.train()
    train = nnx.jit(lambda model, key: model(ids, rngs=nnx.Rngs(dropout=key)))
    first, again, other = (train(model, jax.random.key(k)) for k in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any() and (first != before).any()
    with pytest.raises(ValueError, match="rngs"):
        model(ids)
    model.eval()
    np.testing.assert_array_equal(logits_of(model, ids), before)


def test_every_parameter_gets_a_gradient():
    model = load_opt(str(GOLDEN / "postnorm")).model
    model.train()
    ids = jax.random.randint(jax.random.key(0), (4, 12), 0, 61)

    def loss(model):
        logits = model(ids, rngs=nnx.Rngs(dropout=1))
        chosen = jnp.take_along_axis(
            jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1
        )
        return -chosen.mean()

    for path, gradient in nnx.to_flat_state(nnx.jit(nnx.grad(loss))(model)):
        value = np.asarray(gradient[...])
        assert np.isfinite(value).all(), path
        # A constant added to all keys of a head cancels in the softmax.
        assert value.any() or path[-2:] == ("k_proj", "bias"), path


def test_sequences_that_have_no_positions_are_refused(models):
    model = models["prenorm"]
    with pytest.raises(ValueError, match="`input_ids` has 41 tokens.*40"):
        model(jnp.zeros((1, 41), jnp.int32))
    with pytest.raises(ValueError, match="`max_length` has 41 tokens.*40"):
        model.init_cache(1, 41)
    with pytest.raises(ValueError, match="`input_ids` has 9 tokens.*8"):
        model.decode(jnp.zeros((1, 9), jnp.int32), model.init_cache(1, 8))
    ids = jnp.zeros((2, 4), jnp.int32)
    # Without the run-time check of shapes that these tests run under.
    unchecked = OPTForCausalLM.__call__.__wrapped__
    with pytest.raises(ValueError, match=r"`attention_mask`.*\(2, 4\).*\(1, 4\)"):
        unchecked(model, ids, jnp.ones((1, 4), jnp.int32))


def test_an_id_outside_the_vocabulary_is_not_silently_another_token(models):
    ids = np.array([[5, 6, VOCABULARY, 7], [5, 6, VOCABULARY - 1, 7]])
    bad, good = logits_of(models["prenorm"], ids)
    assert np.isnan(bad).all()
    assert np.isfinite(good).all()


def test_models_are_tabulated(models):
    """Flax shows what layers return, and takes named tuples among it for lists."""
    table = nnx.tabulate(models["prenorm"], jnp.ones((1, 4), jnp.int32))
    assert "OPTAttention" in table
