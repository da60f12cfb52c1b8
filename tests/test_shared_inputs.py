"""Layers that read the same input: one seed and one scale, and one transform of it."""

import dataclasses
import gc
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kashin_jax import (
    RTN,
    BasisSpec,
    GreedyKashin,
    JointKashin,
    Rotated,
    Rule,
    Rules,
    matmul,
    quantize,
    quantize_model,
    quantize_params,
    stored_bits,
)
from kashin_jax.errors import NonFiniteError, UsageError
from kashin_jax.layers import DerivedBasis, PackedKernel
from kashin_jax.pipeline import SHARED_INPUTS, path_key

KEY = jax.random.key(0)
# Blocks of 32 inputs and 16 outputs: nothing else in the products below is 32 long.
CONFIG = JointKashin(
    effort="fast", basis=BasisSpec("haar", "haar"), block_shape=(32, 16)
)
# What need not be joint coding is rounded, which compiles sooner.
APART = Rules(config=CONFIG, rules=(Rule("out_proj", RTN()),))
SHARED = dataclasses.replace(APART, share=SHARED_INPUTS)
NAMES = ("q_proj", "k_proj", "v_proj")


class Attention(nnx.Module):
    """Two heads of queries to one of keys and values, but for the softmax."""

    def __init__(self, rngs):
        self.q_proj = nnx.Linear(64, 96, rngs=rngs)
        self.k_proj = nnx.Linear(64, 48, rngs=rngs)
        self.v_proj = nnx.Linear(64, 48, rngs=rngs)
        self.out_proj = nnx.Linear(96, 64, rngs=rngs)

    def __call__(self, x):
        q, k, v = self.projections(x)
        heads = q.reshape(*x.shape[:-1], 2, 48) * k[..., None, :]
        heads = jnp.tanh(heads) + v[..., None, :]
        return x + self.out_proj(heads.reshape(q.shape))

    def projections(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


@pytest.fixture(scope="module")
def dense():
    return Attention(nnx.Rngs(0))


@pytest.fixture(scope="module")
def shared(dense):
    return quantize_model(dense, key=KEY, rules=SHARED).model


@pytest.fixture(scope="module")
def apart(dense):
    return quantize_model(dense, key=KEY, rules=APART).model


def activations(shape=(2, 64)):
    drawn = np.random.default_rng(7).standard_normal(shape)
    return jnp.asarray(drawn, jnp.float32)


@nnx.jit
def call(layer, x):
    return layer(x)


def make_linears(**sizes):
    model = nnx.Module()
    for name, size in sizes.items():
        setattr(model, name, nnx.Linear(size, 48, rngs=nnx.Rngs(1)))
    return model


def tensors(model):
    return {name: getattr(model, name).kernel.get_value() for name in NAMES}


def transforms(model, x):
    """Products with a basis of 32 inputs in the compiled program of a group."""
    graphdef, state = nnx.split(model)
    program = jax.jit(lambda state, x: nnx.merge(graphdef, state).projections(x))
    text = program.lower(state, x).compile().as_text()
    return len(re.findall(r"= f32\[(?:\d+,)*32\]\S* (?:dot|custom-call)\(", text))


def test_the_input_is_transformed_once_for_all_of_a_group(shared, apart):
    x = activations()
    # By the rotation of the blocks, and by Q1.
    assert transforms(apart, x) == 3 * 2
    assert transforms(shared, x) == 2


def test_the_seed_and_the_scale_of_inputs_are_those_of_the_group(shared, apart):
    one, *others = tensors(shared).values()
    for other in others:
        np.testing.assert_array_equal(other.seed, one.seed)
        np.testing.assert_array_equal(other.in_scale, one.in_scale)
    assert len({tensor.seed.tobytes() for tensor in tensors(apart).values()}) == 3
    assert shared.q_proj.inputs is shared.k_proj.inputs is shared.v_proj.inputs
    assert shared.k_proj.outputs is not shared.v_proj.outputs
    assert apart.q_proj.inputs is not apart.k_proj.inputs


def test_outputs_are_those_of_the_same_matrices_alone(shared):
    x = activations((3, 5, 64))
    for name, tensor in tensors(shared).items():
        np.testing.assert_allclose(
            call(getattr(shared, name), x), matmul(x, tensor), rtol=1e-6, atol=1e-6
        )


def test_sharing_stores_as_much_and_keeps_less(shared, apart):
    def held(model, kind):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, kind)))

    assert held(shared, PackedKernel) == held(apart, PackedKernel)
    assert [stored_bits(tensor) for tensor in tensors(shared).values()] == [
        stored_bits(tensor) for tensor in tensors(apart).values()
    ]
    assert held(shared, DerivedBasis) < held(apart, DerivedBasis)


def test_without_share_codes_are_those_of_the_path_alone(dense, apart):
    for name, tensor in tensors(apart).items():
        kernel = getattr(dense, name).kernel.get_value()
        chex.assert_trees_all_equal(
            tensor, quantize(kernel, CONFIG, path_key(KEY, name))[0]
        )


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(CONFIG, balance=0.0, rotation=False),
        GreedyKashin(
            bits=1, num_restarts=1, block_shape=(32, 16), max_steps=5, sample=256
        ),
    ],
)
def test_methods_without_a_scale_of_inputs_share_the_rest(config):
    model = make_linears(k_proj=64, v_proj=64)
    rules = Rules(config=config, share=SHARED_INPUTS)
    found = quantize_model(model, key=KEY, rules=rules).model
    assert found.k_proj.inputs is found.v_proj.inputs
    assert found.k_proj.inputs.get_value().scale is None
    x, tensor = activations(), found.v_proj.kernel.get_value()
    np.testing.assert_allclose(
        call(found.v_proj, x), matmul(x, tensor), rtol=1e-6, atol=1e-6
    )


def test_only_layers_of_one_method_and_number_of_inputs_share():
    model = make_linears(q_proj=64, k_proj=64, v_proj=64, gate_proj=64, up_proj=32)
    apart = Rules(
        config=Rotated(RTN(group_size=64)),
        rules=[Rule("v_proj", Rotated(RTN(bits=3, group_size=64)))],
    )
    shared = dataclasses.replace(apart, share=SHARED_INPUTS)
    found, alone = (
        quantize_model(model, key=KEY, rules=rules).model for rules in (shared, apart)
    )
    seeds = [layer.kernel.get_value().seed for layer in (found.q_proj, found.k_proj)]
    np.testing.assert_array_equal(*seeds)
    for name in ("v_proj", "gate_proj", "up_proj"):
        # What nobody shares with is as it was.
        chex.assert_trees_all_equal(
            getattr(found, name).kernel.get_value(),
            getattr(alone, name).kernel.get_value(),
        )


def test_split_merge_jit_and_clone_keep_what_is_shared(shared):
    x = activations()
    expected = call(shared, x)
    for model in (nnx.merge(*nnx.split(shared)), nnx.clone(shared)):
        assert model.q_proj.inputs is model.k_proj.inputs
        np.testing.assert_array_equal(call(model, x), expected)
    np.testing.assert_allclose(shared(x), expected, rtol=1e-5, atol=1e-5)
    assert shared.q_proj.inputs is shared.v_proj.inputs


def test_gradients_pass_through_shared_layers(shared):
    x = activations()

    def loss(x):
        return jnp.sum(jnp.sin(shared.q_proj(x)))

    def alone(x):
        return jnp.sum(jnp.sin(matmul(x, tensors(shared)["q_proj"])))

    found, expected = (jax.jit(jax.grad(each))(x) for each in (loss, alone))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert set(nnx.jit(nnx.grad(lambda model: jnp.sum(model(x))))(shared)) == {
        *NAMES, "out_proj",
    }  # fmt: skip


def test_stacked_blocks_run_under_scan(dense):
    blocks = [
        quantize_model(dense, key=jax.random.key(i), rules=SHARED).model
        for i in range(2)
    ]
    graphdef, _ = nnx.split(blocks[0])
    states = [nnx.split(block)[1] for block in blocks]
    stacked = nnx.merge(
        graphdef, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    )

    @nnx.jit
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(block, x):
        return block(x)

    x = activations()
    expected = call(blocks[1], call(blocks[0], x))
    np.testing.assert_allclose(run(stacked, x), expected, rtol=1e-5, atol=1e-5)


def test_parameters_of_a_tree_have_the_codes_of_the_model(dense, shared):
    params = {
        name: {"kernel": getattr(dense, name).kernel.get_value()}
        for name in (*NAMES, "out_proj")
    }
    found = quantize_params(params, key=KEY, rules=SHARED).params
    for name, tensor in tensors(shared).items():
        chex.assert_trees_all_equal(found[name]["kernel"], tensor)


def test_in_place_no_more_than_the_packed_layers_are_added(dense):
    def live_bytes():
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    model = make_linears(q_proj=1024, k_proj=1024, v_proj=1024)
    start, before = live_bytes(), 3 * 4 * 1024 * 48
    rules = Rules(config=CONFIG, share=SHARED_INPUTS)
    found = quantize_model(model, key=KEY, rules=rules, in_place=True)
    state = nnx.state(model, nnx.Any(PackedKernel, DerivedBasis))
    packed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    # Reports and the key are a few bytes.
    assert live_bytes() - start <= packed - before + 4096
    assert found.model is model


def test_a_damaged_member_is_named_before_any_is_packed(dense):
    model = nnx.clone(dense)
    good = model.v_proj.kernel.get_value()
    model.v_proj.kernel.set_value(good.at[0, 0].set(jnp.nan))
    with pytest.raises(NonFiniteError, match="`v_proj` holds 1 NaN"):
        quantize_model(model, key=KEY, rules=SHARED, in_place=True)
    assert type(model.q_proj) is nnx.Linear
    model.v_proj.kernel.set_value(good)
    quantize_model(model, key=KEY, rules=SHARED, in_place=True)
    assert model.q_proj.inputs is model.v_proj.inputs


@pytest.mark.parametrize(
    ("share", "named"),
    [
        (("r_proj$",), r"'r_proj\$' matches none of 4 layers"),
        (("q_proj$",), r"'q_proj\$' makes no two of 4 layers share an input"),
        (("[qk]_proj$", "q_proj$"), r"'q_proj\$' makes no two"),
        (SHARED_INPUTS[3:], r"'.*gate.*' makes no two of 4 layers"),
    ],
)
def test_a_pattern_by_which_nothing_is_shared_is_an_error(dense, share, named):
    with pytest.raises(UsageError, match=named):
        quantize_model(dense, rules=Rules(config=CONFIG, share=share))


def test_a_model_with_shared_inputs_can_be_donated():
    """The common scale was one buffer in two variables, and donated twice."""
    model = make_linears(q_proj=64, k_proj=64)
    rules = Rules(config=JointKashin(effort="fast"), share=SHARED_INPUTS)
    packed = quantize_model(model, rules=rules).model
    graphdef, state = nnx.split(packed)
    leaves = jax.tree.leaves(state)
    places = [leaf.unsafe_buffer_pointer() for leaf in leaves if leaf.size]
    assert len(places) == len(set(places))
