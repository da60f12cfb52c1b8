"""Second moments of inputs, and a model run block by block to collect them."""

import decoders
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kashin_jax.errors import UsageError
from kashin_jax.models.loading import load_language_model
from kashin_jax.models.opt import OPTConfig, OPTForCausalLM
from kashin_jax.pipeline import blocks, selected_kernels
from kashin_jax.pipeline.blocks import BlockRunner, find_blocks
from kashin_jax.pipeline.moments import Moments, half_moments, half_of, whole_of

TOKENS = np.random.default_rng(0).integers(3, 60, (2, 9)).astype(np.int32)


def opt(**fields):
    config = OPTConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=3, ffn_dim=24,
        num_attention_heads=2, max_position_embeddings=16, init_std=0.3, **fields,
    )  # fmt: skip
    return OPTForCausalLM(config, rngs=nnx.Rngs(1))


@pytest.mark.parametrize("inputs", [1, 2, 7, 8, 19])
def test_half_of_a_symmetric_matrix_is_the_whole(inputs):
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
    moments = Moments.none(inputs)
    for batch in batches:
        moments = moments.plus(half_moments(jnp.asarray(batch, jnp.float32)), 10)
    rows = np.concatenate(batches).reshape(-1, inputs)
    expected = rows.T @ rows / 60
    np.testing.assert_allclose(
        moments.mean() / np.outer(scales, scales),
        expected / np.outer(scales, scales),
        atol=1e-5,
    )
    assert moments.tokens == 60


def run_through(model, path):
    runner = BlockRunner(model, path)
    x = runner.first(TOKENS)
    for index, block in enumerate(runner.blocks):
        x = runner.outputs(index, block, TOKENS, x)
    return runner, x


@pytest.mark.parametrize("variant", ["opt", "llama", "gemma3_text", "gpt_neox"])
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


def test_moments_of_a_stage_are_those_of_what_its_layers_read():
    """Guards the ears: against inputs computed from the weights by hand."""
    model = opt()
    runner = BlockRunner(model, "decoder/layers")
    x = runner.first(TOKENS)
    block = runner.blocks[0]
    stages = runner.stages(0, ["self_attn/q_proj", "fc1"])
    found = runner.moments(0, block, stages, TOKENS, x)
    read = np.asarray(block.self_attn_layer_norm(x), float).reshape(-1, 16)
    half = np.asarray(found[("self_attn/q_proj",)], float)
    np.testing.assert_allclose(whole_of(half, 16), read.T @ read, rtol=1e-4, atol=1e-4)
    assert block is runner.blocks[0]
    assert type(block.fc1) is nnx.Linear


def test_blocks_of_one_structure_share_their_programs():
    """Guards hours of compilation: a program for each of 80 blocks."""
    model = opt()
    runner, _ = run_through(model, "decoder/layers")
    before = blocks._outputs._cache_size()
    x = runner.first(TOKENS)
    for index, block in enumerate(runner.blocks):
        runner.outputs(index, block, TOKENS, x)
    assert blocks._outputs._cache_size() == before


def test_a_model_without_blocks_is_refused():
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    with pytest.raises(UsageError, match=r"no nnx.List of blocks"):
        find_blocks(model, ["layers_0"])
