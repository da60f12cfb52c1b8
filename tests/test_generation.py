"""Generation: the cache changes the cost of decoding, never its result."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kashin_jax.errors import UsageError
from kashin_jax.models.generation import generate
from kashin_jax.models.loading import load_opt

# Bits, or numbers that another program made, are compared.
pytestmark = pytest.mark.optimized

HERE = pathlib.Path(__file__).parent
GOLDEN = HERE / "golden" / "opt"
WIKI = HERE.parent / "experiments" / "assets" / "opt-wiki-18m"
# As many as the golden texts have: one program for all tests that can share it.
NEW = 12
PROMPT = jnp.asarray([[11, 27, 6, 42, 26, 18]], jnp.int32)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "golden.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def model():
    return load_opt(str(GOLDEN / "prenorm")).model


@nnx.jit
def forward(model, ids):
    return model(ids)


def left_padded(golden, name):
    """The golden prompts, the second with five columns of padding in front."""
    ids = jnp.asarray(golden[f"{name}/ids"], jnp.int32)
    return ids, jnp.ones_like(ids).at[1, :5].set(0)


@pytest.mark.parametrize(
    "name",
    ["prenorm", "postnorm", "untied", pytest.param("wiki", marks=pytest.mark.slow)],
)
def test_greedy_text_equals_that_of_hugging_face(golden, name):
    model = load_opt(str(WIKI if name == "wiki" else GOLDEN / name)).model
    ids, mask = left_padded(golden, name)
    # Hugging Face stops a row at the end token of the configuration.
    found = generate(
        model, ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=2
    )
    np.testing.assert_array_equal(found, golden[f"{name}/greedy"])


def test_greedy_text_equals_full_recomputation(model):
    found = generate(model, PROMPT, max_new_tokens=10)
    ids = np.full((1, 16), 1, np.int32)
    ids[:, :6] = PROMPT
    for t in range(6, 16):
        # What lies behind is invisible, so one compiled length serves all.
        logits = forward(model, jnp.asarray(ids))
        ids[:, t] = np.argmax(logits[:, t - 1], axis=-1)
    np.testing.assert_array_equal(found, ids)


def test_a_row_of_a_padded_batch_continues_as_it_does_alone(model, golden):
    ids, mask = left_padded(golden, "prenorm")
    both = generate(model, ids, attention_mask=mask, max_new_tokens=NEW)
    alone = generate(model, ids[1:, 5:], max_new_tokens=NEW)
    np.testing.assert_array_equal(both[1:, 5:], alone)
    np.testing.assert_array_equal(both[:, :14], ids)


def test_a_row_that_ended_is_padded_while_the_others_go_on(model, golden):
    ids, _ = left_padded(golden, "prenorm")
    free = np.asarray(generate(model, ids, max_new_tokens=NEW))
    end = int(free[0, 16])
    assert end not in free[0, 14:16] and end not in free[1, 14:]
    assert 60 not in free[:, 14:]
    found = np.asarray(generate(model, ids, max_new_tokens=NEW, eos_token_id=end))
    np.testing.assert_array_equal(found[1], free[1])
    np.testing.assert_array_equal(found[0, :17], free[0, :17])
    assert (found[0, 17:] == model.config.pad_token_id).all()
    # Any of several tokens ends a row, as lists in config.json mean.
    several = generate(model, ids, max_new_tokens=NEW, eos_token_id=(60, end))
    np.testing.assert_array_equal(several, found)
    same = jnp.tile(ids[:1], (2, 1))
    all_ended = generate(model, same, max_new_tokens=NEW, eos_token_id=end)
    np.testing.assert_array_equal(all_ended, np.tile(found[:1], (2, 1)))


def test_sampling_follows_the_softmax_at_the_temperature(model):
    rows, temperature = 4096, 4.0
    prompts = jnp.tile(PROMPT, (rows, 1))
    sampled = generate(
        model,
        prompts,
        max_new_tokens=1,
        temperature=temperature,
        key=jax.random.key(0),
    )
    ids = jnp.asarray(np.pad(PROMPT, ((0, 0), (0, 10))))
    logits = np.asarray(forward(model, ids))[0, 5].astype(np.float64)
    expected = np.exp(logits / temperature - (logits / temperature).max())
    expected *= rows / expected.sum()
    counts = np.bincount(np.asarray(sampled[:, -1]), minlength=expected.size)
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    # 60 degrees of freedom: mean 60, standard deviation 11; the key is fixed.
    assert chi_squared < 60 + 5 * 11
    assert counts.max() < rows / 2


def test_the_key_and_nothing_else_decides_a_sample(model):
    def sample(seed, temperature=3.0):
        return generate(
            model,
            PROMPT,
            max_new_tokens=10,
            temperature=temperature,
            key=jax.random.key(seed),
        )

    assert (sample(1) == sample(1)).all()
    assert (sample(1) != sample(2)).any()
    greedy = generate(model, PROMPT, max_new_tokens=10)
    np.testing.assert_array_equal(sample(1, temperature=1e-4), greedy)


@pytest.mark.parametrize(
    "dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)]
)
def test_training_mode_is_ignored_and_kept(dtype):
    model = load_opt(str(GOLDEN / "prenorm"), dtype=dtype).model
    assert model.config.dropout > 0
    before = generate(model, PROMPT, max_new_tokens=10)
    model.train()
    np.testing.assert_array_equal(generate(model, PROMPT, max_new_tokens=10), before)
    assert not model.decoder.layers[0].dropout.deterministic


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1"),
        ({"max_new_tokens": 35}, "35 and a prompt of 6 tokens exceed.* 40 positions"),
        ({"temperature": -1.0}, "`temperature` must not be negative"),
        ({"temperature": 1.0}, "`key` is needed"),
        ({"attention_mask": PROMPT * 0}, "`attention_mask` ends in padding"),
        ({"input_ids": PROMPT + 40}, r"`input_ids` must lie in \[0, 61\). Got 46 to"),
        ({"input_ids": PROMPT - 7}, r"`input_ids` must lie in \[0, 61\). Got -1 to"),
    ],
)
def test_arguments_that_cannot_work_are_refused(model, changes, message):
    arguments = {"input_ids": PROMPT, "max_new_tokens": 4} | changes
    with pytest.raises(UsageError, match=message):
        generate(model, **arguments)


def test_the_last_position_can_be_filled(model):
    full = generate(model, PROMPT, max_new_tokens=34)
    assert full.shape == (1, 40)
    part = generate(model, PROMPT, max_new_tokens=10)
    np.testing.assert_array_equal(full[:, :16], part)
