"""`x @ q` for packed matrices: operators, prepared bases, kernels by platform."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_matrices import random_tensor

from kashin_jax import RTN, JointKashin, KMeans, Rotated, matmul, prepare, quantize
from kashin_jax.tensors import QuantizedTensor, products, register_kernel

CONFIGS = [JointKashin(), Rotated(RTN(group_size=16)), KMeans()]
X = np.random.default_rng(1).normal(size=(3, 32)).astype(np.float32)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_the_operator_is_the_product(config):
    q = random_tensor(config, (32, 16))
    whole = matmul(jnp.asarray(X), q)
    np.testing.assert_array_equal(jnp.asarray(X) @ q, whole)
    # NumPy's arrays hand over too, and tracers do.
    np.testing.assert_array_equal(X @ q, whole)
    np.testing.assert_array_equal(jax.jit(lambda x, q: x @ q)(X, q), whole)
    np.testing.assert_array_equal(X @ prepare(q), whole)
    np.testing.assert_array_equal(prepare(q).decode(), q.decode())


def test_a_tensor_is_no_sequence_and_stays_as_it_is():
    q = random_tensor(RTN(), (32, 16))
    with pytest.raises(TypeError):
        len(q)
    with pytest.raises(dataclasses.FrozenInstanceError):
        q.scale = 0
    with pytest.raises(TypeError, match="has no field `scales`"):
        q.replace(scales=0)
    assert jax.tree.structure(q) == jax.tree.structure(q.replace(scale=2 * q.scale))


def test_the_bases_of_a_prepared_tensor_are_not_derived_again():
    q = prepare(random_tensor(JointKashin(), (32, 16)))
    jaxpr = str(jax.make_jaxpr(lambda x, q: x @ q)(X, q))
    assert "random_bits" not in jaxpr and "threefry" not in jaxpr


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Doubled(QuantizedTensor):
    """A matrix of a kind that the library does not know."""

    packed_codes: Any
    layout: Any

    def decode(self, bases=None):
        return 2.0 * self.packed_codes.reshape(self.shape)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Layout:
    shape: tuple[int, int] = (32, 16)
    dtype: str = "float32"


def test_a_kind_of_the_users_own_is_multiplied_decoded():
    w = np.random.default_rng(2).normal(size=(32, 16)).astype(np.float32)
    q = Doubled(jnp.asarray(w).reshape(-1), Layout())
    np.testing.assert_allclose(X @ q, X @ (2 * w), rtol=1e-5)
    np.testing.assert_allclose(q.rows(jnp.array([3])), 2 * w[3:4])


def test_kernels_are_chosen_for_the_platform_that_a_program_is_lowered_for(monkeypatch):
    monkeypatch.setattr(products, "_KERNELS", dict(products._KERNELS))
    q = Doubled(jnp.ones(32 * 16), Layout())

    def zeros(rows, tensor, bases, options):
        return jnp.zeros((rows.shape[0], tensor.shape[1]))

    def sines(rows, tensor, bases, options):
        return jnp.sin(rows @ tensor.decode(bases))

    register_kernel(Doubled, zeros, platform="cpu")
    register_kernel(Doubled, sines, platform="tpu")
    np.testing.assert_array_equal(X @ q, np.zeros((3, 16)))
    traced = jax.jit(lambda x, q: x @ q).trace(X, q)
    text = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "tpu", "cuda")
    }
    # This machine has a CPU; what it lowers for others has their kernels.
    assert "sine" in text["tpu"]
    assert "sine" not in text["cpu"] and "dot_general" not in text["cpu"]
    assert "dot_general" in text["cuda"] and "sine" not in text["cuda"]


def test_a_kernel_registered_later_is_used_although_programs_are_kept(monkeypatch):
    monkeypatch.setattr(products, "_KERNELS", dict(products._KERNELS))
    q = Doubled(jnp.ones(32 * 16), Layout())
    before = X @ q
    register_kernel(Doubled, lambda rows, *_: jnp.zeros((rows.shape[0], 16)))
    assert np.any(before)
    np.testing.assert_array_equal(X @ q, np.zeros((3, 16)))


@pytest.mark.parametrize("config", CONFIGS[:2], ids=lambda config: config.name)
def test_half_precision_holds_what_scales_and_rotations_make_of_an_input(config):
    """2,500 times a scale of 36 is beyond float16, where the product is not."""
    w = np.random.default_rng(0).normal(size=(512, 16)).astype(np.float32) / 50
    w[7] *= 100
    q = quantize(w, config)[0]
    x = np.random.default_rng(1).normal(size=(4, 512))
    x[:, 7] = 2500
    x = jnp.asarray(x, jnp.float16)
    dense = x.astype(jnp.float32) @ q.decode()
    y = x @ q
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(y.astype(jnp.float32), dense, rtol=0.02, atol=30)
