"""`QuantizedLinear.from_linear`: the options of `nnx.Linear`, gradients, stacks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from packed_matrices import random_tensor

from kashin_jax import (
    RTN,
    GreedyKashin,
    JointKashin,
    QuantizedLinear,
    Rotated,
    bits_per_weight,
    dequantize,
    matmul,
    quantize,
)
from kashin_jax.errors import UsageError
from kashin_jax.layers import PackedKernel

CONFIG = GreedyKashin(
    bits=1, num_restarts=1, sample=256, codebook_steps=10, polish_steps=2
)
ROUNDED = RTN()
KEY = jax.random.key(0)


def activations(shape, seed=3):
    drawn = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(drawn, jnp.float32)


def linear(**options):
    return nnx.Linear(16, 24, rngs=nnx.Rngs(1), **options)


def packed_and_dense(config=ROUNDED, **options):
    """A packed layer, and the dense one on the kernel that it decodes to."""
    dense = linear(bias_init=nnx.initializers.normal(), **options)
    dtype = dense.kernel.get_value().dtype
    tensor = random_tensor(config, (16, 24), dtype=dtype)
    packed = QuantizedLinear.from_linear(dense, tensor)
    dense.kernel.set_value(dequantize(packed.kernel.get_value()))
    return packed, dense


def assert_close(found, expected, tolerance=1e-5):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


def to_bfloat16(args, *, dtype):
    return tuple(None if x is None else x.astype(jnp.bfloat16) for x in args)


OPTIONS = {
    "plain": ({}, 1e-5),
    "no bias": ({"use_bias": False}, 1e-5),
    "bfloat16": ({"dtype": jnp.bfloat16}, 2e-2),
    "float16 parameters": ({"param_dtype": jnp.float16, "dtype": jnp.float32}, 1e-3),
    "bfloat16 returned as float32": (
        {"dtype": jnp.bfloat16, "preferred_element_type": jnp.float32},
        2e-2,
    ),
    "float32 returned as bfloat16": (
        {"preferred_element_type": jnp.bfloat16, "use_bias": False},
        2e-2,
    ),
    "promotion of its own": ({"promote_dtype": to_bfloat16}, 2e-2),
    "precision": ({"precision": jax.lax.Precision.HIGHEST}, 1e-5),
    "precision twice": ({"precision": (jax.lax.Precision.HIGH,) * 2}, 1e-5),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_a_linear_means_the_same(name):
    options, tolerance = OPTIONS[name]
    packed, dense = packed_and_dense(**options)
    assert packed.use_bias == dense.use_bias
    x = activations((2, 3, 16))
    with jax.numpy_dtype_promotion("standard"):
        assert_close(packed(x), dense(x), tolerance)


def test_accumulating_in_float32_is_finer_than_returning_bfloat16():
    fine, _ = packed_and_dense(dtype=jnp.bfloat16, preferred_element_type=jnp.float32)
    x, kernel = activations((64, 16)), fine.kernel.get_value()
    exact = x.astype(jnp.bfloat16).astype(jnp.float32) @ dequantize(kernel)
    bias = fine.bias.get_value().astype(jnp.bfloat16).astype(jnp.float32)
    with jax.numpy_dtype_promotion("standard"):
        assert_close(fine(x), exact + bias[None])


def test_an_output_can_be_sharded_as_that_of_a_linear():
    packed, dense = packed_and_dense()
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    spec = jax.sharding.PartitionSpec("data", None)
    with jax.set_mesh(mesh):
        x = jnp.ones((4, 16))
        found, expected = packed(x, spec), dense(x, spec)
    assert found.sharding == expected.sharding
    assert_close(found, expected)


def own_product(*args, **kwargs):
    return jax.lax.dot_general(*args, **kwargs)


def test_a_product_of_its_own_is_an_error_that_names_the_layer():
    with pytest.raises(UsageError, match=r"`decoder/fc1` has a `dot_general` of its"):
        QuantizedLinear.from_linear(
            linear(dot_general=own_product), RTN(), path="decoder/fc1"
        )


def test_two_precisions_are_an_error():
    with pytest.raises(UsageError, match="differs between the operands"):
        QuantizedLinear.from_linear(
            linear(precision=("high", "highest")), RTN(), path="fc"
        )


def test_a_matrix_of_another_shape_is_an_error_that_names_the_layer():
    tensor = random_tensor(RTN(), (24, 16))
    with pytest.raises(UsageError, match=r"`fc1/kernel` has shape \(16, 24\)"):
        QuantizedLinear.from_linear(linear(), tensor, path="fc1")


def test_a_method_quantizes_with_the_key_given():
    config, dense = Rotated(RTN(group_size=64)), linear()
    packed = QuantizedLinear.from_linear(dense, config, KEY)
    expected, _ = quantize(dense.kernel.get_value(), config, KEY)
    chex.assert_trees_all_equal(packed.kernel.get_value(), expected)
    assert packed.bias is dense.bias


def test_layers_that_share_a_matrix_share_its_variables():
    tensor = random_tensor(CONFIG, (16, 24))
    first = QuantizedLinear.from_linear(linear(), tensor)
    second = QuantizedLinear(first.packed)
    assert second.kernel is first.kernel and second.inputs is first.inputs
    assert len(nnx.to_flat_state(nnx.state((first, second), PackedKernel))) == 1


@pytest.mark.parametrize("config", [CONFIG, JointKashin(bits=2)])
def test_gradients_reach_what_is_stored_as_floats_and_not_the_codes(config):
    tensor = random_tensor(config, (16, 24))
    packed = QuantizedLinear.from_linear(linear(), tensor)
    x = 0.1 * activations((4, 16))

    @nnx.jit
    def loss(layer, x):
        return jnp.sum(jnp.sin(layer(x)))

    wrt = nnx.DiffState(0, PackedKernel)
    gradient = nnx.grad(loss, argnums=wrt, allow_int=True)(packed, x)
    found = gradient["kernel"].get_value()
    assert found.packed_codes.dtype == jax.dtypes.float0
    assert found.seed.dtype == jax.dtypes.float0
    for name in ("centroids", "scale"):
        leaf, direction = (
            getattr(tensor, name),
            activations(getattr(tensor, name).shape),
        )

        def moved(t, name=name, leaf=leaf, direction=direction):
            changed = tensor.replace(**{name: leaf + t * direction})
            product = np.asarray(matmul(x, changed))
            return np.sum(np.sin(product + np.asarray(packed.bias.get_value())))

        slope = (moved(1e-2) - moved(-1e-2)) / 2e-2
        np.testing.assert_allclose(
            np.sum(np.asarray(getattr(found, name)) * direction), slope, rtol=2e-2
        )


@pytest.fixture
def stack():
    tensors = [random_tensor(CONFIG, (16, 16), seed) for seed in range(3)]
    tensors = [tensor.replace(scale=0.1 * tensor.scale) for tensor in tensors]
    return tensors, jax.tree.map(lambda *leaves: jnp.stack(leaves), *tensors)


def test_a_stack_of_layers_has_the_bits_per_weight_of_one(stack):
    tensors, stacked = stack
    layers = nnx.vmap(QuantizedLinear)(stacked)
    assert layers.bits_per_weight == QuantizedLinear(tensors[0]).bits_per_weight
    assert layers.bits_per_weight == bits_per_weight(tensors[0])


def test_gradients_pass_through_a_scan_over_layers_under_jit_and_vmap(stack):
    tensors, stacked = stack
    layers = nnx.vmap(QuantizedLinear)(stacked)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer, x):
        return jnp.tanh(layer(x))

    @nnx.jit
    @nnx.vmap(in_axes=(None, 0))
    def packed(layers, x):
        return nnx.grad(lambda m, x: jnp.sum(run(m, x)), argnums=1)(layers, x)

    def dense(x):
        for tensor in tensors:
            x = jnp.tanh(x @ dequantize(tensor))
        return jnp.sum(x)

    x = activations((5, 16))
    assert_close(packed(layers, x), jax.jit(jax.vmap(jax.grad(dense)))(x))
