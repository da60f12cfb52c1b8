"""`quantize_model(in_place=True)`: what is held while it runs, and what it leaves."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kashin_jax import NF4, RTN, QuantizedLinear, quantize, quantize_model
from kashin_jax.errors import NonFiniteError
from kashin_jax.pipeline import path_key, selected_kernels

pytestmark = pytest.mark.slow

KEY = jax.random.key(0)
WIDTH, DEPTH = 256, 6
DENSE = 4 * WIDTH * WIDTH


class Stack(nnx.Module):
    def __init__(self, rngs, depth=DEPTH, width=WIDTH):
        self.layers = nnx.List(
            [nnx.Linear(width, width, rngs=rngs) for _ in range(depth)]
        )
        self.again = nnx.Dict(last=self.layers[-1])

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.again["last"](x)


def live_bytes():
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def watched(model, **options):
    """Bytes of all arrays whenever a layer comes up, beside those at the start."""
    start, seen = live_bytes(), []

    def layer(path, kernel):
        seen.append(live_bytes() - start)
        return quantize(kernel, RTN(bits=4), path_key(KEY, path), path=path)

    result = quantize_model(model, quantize_layer=layer, **options)
    return result, [*seen, live_bytes() - start]


def test_in_place_each_dense_kernel_is_let_go_before_the_next_is_quantized():
    model = Stack(nnx.Rngs(0))
    result, held = watched(model, in_place=True)
    packed = result.reports["layers/0"].stored_bits // 8
    assert result.model is model and len(held) == DEPTH + 1
    for done, found in enumerate(held):
        # Reports and the root key are a few bytes.
        assert abs(found + done * (DENSE - packed)) < 4096, (done, found)


def test_otherwise_the_dense_model_is_kept_beside_the_packed_layers():
    model = Stack(nnx.Rngs(0))
    result, held = watched(model)
    packed = result.reports["layers/0"].stored_bits // 8
    assert abs(held[-1] - DEPTH * packed) < 4096
    assert len(selected_kernels(model)) == DEPTH


@pytest.mark.parametrize("method", [RTN(), NF4()])
def test_in_place_and_functional_runs_give_the_same_model(method):
    model, x = Stack(nnx.Rngs(0), 2, 16), jnp.ones((3, 16))
    expected = quantize_model(model, method, KEY)
    assert type(model.layers[0]) is nnx.Linear
    found = quantize_model(model, method, KEY, in_place=True)
    np.testing.assert_array_equal(found.model(x), expected.model(x))
    assert type(model.layers[0]) is QuantizedLinear
    assert model.again["last"] is model.layers[1]
    assert found.reports.keys() == expected.reports.keys()


def test_a_model_that_is_one_linear_is_replaced():
    linear = nnx.Linear(8, 16, rngs=nnx.Rngs(0))
    result = quantize_model(linear, RTN(), in_place=True)
    assert isinstance(result.model, QuantizedLinear)


def test_after_an_error_the_model_works_and_the_rest_can_be_quantized():
    model, x = Stack(nnx.Rngs(0), 3, 16), jnp.ones((3, 16))
    kernel = model.layers[1].kernel
    good = kernel.get_value()
    kernel.set_value(good.at[0, 0].set(jnp.nan))
    with pytest.raises(NonFiniteError, match="`layers/1` holds 1 NaN"):
        quantize_model(model, RTN(), KEY, in_place=True)
    kinds = [type(each) for each in model.layers]
    assert kinds == [QuantizedLinear, nnx.Linear, QuantizedLinear]
    kernel.set_value(good)
    assert np.isfinite(model(x)).all()
    result = quantize_model(model, RTN(), KEY, in_place=True)
    assert list(result.reports) == ["layers/1"]


@pytest.mark.parametrize("container", [list, dict])
def test_layers_in_plain_containers_are_replaced_too(container):
    model = nnx.Module()
    linear = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    model.held = nnx.data([linear] if container is list else {"a": linear})
    result = quantize_model(model, RTN(), in_place=True)
    held = result.model.held
    assert isinstance(held[0] if container is list else held["a"], QuantizedLinear)
