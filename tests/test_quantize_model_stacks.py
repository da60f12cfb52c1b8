"""Models whose layers are stacked, as `nnx.vmap` makes and `nnx.scan` runs them."""

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
    QuantizedLinear,
    Rotated,
    Rule,
    Rules,
    quantize,
    quantize_model,
    stored_bits,
)
from kashin_jax.errors import NonFiniteError, UsageError
from kashin_jax.pipeline import (
    SHARED_INPUTS,
    path_key,
    plan_model,
    report_table,
    selected_kernels,
)

KEY = jax.random.key(0)
DEPTH, WIDTH = 3, 32
JOINT = JointKashin(effort="fast", basis=BasisSpec("haar", "haar"))
KASHIN = GreedyKashin(bits=1, num_restarts=1, max_steps=5, sample=256)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.q_proj = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.k_proj = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.q_proj(x)) * self.k_proj(x)


class Network(nnx.Module):
    def __init__(self, rngs):
        make = nnx.vmap(Block, in_axes=0, out_axes=0)
        self.blocks = make(rngs.split(DEPTH))

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def through(block, x):
            return block(x)

        return through(self.blocks, x)


@pytest.fixture(scope="module")
def original():
    return Network(nnx.Rngs(0))


@pytest.fixture
def network(original):
    """Of its own: tests change it."""
    return nnx.clone(original)


def activations():
    drawn = np.random.default_rng(7).standard_normal((4, WIDTH))
    return jnp.asarray(drawn, jnp.float32)


@nnx.jit
def run(model, x):
    return model(x)


def alone(network, config, index):
    """A block with one matrix of each stack, quantized as the stack should be."""
    block = Block(nnx.Rngs(1))
    for name in ("q_proj", "k_proj"):
        kernel = getattr(network.blocks, name).kernel.get_value()[index]
        key = jax.random.fold_in(path_key(KEY, f"blocks/{name}"), index)
        bias = getattr(network.blocks, name).bias.get_value()[index]
        setattr(
            block,
            name,
            QuantizedLinear(quantize(kernel, config, key)[0], nnx.Param(bias)),
        )
    return block


@pytest.mark.parametrize("config", [JOINT, KASHIN, RTN(), Rotated(RTN(group_size=64))])
def test_a_stack_gives_what_its_matrices_give_alone(network, config):
    x = activations()
    blocks = [alone(network, config, i) for i in range(DEPTH)]
    result = quantize_model(network, config, KEY)
    found = result.model.blocks.q_proj.kernel.get_value()
    for i, block in enumerate(blocks):
        expected = block.q_proj.kernel.get_value()
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a[i], b)
    expected = x
    for block in blocks:
        expected = run(block, expected)
    np.testing.assert_allclose(run(result.model, x), expected, rtol=1e-4, atol=1e-5)


def test_plan_and_report_count_all_matrices_of_a_stack(network):
    planned, _ = plan_model(network, RTN(bits=4)).layers
    result = quantize_model(network, RTN(bits=4), KEY)
    report = result.reports["blocks/k_proj"]
    assert report.shape == (DEPTH, WIDTH, WIDTH) == planned.choice.candidate.shape
    assert report.stored_bits == planned.stored_bits
    layer = result.model.blocks.k_proj
    assert report.stored_bits == stored_bits(layer.kernel.get_value())
    assert report.bits_per_weight == layer.bits_per_weight
    errors = [
        quantize(kernel, RTN(bits=4))[1].relative_squared_error
        for kernel in network.blocks.k_proj.kernel.get_value()
    ]
    np.testing.assert_allclose(report.relative_squared_error, np.mean(errors), 1e-6)
    np.testing.assert_allclose(report.worst_squared_error, np.max(errors), 1e-6)
    worst = f"{np.sqrt(np.max(errors)):.3g}"
    assert f"(worst {worst})" in report_table(result.reports)


def test_stacks_that_read_one_input_share_its_transform(network):
    rules = Rules(config=JOINT, share=SHARED_INPUTS)
    model = quantize_model(network, key=KEY, rules=rules).model
    q, k = model.blocks.q_proj, model.blocks.k_proj
    assert q.inputs is k.inputs
    for name in ("seed", "in_scale"):
        ours, theirs = (getattr(each.kernel.get_value(), name) for each in (q, k))
        np.testing.assert_array_equal(ours, theirs)
        assert len({row.tobytes() for row in np.asarray(ours)}) == DEPTH
    assert np.isfinite(run(model, activations())).all()


def test_a_damaged_matrix_of_a_stack_is_named(network):
    kernel = network.blocks.k_proj.kernel
    kernel.set_value(kernel.get_value().at[2, 0, 0].set(jnp.inf))
    with pytest.raises(NonFiniteError, match=r"`blocks/k_proj\[2\]` holds 1 NaN"):
        quantize_model(network, RTN(), KEY)


def test_a_stack_along_another_axis_is_an_error_that_names_it():
    model = nnx.Module()
    make = nnx.vmap(lambda rngs: nnx.Linear(8, 16, rngs=rngs), out_axes=1)
    model.stack = make(nnx.Rngs(0).split(3))
    with pytest.raises(UsageError, match=r"stack \[8 x 3 x 16\]: has 3 axes"):
        quantize_model(model, RTN())


def test_a_stack_of_embeddings_is_an_error_that_names_it():
    model = nnx.Module()
    make = nnx.vmap(lambda rngs: nnx.Embed(8, 16, rngs=rngs))
    model.stack = make(nnx.Rngs(0).split(3))
    rules = Rules(config=RTN(), rules=[Rule("stack", RTN())])
    with pytest.raises(UsageError, match=r"`stack`, which has to stay: has 3 axes"):
        quantize_model(model, rules=rules)


def test_stacks_are_no_kernels_to_measure_one_by_one(network):
    with pytest.raises(UsageError, match="`blocks/k_proj/kernel` has shape"):
        selected_kernels(network)
