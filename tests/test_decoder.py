"""Every family and kind of rope against Hugging Face's torch models, and its cache."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import GOLDEN, checkpoint, make
from flax import nnx
from quantized_sources import method

from kashin_jax import QuantizedLinear, Rules, quantize_model
from kashin_jax.cli import main
from kashin_jax.io import open_checkpoint
from kashin_jax.models import (
    DecoderConfig,
    DecoderForCausalLM,
    generate,
    load_model,
    save_model,
)
from kashin_jax.pipeline import (
    dequantize_checkpoint,
    load_quantized,
    quantize_checkpoint,
)
from kashin_jax.pipeline.mixed_widths import why_it_does_not_run

FIRST = 30
RULES = Rules(config=method("rtn", bits=4, group_size=8))


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "golden.npz") as file:
        return dict(file)


@jax.jit(static_argnums=0)
def both_ways(graphdef, state, ids, mask):
    """Logits of a forward pass, and of reading the last tokens one by one."""
    model = nnx.merge(graphdef, state)
    whole = model(ids, mask)

    def step(cache, token):
        logits, cache = model.decode(token[:, None], cache)
        return cache, logits

    cache = model.init_cache(*ids.shape)
    first, cache = model.decode(ids[:, :FIRST], cache, mask[:, :FIRST])
    _, rest = jax.lax.scan(step, cache, ids[:, FIRST:].T)
    return whole, jnp.concatenate([first[None], rest])


@pytest.mark.parametrize("variant", make.VARIANTS)
def test_logits_are_those_of_hugging_face_with_a_cache_and_without(
    golden, variant, tmp_path
):
    """Padded, beyond the window, beyond the original length of scaled ropes."""
    model = load_model(checkpoint(variant, tmp_path)).model
    whole, cached = both_ways(*nnx.split(model), golden["ids"], golden["mask"])
    expected, real = golden[variant], golden["mask"].astype(bool)
    size = np.abs(expected[real]).max()
    assert np.abs(np.asarray(whole) - expected)[real].max() < 1e-4 * size
    last = np.swapaxes(cached, 0, 1)
    assert np.abs(last - expected[:, FIRST - 1 :]).max() < 1e-4 * size


def test_bfloat16_is_as_good_as_it_can_be(golden):
    """No type is promoted by accident: promotion is strict here."""
    variant = "gemma3_text"
    model = load_model(GOLDEN / variant, dtype=jnp.bfloat16).model
    whole, cached = both_ways(*nnx.split(model), golden["ids"], golden["mask"])
    assert whole.dtype == cached.dtype == jnp.float32
    assert {each["keys"].dtype for each in model.init_cache(1, 9).layers} == {
        jnp.dtype(jnp.bfloat16)
    }
    expected, real = golden[variant], golden["mask"].astype(bool)
    gap = np.abs(np.asarray(whole) - expected)[real]
    assert 1e-4 < np.sqrt(np.mean(gap**2) / np.mean(expected[real] ** 2)) < 0.05


def test_every_parameter_has_a_gradient_under_jit_and_vmap():
    """Of each text of a batch for itself."""
    graphdef, state = nnx.split(load_model(GOLDEN / "gemma3_text").model)

    def loss(state, ids):
        logits = nnx.merge(graphdef, state)(ids[None])
        return -jnp.mean(jax.nn.log_softmax(logits)[..., 3])

    ids = jnp.asarray([[3, 4, 5, 6], [7, 8, 9, 10]])
    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(state, ids)
    for path, gradient in nnx.to_flat_state(gradients):
        found = np.asarray(gradient[...])
        assert np.all(np.isfinite(found)) and np.any(found[0] != found[1]), path


def test_a_window_slides_over_a_text_that_is_read_in_parts(golden):
    """Parts within the window, as long and longer: every slot holds what it should."""
    model = load_model(GOLDEN / "mistral").model
    ids, mask = golden["ids"], golden["mask"]
    cache, end = model.init_cache(*ids.shape), 0
    assert {each["keys"].shape[1] for each in cache.layers} == {make.WINDOW}
    for size in (7, 3, make.WINDOW, 1, 14, 7):
        start, end = end, end + size
        logits, cache = decode(model, ids[:, start:end], cache, mask[:, start:end])
        expected = golden["mistral"][:, end - 1]
        assert np.abs(np.asarray(logits) - expected).max() < 1e-4 * expected.max()
    assert end == ids.shape[1]
    # As many slots as the window: nothing has slid yet, and nothing may go wrong.
    cache = model.init_cache(2, make.WINDOW)
    _, cache = decode(model, ids[:, :7], cache, mask[:, :7])
    logits, _ = decode(model, ids[:, 7:8], cache, mask[:, 7:8])
    expected = golden["mistral"][:, 7]
    assert np.abs(np.asarray(logits) - expected).max() < 1e-4 * expected.max()


@nnx.jit
def decode(model, ids, cache, mask):
    return model.decode(ids, cache, mask)


# Each is programs of its own to compile, 5 s: fused, and stored as [in, out].
_SLOW = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3_text", "qwen2")
]


@pytest.mark.parametrize("variant", ["phi3", "gpt2", *_SLOW])
def test_all_of_a_quantized_checkpoint_stays_packed_and_runs(variant, tmp_path):
    """Fused matrices, a tied head, biases, Conv1D: as quantized in memory."""
    source = GOLDEN / variant
    quantize_checkpoint(source, tmp_path / "packed", RULES, seed=3)
    loaded = load_quantized(tmp_path / "packed")
    dense = load_model(source).model
    memory, reports = quantize_model(dense, rules=RULES, key=jax.random.key(3))
    layers = 4 if variant in ("phi3", "gpt2") else 7
    assert len(reports) == 2 * layers and not any("head" in path for path in reports)
    packed = [each for _, each in nnx.iter_graph(loaded.model)
              if isinstance(each, QuantizedLinear)]  # fmt: skip
    assert len(packed) == 2 * layers
    ids = jnp.asarray([[3, 4, 5, 6]])
    found = generate(loaded.model, ids, max_new_tokens=12)
    np.testing.assert_array_equal(found, generate(memory, ids, max_new_tokens=12))
    # What other libraries read.
    dequantize_checkpoint(tmp_path / "packed", tmp_path / "plain")
    plain = load_model(tmp_path / "plain").model
    gap = np.abs(np.asarray(loaded.model(ids)) - np.asarray(plain(ids)))
    assert gap.max() < 1e-4 * np.abs(np.asarray(plain(ids))).max()


def test_what_does_not_fit_is_named_in_a_line(tmp_path, capsys):
    """A rope that is not known, sizes of another model, a text that is too long."""
    shutil.copytree(GOLDEN / "llama", tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    content = make.content_of("llama")
    for changes, words in [
        ({"rope_scaling": {"type": "mrope"}}, "`rope_type` is 'mrope'; known are"),
        ({"intermediate_size": 44}, "mlp.down_proj.weight` has shape (32, 40), but"),
        ({"attention_bias": False}, "is not part of the model that config.json descr"),
        ({"num_hidden_layers": 3}, "16 tensors are missing, the first is `model.lay"),
    ]:
        path.write_text(json.dumps(content | changes))
        assert main(["eval", str(path.parent), "--text=none.txt"]) == 1
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and words in line and str(path.parent) in line
    model = load_model(GOLDEN / "llama").model
    with pytest.raises(ValueError, match="`input_ids` has 65 tokens; between 1 and 64"):
        model(jnp.zeros((1, 65), jnp.int32))


def test_a_model_whose_rope_is_not_known_is_quantized_all_the_same(tmp_path):
    shutil.copytree(GOLDEN / "llama", tmp_path / "copy")
    content = make.content_of("llama") | {"rope_scaling": {"type": "mrope"}}
    (tmp_path / "copy" / "config.json").write_text(json.dumps(content))
    quantize_checkpoint(tmp_path / "copy", tmp_path / "packed", RULES)
    assert len(open_checkpoint(tmp_path / "packed").descriptions) == 14
    # A budget is then kept without running the model.
    why = why_it_does_not_run(open_checkpoint(tmp_path / "copy"))
    assert "`rope_type` is 'mrope'" in why


@pytest.mark.slow
def test_a_budget_follows_the_predictions_of_a_model_without_bos(tmp_path, capsys):
    """Qwen has no token that begins a text."""
    content = {"model_type": "qwen2"} | make.SIZES | {"bos_token_id": None}
    content |= {"hidden_size": 128, "intermediate_size": 128}
    config = DecoderConfig.from_dict(content, "here")
    model = DecoderForCausalLM(config, rngs=nnx.Rngs(0))
    save_model(model, config, tmp_path / "source", dtype="float32")
    where = [str(tmp_path / "source"), str(tmp_path / "q")]
    assert main(["quantize", *where, "--bits=4.7", "--set", "effort=fast"]) == 0
    out = capsys.readouterr().out
    assert "by what their errors do to predictions" in out
    assert load_quantized(tmp_path / "q").config == config
