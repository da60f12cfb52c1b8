"""`QuantizedDense` beside the `nn.Dense` that it replaces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from packed_matrices import random_tensor

from kashin_jax import (
    NF4,
    RTN,
    GreedyKashin,
    JointKashin,
    QuantizedDense,
    Rotated,
    dequantize,
    dequantize_params,
    quantize_params,
)
from kashin_jax.errors import UsageError
from kashin_jax.layers import packed_dense

CONFIG = GreedyKashin(
    bits=1, num_restarts=1, sample=256, codebook_steps=10, polish_steps=2
)
KEY = jax.random.key(0)


def activations(shape, seed=3):
    drawn = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(drawn, jnp.float32)


def assert_close(found, expected, tolerance=1e-5):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


def apply(module, params, x):
    """In one program: op by op every test would take seconds."""
    return jax.jit(module.apply)(params, x)


class Network(nn.Module):
    """A model whose layers of one kind are a field."""

    dense: type[nn.Module] = nn.Dense

    @nn.compact
    def __call__(self, x):
        x = nn.relu(self.dense(24, name="up")(x))
        x = nn.LayerNorm()(x)
        return self.dense(8, use_bias=False, name="down")(x)


@pytest.fixture(scope="module")
def trained():
    params = jax.jit(Network().init)(KEY, jnp.ones((1, 16)))
    packed = jax.tree.map(lambda leaf: leaf, params)
    packed["params"]["up"]["kernel"] = random_tensor(CONFIG, (16, 24))
    packed["params"]["down"]["kernel"] = random_tensor(CONFIG, (24, 8))
    return params, packed


@pytest.mark.parametrize("batch", [(), (3,), (2, 1, 3)])
def test_packed_layer_equals_dense_layer_on_dequantized_kernel(trained, batch):
    _, packed = trained
    x = activations((*batch, 16))
    expected = apply(Network(), dequantize_params(packed), x)
    assert_close(apply(Network(QuantizedDense), packed, x), expected)


def test_a_model_that_knows_only_dense_layers_runs_on_packed_parameters(trained):
    params, packed = trained
    x = activations((4, 16))

    @jax.jit
    def run(params, x):
        with nn.intercept_methods(packed_dense):
            return Network().apply(params, x)

    assert_close(run(packed, x), apply(Network(), dequantize_params(packed), x))
    np.testing.assert_allclose(run(params, x), apply(Network(), params, x), rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": jnp.bfloat16},
        {"param_dtype": jnp.float16, "dtype": jnp.float32},
        {"use_bias": False},
        {"precision": jax.lax.Precision.HIGHEST},
    ],
)
def test_every_option_of_a_dense_layer_means_the_same(options):
    dense, x = nn.Dense(24, **options), activations((4, 16))
    packed = quantize_params(jax.jit(dense.init)(KEY, x), NF4()).params
    expected = apply(dense, dequantize_params(packed), x)
    found = apply(QuantizedDense(24, **options), packed, x)
    assert_close(found, expected, 2e-2 if "dtype" in options else 1e-5)


def test_init_gives_the_structure_of_the_parameters_without_work():
    x = jnp.ones((1, 128))
    layer = QuantizedDense(256, config=JointKashin(bits=2.5))
    shapes = jax.eval_shape(layer.init, KEY, x)
    assert shapes["params"]["bias"].shape == (256,)
    kernel = shapes["params"]["kernel"]
    assert kernel.shape == (128, 256) and kernel.layout.bits == 2.5
    assert kernel.packed_codes.size + kernel.packed_coarse.size == 2.5 * 128 * 256 / 8


def test_init_makes_a_layer_that_runs():
    layer = QuantizedDense(24, config=Rotated(RTN(group_size=64)))
    params = jax.jit(layer.init)(KEY, jnp.ones((1, 16)))
    dense = dequantize_params(params)
    x = activations((4, 16))
    assert_close(apply(layer, params, x), apply(nn.Dense(24), dense, x))
    # As that of nn.Dense: LeCun normal, of variance 1 / 16.
    assert 0.5 < 16 * jnp.mean(jnp.square(dense["params"]["kernel"])) < 2


def test_layers_of_one_model_may_have_any_methods_and_dense_kernels(trained):
    params, packed = trained
    mixed = {"params": packed["params"] | {"down": params["params"]["down"]}}
    x = activations((4, 16))
    expected = apply(Network(), dequantize_params(mixed), x)
    assert_close(apply(Network(QuantizedDense), mixed, x), expected)
    rounded = quantize_params(params, RTN()).params
    mixed = {"params": packed["params"] | {"down": rounded["params"]["down"]}}
    expected = apply(Network(), dequantize_params(mixed), x)
    assert_close(apply(Network(QuantizedDense), mixed, x), expected)


def test_layers_run_under_scan_vmap_and_grad():
    class Step(nn.Module):
        features: int
        dense: type[nn.Module] = nn.Dense

        @nn.compact
        def __call__(self, x, _):
            return jnp.tanh(self.dense(self.features, name="fc")(x)), None

    def network(dense):
        return nn.scan(
            Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )(16, dense)

    x = activations((4, 16))
    params = jax.jit(network(nn.Dense).init)(KEY, x, None)
    tensors = [random_tensor(CONFIG, (16, 16), seed) for seed in range(3)]

    def with_kernel(kernels):
        kernel = jax.tree.map(lambda *leaves: jnp.stack(leaves), *kernels)
        return {"params": {"fc": params["params"]["fc"] | {"kernel": kernel}}}

    packed = with_kernel(tensors)
    dense = with_kernel([0.1 * dequantize(tensor) for tensor in tensors])
    packed["params"]["fc"]["kernel"] = packed["params"]["fc"]["kernel"].replace(
        scale=0.1 * packed["params"]["fc"]["kernel"].scale
    )

    def gradients(kind, params):
        def loss(x):
            return jnp.sum(network(kind).apply(params, x, None)[0])

        return jax.jit(jax.vmap(jax.grad(loss)))(x)

    assert_close(gradients(QuantizedDense, packed), gradients(nn.Dense, dense))


def test_a_kernel_of_another_shape_is_an_error_that_names_the_layer(trained):
    _, packed = trained
    with pytest.raises(UsageError, match=r"`up` needs a kernel of shape \(12, 24\)"):
        Network(QuantizedDense).apply(packed, jnp.ones((1, 12)))


def test_a_product_of_its_own_is_an_error_that_names_the_layer(trained):
    _, packed = trained

    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            return QuantizedDense(24, dot_general=own_product, name="up")(x)

    only = {"params": {"up": packed["params"]["up"]}}
    with pytest.raises(UsageError, match="`up` has a `dot_general` of its own"):
        Own().apply(only, jnp.ones((1, 16)))


def own_product(*args, **kwargs):
    return jax.lax.dot_general(*args, **kwargs)
