"""`quantize_model` on models that know nothing of it, and what the stages cost."""

import math
from collections import Counter
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compiled_programs
from flax import nnx

from kashin_jax import (
    RTN,
    BasisSpec,
    GreedyKashin,
    QuantizedLinear,
    dequantize,
    make_pair,
    quantize,
    quantize_model,
)
from kashin_jax.codebooks.plane import _best_start, assign_pairs, lloyd_pairs
from kashin_jax.errors import NonFiniteError
from kashin_jax.methods import encode
from kashin_jax.methods.kashin import _decompose_blocks
from kashin_jax.methods.quantize import _relative_squared_error
from kashin_jax.models import OPTConfig, OPTForCausalLM
from kashin_jax.pipeline import path_key, replace_kernels, selected_kernels
from kashin_jax.tensors import Bases, Prepared
from kashin_jax.tensors.kashin import KashinLayout, pack_rows

FAST = {"num_restarts": 1, "sample": 256, "codebook_steps": 10, "polish_steps": 2}
CONFIG = GreedyKashin(bits=1, **FAST)
KEY = jax.random.key(0)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 8, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(self.norm(x))))


class Network(nnx.Module):
    """Embedding, convolution, nested blocks and one linear that occurs twice."""

    def __init__(self, rngs, depth=2):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.conv = nnx.Conv(8, 8, kernel_size=(3,), rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(depth)])
        self.first = nnx.Linear(8, 8, rngs=rngs)
        self.again = nnx.Sequential(self.first, nnx.relu, self.first)

    def __call__(self, tokens):
        x = self.conv(self.embed(tokens))
        for block in self.blocks:
            x = block(x)
        return self.again(self.first(x))


TOKENS = jnp.arange(10).reshape(2, 5)
PATHS = {"again/layers/0", "blocks/0/down", "blocks/0/up", "blocks/1/down"}
PATHS |= {"blocks/1/up"}


@pytest.fixture(scope="module")
def original():
    return Network(nnx.Rngs(0))


@pytest.fixture
def network(original):
    """Of its own: tests change it."""
    return nnx.clone(original)


def parameters(model):
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, path)): variable[...] for path, variable in flat}


def codes(result, path):
    node = result.model
    for part in path.split("/"):
        node = node[int(part)] if part.isdigit() else getattr(node, part)
    return np.asarray(node.kernel.get_value().packed_codes)


def dense_twin(model, result):
    """The model with the kernels that the packed layers stand for."""
    kernels = {
        "/".join(map(str, path)): dequantize(node.kernel.get_value())
        for path, node in nnx.iter_graph(result.model)
        if isinstance(node, QuantizedLinear)
    }
    assert kernels.keys() == result.reports.keys()
    return replace_kernels(model, kernels)


@nnx.jit
def run(model, inputs):
    return model(inputs)


def assert_close(found, expected, tolerance):
    error = np.linalg.norm(np.asarray(found, np.float64) - np.asarray(expected))
    assert error <= tolerance * np.linalg.norm(expected)


def test_a_sequential_model_is_quantized():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(8, 16, rngs=rngs), nnx.relu, nnx.Linear(16, 8, rngs=rngs)
    )
    result = quantize_model(model, CONFIG, KEY)
    assert list(result.reports) == ["layers/0", "layers/2"]
    assert [type(layer) for layer in result.model.layers][::2] == [QuantizedLinear] * 2
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8)), jnp.float32)
    assert_close(run(result.model, x), run(dense_twin(model, result), x), 1e-5)


def test_a_linear_alone_is_a_model_too():
    result = quantize_model(nnx.Linear(8, 16, rngs=nnx.Rngs(0)), RTN(), KEY)
    assert isinstance(result.model, QuantizedLinear)


def test_packed_model_equals_dense_model_on_dequantized_kernels(network):
    result = quantize_model(network, CONFIG, KEY)
    assert result.reports.keys() == PATHS
    dense = dense_twin(network, result)
    assert_close(run(result.model, TOKENS), run(dense, TOKENS), 1e-5)


def test_everything_but_the_linears_is_left_and_shared(network):
    result = quantize_model(network, CONFIG, KEY)
    model = result.model
    assert type(model.conv) is nnx.Conv and type(model.embed) is nnx.Embed
    assert type(model.blocks[0].norm) is nnx.LayerNorm
    before, after = parameters(network), parameters(model)
    assert set(before) - set(after) == {f"{path}/kernel" for path in PATHS}
    for path, value in after.items():
        pointer = value.unsafe_buffer_pointer()
        assert pointer == before[path].unsafe_buffer_pointer(), path
    assert model.conv.kernel is network.conv.kernel


def test_the_original_model_is_unchanged(network):
    before = jax.tree.map(np.array, nnx.state(network))
    expected = run(network, TOKENS)
    quantize_model(network, CONFIG, KEY)
    linears = [node for _, node in nnx.iter_graph(network) if type(node) is nnx.Linear]
    assert len(linears) == len(PATHS)
    after = jax.tree.leaves(nnx.state(network))
    chex.assert_trees_all_equal(jax.tree.leaves(before), after)
    np.testing.assert_array_equal(run(network, TOKENS), expected)


def test_a_shared_linear_is_quantized_once_and_stays_shared(network):
    seen = []

    def layer(path, kernel):
        seen.append(path)
        return quantize(kernel, CONFIG, path_key(KEY, path), path=path)

    result = quantize_model(network, CONFIG, KEY, quantize_layer=layer)
    assert sorted(seen) == sorted(PATHS)
    first = result.model.first
    assert isinstance(first, QuantizedLinear)
    assert result.model.again.layers[0] is first
    assert result.model.again.layers[2] is first


def test_select_chooses_by_path(network):
    result = quantize_model(network, CONFIG, KEY, select=lambda path: "up" in path)
    assert list(result.reports) == ["blocks/0/up", "blocks/1/up"]
    assert type(result.model.blocks[0].down) is nnx.Linear
    assert isinstance(result.model.blocks[0].up, QuantizedLinear)


def test_the_output_head_is_left_out_even_where_select_takes_it(network):
    network.lm_head = nnx.Linear(8, 11, rngs=nnx.Rngs(3))
    assert "lm_head" not in selected_kernels(network)
    assert "lm_head" not in selected_kernels(network, lambda path: True)


def test_selecting_nothing_is_an_error(network):
    with pytest.raises(ValueError, match="Of 5 layers `select` takes none"):
        quantize_model(network, CONFIG, KEY, select=lambda path: False)


def test_a_stacked_kernel_is_no_matrix_to_select(network):
    make = nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs))
    network.stack = make(nnx.Rngs(0).split(3))
    with pytest.raises(ValueError, match=r"`stack/kernel` has shape \(3, 8, 8\)"):
        selected_kernels(network)
    chosen = selected_kernels(network, lambda path: path != "stack")
    assert chosen.keys() == PATHS


def test_a_kernel_with_nan_is_an_error_that_names_it(network):
    kernel = network.blocks[1].up.kernel
    kernel.set_value(kernel.get_value().at[2, 3].set(jnp.nan))
    with pytest.raises(NonFiniteError, match="`blocks/1/up` holds 1 NaN"):
        quantize_model(network, CONFIG, KEY)


def test_adding_a_layer_leaves_other_codes_unchanged(network):
    before = quantize_model(network, CONFIG, KEY)
    network.aardvark = nnx.Linear(8, 16, rngs=nnx.Rngs(9))
    after = quantize_model(network, CONFIG, KEY)
    assert after.reports.keys() - before.reports.keys() == {"aardvark"}
    for path in PATHS:
        np.testing.assert_array_equal(codes(after, path), codes(before, path))
    keys = [jax.random.key_data(path_key(KEY, path)) for path in PATHS]
    assert len({key.tobytes() for key in map(np.asarray, keys)}) == len(PATHS)


def test_layer_ten_comes_after_layer_nine():
    network = Network(nnx.Rngs(0), depth=12)
    ups = [path for path in selected_kernels(network) if path.endswith("up")]
    assert ups == [f"blocks/{i}/up" for i in range(12)]


def test_replacing_an_unknown_kernel_is_an_error_that_names_it(network):
    kernel = jnp.ones((8, 16))
    with pytest.raises(ValueError, match="`blocks/7/up` is no layer with a kernel"):
        replace_kernels(network, {"blocks/7/up": kernel})
    with pytest.raises(ValueError, match=r"`blocks/0/up/kernel` has shape \(8, 16\)"):
        replace_kernels(network, {"blocks/0/up": kernel.T})


@pytest.mark.slow
@pytest.mark.parametrize("basis", ["hadamard", "haar", "dct"])
def test_an_opt_computes_alike_through_packed_and_dense_layers(basis):
    config = OPTConfig(
        vocab_size=32,
        hidden_size=8,
        num_hidden_layers=2,
        ffn_dim=16,
        num_attention_heads=2,
        max_position_embeddings=12,
    )
    model = OPTForCausalLM(config, rngs=nnx.Rngs(0))
    model.eval()
    method = GreedyKashin(bits=1, basis=BasisSpec.parse(basis), **FAST)
    result = quantize_model(model, method, KEY)
    assert len(result.reports) == 12
    tokens = jnp.arange(20).reshape(2, 10)
    dense = dense_twin(model, result)
    assert_close(run(result.model, tokens), run(dense, tokens), 1e-4)


STAGES = {
    "_decompose_blocks",
    "_best_start",
    "lloyd_pairs",
    "assign_pairs",
    "pack_rows",
    "_relative_squared_error",
}


@pytest.mark.slow
def test_each_stage_compiles_once_per_distinct_shape(caplog):
    shapes = [(12, 20), (20, 28)] * 3
    config = GreedyKashin(bits=1, **FAST)

    def run():
        for seed, shape in enumerate(shapes):
            key = jax.random.key(seed)
            quantize(np.random.default_rng(seed).normal(size=shape), config, key)

    compiled = compiled_programs(caplog, run)
    counts = {
        name: count for name, count in Counter(compiled).items() if name in STAGES
    }
    assert counts.keys() == STAGES
    assert max(counts.values()) <= 2


def test_all_widths_share_the_compiled_decomposition(caplog):
    weight = np.random.default_rng(0).normal(size=(20, 36))

    def run():
        for bits in (1, 2):
            quantize(weight, GreedyKashin(bits=bits, **FAST), KEY)

    compiled = compiled_programs(caplog, run)
    assert compiled.count("_decompose_blocks") == 1


def stage_memory(shape):
    """Bytes of every compiled stage of the default quantizer, by name."""
    config = GreedyKashin()
    m, n = shape
    spec = jax.ShapeDtypeStruct
    matrix, flat = spec(shape, jnp.float32), spec((m * n,), jnp.float32)
    pairs = spec((2**config.bits, 2), jnp.float32)
    basis = jax.eval_shape(lambda key: make_pair(config.basis, key, shape), KEY)
    keys = jax.eval_shape(partial(jax.random.split, num=config.num_restarts), KEY)
    drawn = spec((config.sample, 2), jnp.float32)
    layout = KashinLayout(
        shape=shape,
        block_shape=shape,
        bits=config.bits,
        basis=config.basis,
        dtype="float32",
    )
    tensor, _ = jax.eval_shape(lambda w: encode(w, KEY, config), matrix)
    rtol, steps = config.codebook_rtol, config.codebook_steps
    lowered = {
        "_decompose_blocks": _decompose_blocks.lower(matrix, basis, 1e-6, 200, shape),
        "_best_start": _best_start.lower(keys, drawn, 2**config.bits, rtol, steps),
        "lloyd_pairs": lloyd_pairs.lower(
            flat, flat, pairs, rtol=rtol, max_steps=config.polish_steps
        ),
        "assign_pairs": assign_pairs.lower(flat, flat, pairs),
        "pack_rows": pack_rows.lower(spec(shape, jnp.uint8), layout),
        "_relative_squared_error": _relative_squared_error.lower(
            matrix, Prepared(tensor, Bases(basis))
        ),
    }
    used = {}
    for name, stage in lowered.items():
        memory = stage.compile().memory_analysis()
        used[name] = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
        )
    return used


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(768, 768), (384, 1536)])
def test_no_stage_needs_more_than_eight_times_the_matrix(shape):
    used = stage_memory(shape)
    assert used.keys() == STAGES
    size = 4 * math.prod(shape)
    shares = {name: count / size for name, count in used.items()}
    assert 1 < max(shares.values()) <= 8, shares
