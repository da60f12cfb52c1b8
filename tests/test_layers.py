"""`QuantizedLinear` beside the `nnx.Linear` that it replaces."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization
from packed_matrices import random_tensor

from kashin_jax import (
    NF4,
    RTN,
    GreedyKashin,
    JointKashin,
    QuantizedLinear,
    dequantize,
    quantize_model,
    stored_bits,
)
from kashin_jax.layers import DerivedBasis, PackedKernel

CONFIG = GreedyKashin(
    bits=1, num_restarts=1, sample=256, codebook_steps=10, polish_steps=2
)


def activations(shape, seed=3):
    drawn = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(drawn, jnp.float32)


def pair(*, use_bias=True, dtype=None, param_dtype=jnp.float32, config=CONFIG):
    """A packed layer, and the dense one with the kernel that it decodes to."""
    dense = nnx.Linear(
        16,
        24,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=nnx.Rngs(1),
    )
    if use_bias:
        dense.bias.set_value(activations((24,)).astype(param_dtype))
    q = random_tensor(config, (16, 24), dtype=param_dtype)
    dense.kernel.set_value(dequantize(q))
    return QuantizedLinear(q, dense.bias, dtype=dtype), dense


def assert_close(found, expected, tolerance=1e-5):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("batch", "use_bias"),
    [((), True), ((3,), False), ((2, 1, 3), True), ((256,), True)],
)
@pytest.mark.parametrize("config", [CONFIG, RTN(), NF4()])
def test_quantized_layer_equals_dense_layer_on_dequantized_kernel(
    config, batch, use_bias
):
    packed, dense = pair(use_bias=use_bias, config=config)
    x = activations((*batch, 16))
    assert_close(packed(x), dense(x))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_dtype_of_the_computation_is_kept(dtype):
    packed, dense = pair(dtype=dtype)
    x = activations((4, 16))
    assert_close(packed(x), dense(x), 4 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_without_a_dtype_types_promote_as_in_a_linear(x_dtype, param_dtype):
    packed, dense = pair(param_dtype=param_dtype)
    x = (3 * activations((4, 16))).astype(x_dtype)
    with jax.numpy_dtype_promotion("standard"):
        expected = dense(x)
        # Without the run-time checker of the tests: whole numbers are promoted too.
        found = inspect.unwrap(QuantizedLinear.__call__)(packed, x)
    # The dense kernel is rounded to its type, the packed one decodes in float32.
    eps = max(float(jnp.finfo(kind).eps) for kind in (expected.dtype, param_dtype))
    assert_close(found, expected, max(1e-5, 2 * eps))


def test_promotion_that_strict_mode_refuses_to_a_linear_is_refused_here():
    packed, dense = pair()
    x = activations((4, 16)).astype(jnp.bfloat16)
    for layer in (dense, packed):
        with pytest.raises(ValueError, match="have no available implicit dtype"):
            layer(x)


def test_the_bias_is_shared_and_not_copied():
    packed, dense = pair()
    assert packed.bias is dense.bias
    dense.bias.set_value(jnp.ones(24))
    assert (packed(jnp.zeros((1, 16))) == 1).all()


def test_the_layer_names_its_features_and_parts():
    packed, _ = pair()
    assert (packed.in_features, packed.out_features) == (16, 24)
    assert isinstance(packed.kernel, PackedKernel)
    assert isinstance(packed.inputs, DerivedBasis)
    assert isinstance(packed.outputs, DerivedBasis)
    assert pair(config=RTN())[0].inputs is None


def test_packed_layers_split_merge_and_run_under_jit():
    packed, _ = pair()
    x = activations((4, 16))
    merged = nnx.merge(*nnx.split(packed))
    np.testing.assert_array_equal(merged(x), packed(x))
    assert_close(nnx.jit(lambda layer, x: layer(x))(packed, x), packed(x))


def test_state_filters_tell_stored_from_derived_and_trained():
    packed, _ = pair()
    graphdef, kernel, derived, params = nnx.split(
        packed, PackedKernel, DerivedBasis, nnx.Param
    )
    assert stored_bits(kernel) == stored_bits(packed.kernel.get_value())
    assert set(params) == {"bias"} and set(derived) == {"inputs", "outputs"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(kernel)} == {
        "uint8",
        "uint32",
        "float32",
    }


def test_gradients_reach_parameters_and_skip_the_packed_kernel():
    packed, dense = pair()
    x = activations((4, 16))

    def loss(layer):
        return jnp.sum(jnp.square(layer(x)))

    gradient = nnx.jit(nnx.grad(loss))
    gradients = gradient(packed)
    assert set(gradients) == {"bias"}
    assert_close(gradients["bias"][...], gradient(dense)["bias"][...])


def test_gradients_pass_through_the_layer_to_its_input():
    packed, dense = pair()
    x = activations((4, 16))
    gradient = lambda layer: jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(layer(x)))))
    assert_close(gradient(packed)(x), gradient(dense)(x))


def test_a_stack_of_layers_runs_under_scan():
    tensors = [random_tensor(CONFIG, (16, 16), seed) for seed in range(3)]
    tensors = [tensor.replace(scale=0.1 * tensor.scale) for tensor in tensors]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tensors)
    layers = nnx.vmap(QuantizedLinear)(stacked)

    @nnx.jit
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer, x):
        return jnp.tanh(layer(x))

    x = activations((4, 16))
    expected = x
    for q in tensors:
        expected = jnp.tanh(expected @ dequantize(q))
    assert_close(run(layers, x), expected)


def test_features_must_match_the_layer():
    packed, _ = pair()
    with pytest.raises(ValueError, match=r"`x` has 24 features"):
        packed(activations((4, 24)))


def test_packed_models_are_tabulated_and_written_by_flax():
    """Flax asks a value for its type, and knows no classes but its own and NumPy's."""
    model = nnx.Sequential(nnx.Linear(32, 32, rngs=nnx.Rngs(0)))
    packed = quantize_model(model, RTN()).model
    assert "kernel" in nnx.tabulate(packed, jnp.ones((2, 32)))
    tensor = random_tensor(JointKashin(bits=2.5), (32, 32))
    target = jax.tree.map(jnp.zeros_like, tensor)
    again = serialization.from_bytes(target, serialization.to_bytes(tensor))
    assert jax.tree.all(jax.tree.map(np.array_equal, again, tensor))
    other = random_tensor(RTN(), (32, 32))
    with pytest.raises(ValueError, match="differ in the leaf `centroids`"):
        serialization.from_state_dict(tensor, serialization.to_state_dict(other))
