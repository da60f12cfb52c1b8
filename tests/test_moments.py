"""Second moments of inputs, and a model run block by block to collect them."""

import decoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kashin_jax.errors import NonFiniteError, UsageError
from kashin_jax.models.loading import load_language_model
from kashin_jax.models.opt import OPTConfig, OPTForCausalLM
from kashin_jax.pipeline import moments, passes, selected_kernels
from kashin_jax.pipeline.blocks import BlockRunner, find_blocks
from kashin_jax.pipeline.moments import Moments, half_moments, half_of, whole_of
from kashin_jax.pipeline.output_moments import OutputMoments
from kashin_jax.pipeline.paths import at_path, put_at_path
from kashin_jax.pipeline.token_weights import gradient_weights

TOKENS = np.random.default_rng(0).integers(3, 60, (2, 9)).astype(np.int32)


def opt(**fields):
    config = OPTConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=3, ffn_dim=24,
        num_attention_heads=2, max_position_embeddings=16, init_std=0.3, **fields,
    )  # fmt: skip
    return OPTForCausalLM(config, rngs=nnx.Rngs(1))


@pytest.mark.parametrize("inputs", [1, 2, 7, 8, 19])
def test_half_of_a_symmetric_matrix_is_the_whole(inputs, monkeypatch):
    # Several tiles, the last one cut off, as of matrices of thousands of rows.
    monkeypatch.setattr(moments, "_TILE", 5)
    x = np.random.default_rng(inputs).standard_normal((inputs, inputs))
    whole = (x + x.T).astype(np.float32)
    half = half_of(jnp.asarray(np.triu(whole)))
    assert half.size <= (inputs + 1) * (inputs + 2) / 2
    np.testing.assert_array_equal(whole_of(np.asarray(half, float), inputs), whole)


@pytest.mark.parametrize("inputs", [7, 16])
def test_moments_are_those_of_numpy(inputs):
    """Guards sums over batches: of the size of one they would lose small inputs."""
    rng = np.random.default_rng(0)
    scales = np.logspace(-3, 3, inputs)
    batches = [(rng.standard_normal((2, 5, inputs)) * scales) for _ in range(6)]
    heard = Moments.none(inputs)
    for batch in batches:
        heard = heard.plus(half_moments(jnp.asarray(batch, jnp.float32)), 10)
    rows = np.concatenate(batches).reshape(-1, inputs)
    expected = rows.T @ rows / 60
    np.testing.assert_allclose(
        heard.mean().whole() / np.outer(scales, scales),
        expected / np.outer(scales, scales),
        atol=1e-5,
    )
    assert heard.tokens == 60


def run_through(model, path):
    runner = BlockRunner(model, path)
    x = runner.first(TOKENS)
    for index, block in enumerate(runner.blocks):
        x = runner.outputs(index, block, TOKENS, x)
    return runner, x


@pytest.mark.parametrize(
    "variant",
    ["opt", "llama"]
    + [pytest.param(v, marks=pytest.mark.slow) for v in ("gpt_neox", "gemma3_text")],
)
def test_blocks_one_by_one_are_the_model(variant, tmp_path):
    """Guards what blocks are called with: masks and angles that differ by block."""
    if variant == "opt":
        model, tail = opt(), lambda m, x: m._logits(m.decoder.final_layer_norm(x))
    else:
        model = load_language_model(decoders.checkpoint(variant, tmp_path)).model
        tail = lambda m, x: m._logits(m.norm(x))
    path = find_blocks(model, selected_kernels(model))
    _, x = run_through(model, path)
    expected = model(jnp.asarray(TOKENS))
    np.testing.assert_allclose(tail(model, x), expected, rtol=1e-4, atol=1e-4)


def test_layers_with_one_input_are_one_stage():
    model = opt()
    path = find_blocks(model, selected_kernels(model))
    runner = BlockRunner(model, path)
    own = ["fc2", "fc1", *(f"self_attn/{n}_proj" for n in ("v", "out", "q", "k"))]
    first, *rest = runner.stages(1, own)
    assert sorted(first) == ["self_attn/k_proj", "self_attn/q_proj", "self_attn/v_proj"]
    assert rest == [("self_attn/out_proj",), ("fc1",), ("fc2",)]


def moments_of(runner, block, stages, x, weights=None):
    found = runner.moments_call(0, block, stages)(TOKENS, x, weights, None)
    return dict(zip(stages, found, strict=True))


def test_moments_of_a_stage_are_those_of_what_its_layers_read():
    """Guards the ears: against inputs computed from the weights by hand."""
    model = opt()
    runner = BlockRunner(model, "decoder/layers")
    x = runner.first(TOKENS)
    block = runner.blocks[0]
    stages = runner.stages(0, ["self_attn/q_proj", "fc1"])
    found = moments_of(runner, block, stages, x)
    read = np.asarray(block.self_attn_layer_norm(x), float).reshape(-1, 16)
    half = np.asarray(found[("self_attn/q_proj",)], float)
    np.testing.assert_allclose(whole_of(half, 16), read.T @ read, rtol=1e-4, atol=1e-4)
    assert block is runner.blocks[0]
    assert type(block.fc1) is nnx.Linear


def gradients_of_outputs(model, paths, tokens, key):
    """Of the loss against drawn tokens, through the whole model, by `jax.grad`."""
    graphdef, state = nnx.split(model)

    def loss(extra):
        whole = nnx.merge(graphdef, state)
        for path in paths:
            layer = at_path(whole, path)
            shifted = nnx.Sequential(layer, lambda y, path=path: y + extra[path])
            put_at_path(whole, path, shifted)
        scores = jax.nn.log_softmax(whole(tokens)[:, :-1])
        drawn = jax.random.categorical(key, jax.lax.stop_gradient(scores))
        return -jnp.take_along_axis(scores, drawn[..., None], -1).sum()

    sizes = {path: at_path(model, path).kernel.get_value().shape[1] for path in paths}
    zeros = {path: jnp.zeros((*tokens.shape, size)) for path, size in sizes.items()}
    return jax.grad(loss)(zeros)


@pytest.mark.parametrize("variant", ["opt", "llama"])
def test_weights_are_squared_gradients_of_the_whole_model(variant, tmp_path):
    """Guards gradients that are taken block by block, and from batch to batch."""
    if variant == "opt":
        model = opt()
    else:
        model = load_language_model(decoders.checkpoint(variant, tmp_path)).model
    key = jax.random.key(3)
    path = find_blocks(model, selected_kernels(model))
    runner = BlockRunner(model, path)
    wanted: list = [[] for _ in runner.blocks]
    for layer in selected_kernels(model):
        if layer.startswith(f"{path}/"):
            index, _, own = layer.removeprefix(f"{path}/").partition("/")
            wanted[int(index)].append(own)
    batches = [TOKENS, TOKENS[::-1] + 1]
    found = gradient_weights(runner, wanted, batches, key)
    paths = [f"{path}/{i}/{own}" for i, layers in enumerate(wanted) for own in layers]
    of_window = jax.jit(lambda t, k: gradients_of_outputs(model, paths, t, k))
    gradients = [
        of_window(window[None], jax.random.fold_in(key, k))
        for k, window in enumerate(np.concatenate(batches))
    ]
    for i, layers in enumerate(found):
        assert sorted(layers) == sorted(wanted[i])
        for own, weights in layers.items():
            squares = np.concatenate(
                [np.square(each[f"{path}/{i}/{own}"]).mean(-1) for each in gradients]
            )
            weights = np.concatenate(weights)
            expected = squares / squares.mean()
            np.testing.assert_allclose(weights, expected, rtol=1e-2, atol=1e-4)
            assert weights.max() > 1.5 and weights.min() < 0.5
    outputs = OutputMoments(runner, wanted, batches, key)
    for layer in paths:
        index, _, own = layer.removeprefix(f"{path}/").partition("/")
        g = np.concatenate([np.asarray(each[layer], float)[0] for each in gradients])
        expected = g.T @ g / np.square(g).sum(0).mean()
        found_moments = outputs.of(int(index), own, g.shape[1])
        np.testing.assert_allclose(found_moments, expected, rtol=1e-2, atol=1e-2)


def test_weights_enter_moments_as_they_should():
    """Guards weights of one layer that reads what others read with other weights."""
    model = opt()
    runner = BlockRunner(model, "decoder/layers")
    x = runner.first(TOKENS)
    stages = [("self_attn/q_proj",), ("self_attn/v_proj",)]
    one = np.random.default_rng(0).uniform(size=TOKENS.shape).astype(np.float32)
    weights = [one, np.ones_like(one)]
    found = moments_of(runner, runner.blocks[0], stages, x, weights)
    plain = moments_of(runner, runner.blocks[0], stages, x)
    same = (np.asarray(each[stages[1]]) for each in (found, plain))
    np.testing.assert_allclose(*same, rtol=1e-5, atol=1e-5)
    read = np.asarray(runner.blocks[0].self_attn_layer_norm(x), float)
    expected = np.einsum("bt,btm,btn->mn", one, read, read)
    half = np.asarray(found[stages[0]], float)
    np.testing.assert_allclose(whole_of(half, 16), expected, rtol=1e-4, atol=1e-4)


def test_a_loss_that_does_not_depend_on_a_layer_weighs_all_tokens_alike():
    """Guards a division by zero; and NaN, which must not look like it."""
    model = opt()
    layer = model.decoder.layers[2]
    layer.fc2.kernel.set_value(jnp.zeros_like(layer.fc2.kernel.get_value()))
    runner = BlockRunner(model, "decoder/layers")
    wanted = [[], [], ["fc1", "fc2"]]
    found = gradient_weights(runner, wanted, [TOKENS], jax.random.key(0))[2]
    np.testing.assert_array_equal(found["fc1"][0], np.ones(TOKENS.shape))
    outputs = OutputMoments(runner, wanted, [TOKENS], jax.random.key(0))
    np.testing.assert_array_equal(outputs.of(2, "fc1", 24), np.eye(24))
    assert np.std(found["fc2"][0]) > 0
    layer.fc2.kernel.set_value(jnp.full_like(layer.fc2.kernel.get_value(), jnp.nan))
    runner = BlockRunner(model, "decoder/layers")
    with pytest.raises(NonFiniteError, match=r"decoder/layers/2/fc. *`: the gradient"):
        gradient_weights(runner, wanted, [TOKENS], jax.random.key(0))
    outputs = OutputMoments(runner, wanted, [TOKENS], jax.random.key(0))
    with pytest.raises(NonFiniteError, match=r"decoder/layers/2/fc1`: the gradient"):
        outputs.of(2, "fc1", 24)


def test_moments_of_what_is_missing_are_beside_those_of_what_is_read():
    """Guards the order of the two, and which block either comes from."""
    model = opt()
    runner = BlockRunner(model, "decoder/layers")
    full = runner.first(TOKENS)
    block = nnx.clone(runner.blocks[0])
    norm = block.self_attn_layer_norm
    norm.scale.set_value(norm.scale.get_value() * 1.1)
    x, stage = full + 0.1, ("self_attn/q_proj",)
    call = runner.moments_call(0, block, [stage], runner.blocks[0])
    (half,) = call(TOKENS, x, None, full)
    read = np.asarray(norm(x), float).reshape(-1, 16)
    wanted = np.asarray(runner.blocks[0].self_attn_layer_norm(full), float)
    both = np.concatenate([read, wanted.reshape(-1, 16) - read], axis=1)
    half = np.asarray(half, float)
    np.testing.assert_allclose(whole_of(half, 32), both.T @ both, rtol=1e-3, atol=1e-3)


def test_blocks_of_one_structure_share_their_programs():
    """Guards hours of compilation: a program for each of 80 blocks."""
    model = opt()
    runner, _ = run_through(model, "decoder/layers")
    before = passes.block_outputs._cache_size()
    x = runner.first(TOKENS)
    for index, block in enumerate(runner.blocks):
        runner.outputs(index, block, TOKENS, x)
    assert passes.block_outputs._cache_size() == before


def test_a_second_model_of_the_same_shapes_compiles_nothing():
    """Guards tables and resumed runs: 28 seconds a row, and memory that is kept."""
    programs = (passes.first_states, passes.block_outputs)
    run_through(opt(), "decoder/layers")
    before = [each._cache_size() for each in programs]
    run_through(opt(), "decoder/layers")
    assert [each._cache_size() for each in programs] == before


class Between(nnx.Module):
    """Two blocks, and what a model may do between them."""

    def __init__(self, kind):
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(2)])
        self.kind = kind

    def __call__(self, tokens):
        x = jnp.ones((*tokens.shape, 4))
        blocks = self.blocks if self.kind != "reversed" else reversed(self.blocks)
        for block in blocks:
            x = x + block(x) if self.kind == "residual" else block(x)
            if self.kind == "early":
                break
        return x


@pytest.mark.parametrize("kind", ["plain", "residual", "reversed", "early"])
def test_a_model_that_does_more_between_blocks_is_refused(kind):
    """Guards moments of another network, which nothing else would tell."""
    if kind == "plain":
        BlockRunner(Between(kind), "blocks")
        return
    with pytest.raises(UsageError, match="blocks: blocks run one by one"):
        BlockRunner(Between(kind), "blocks")


def test_what_blocks_are_called_with_may_depend_on_the_length():
    """Guards masks of windows, which two tokens do not tell from those of all."""

    class Windowed(Between):
        def __call__(self, tokens):
            t, x = tokens.shape[1], jnp.ones((*tokens.shape, 4))
            full = jnp.ones((t, t))
            for block, mask in zip(
                self.blocks, (full, full if t <= 4 else full * 2), strict=True
            ):
                x = block(x, mask)
            return x

    class Masked(nnx.Module):
        def __call__(self, x, mask):
            return x

    model = Windowed("plain")
    model.blocks = nnx.List([Masked(), Masked()])
    kinds = [
        [runner.program(i, None).kind for i in range(2)]
        for runner in (
            BlockRunner(model, "blocks"),
            BlockRunner(model, "blocks", np.zeros((3, 9), np.int32)),
        )
    ]
    assert kinds == [[0, 0], [0, 1]]


def test_a_model_without_blocks_is_refused():
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    with pytest.raises(UsageError, match=r"no nnx.List of blocks"):
        find_blocks(model, ["layers_0"])
