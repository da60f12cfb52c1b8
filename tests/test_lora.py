"""Adapters beside packed layers: codes stay frozen, the loss falls."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from kashin_jax import RTN, QuantizedLinear, quantize_model
from kashin_jax.layers import PackedKernel

KEY = jax.random.key(0)


class Network(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(16, 32, rngs=rngs)
        self.down = nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


def with_adapters(model, rank, rngs):
    """A model whose packed layers each have a trainable product of two thin matrices.

    Flax's own `nnx.LoRA` calls the layer that it is given and adds to its outputs.
    """

    def wrap(path, node):
        if not isinstance(node, QuantizedLinear):
            return node
        return nnx.LoRA(
            node.in_features, rank, node.out_features, base_module=node, rngs=rngs
        )

    return nnx.recursive_map(wrap, model)


def stored(model):
    leaves = jax.tree.leaves(nnx.state(model, PackedKernel))
    return [np.asarray(leaf).tobytes() for leaf in leaves]


def test_adapters_learn_what_quantization_lost_while_the_codes_stay():
    teacher = Network(nnx.Rngs(0))
    packed = quantize_model(teacher, RTN(bits=2), KEY).model
    student = with_adapters(packed, 8, nnx.Rngs(1))
    x = np.random.default_rng(0).standard_normal((256, 16)).astype(np.float32)
    call = nnx.jit(lambda model, x: model(x))
    target = call(teacher, x)
    before, biases = stored(student), np.asarray(student.up.base_module.bias[...])
    np.testing.assert_allclose(call(student, x), call(packed, x), rtol=1e-5, atol=1e-5)

    def loss(model):
        return jnp.mean(jnp.square(model(x) - target))

    adapters = nnx.DiffState(0, nnx.LoRAParam)
    optimizer = nnx.Optimizer(student, optax.adam(1e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        value, gradients = nnx.value_and_grad(loss, argnums=adapters)(model)
        optimizer.update(model, gradients)
        return value

    # Optax counts its steps in int32 and raises floats to that power.
    with jax.numpy_dtype_promotion("standard"):
        losses = [float(step(student, optimizer)) for _ in range(100)]
    assert losses[-1] < 0.5 * losses[0]
    assert stored(student) == before
    np.testing.assert_array_equal(student.up.base_module.bias[...], biases)
    trained = jax.tree.leaves(nnx.state(student, nnx.LoRAParam))
    assert len(trained) == 4 and all(np.any(leaf) for leaf in trained)
