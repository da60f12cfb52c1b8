"""Matrices of no more values than codes, as networks of signs have, lose nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from kashin_jax.io import open_checkpoint
from kashin_jax.methods import JointKashin, distinct_values, quantize, quantize_stack
from kashin_jax.pipeline import plan_checkpoint, quantize_checkpoint
from kashin_jax.pipeline.rules import Rules
from kashin_jax.tensors import dequantize

FAST = JointKashin(bits=2, effort="fast")


@settings(deadline=None, max_examples=15)
@given(
    values=st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_matrices_of_few_values_are_decoded_exactly(values, seed):
    weight = np.random.default_rng(seed).choice(np.float32(values), (32, 64))
    # XLA takes numbers below the normal ones for zeros.
    weight[np.abs(weight) < 1e-37] = 0
    tensor, report = quantize(weight, FAST)
    np.testing.assert_array_equal(dequantize(tensor), weight)
    assert report.relative_squared_error == 0


@pytest.mark.parametrize("bits", [2.5, 5])
def test_wider_and_half_widths_have_a_code_for_every_value(bits):
    config = JointKashin(bits=bits, effort="fast")
    assert config.most_values == 2 ** int(bits)
    values = np.linspace(-1, 1, config.most_values, dtype=np.float32)
    weight = np.random.default_rng(0).choice(values, (64, 64))
    tensor, _ = quantize(weight, config)
    np.testing.assert_array_equal(dequantize(tensor), weight)
    x = np.eye(64, dtype=np.float32)[:3]
    np.testing.assert_allclose(x @ tensor, weight[:3], rtol=1e-6)


def test_one_value_more_is_searched_for():
    weight = np.resize(np.arange(5, dtype=np.float32), (64, 64))
    tensor, report = quantize(weight, FAST)
    assert tensor.out_scale is not None
    assert report.relative_squared_error > 0


def test_a_first_row_of_few_values_does_not_decide():
    rows = [np.zeros((1, 4)), np.arange(8.0)]
    assert distinct_values(iter(rows), 4) is None
    assert distinct_values(iter(rows), 8).tolist() == list(range(8))
    # Nothing is read where a method has no use for it.
    assert distinct_values(iter([None]), 0) is None


def test_a_stack_has_one_structure_though_one_of_its_matrices_has_few_values():
    noise = jax.random.normal(jax.random.key(0), (64, 64))
    stack = jnp.stack([jnp.ones((64, 64)), noise])
    tensor, report = quantize_stack(stack, FAST, jax.random.key(0), path="w")
    assert tensor.full_shape == (2, 64, 64)
    assert tensor.out_scale is not None
    assert report.relative_squared_error.shape == (2,)
    same, exact = quantize_stack(jnp.sign(stack), FAST, jax.random.key(0), path="w")
    assert same.out_scale is None
    assert not exact.relative_squared_error.any()


def test_a_checkpoint_is_planned_as_it_is_written_though_layers_share_a_scale(tmp_path):
    """Sizes are fixed before values are read: the header precedes the data."""
    rng = np.random.default_rng(0)
    signs = {
        f"layers.0.attn.{name}_proj.weight": rng.choice([-0.5, 0.5], (64, 64))
        for name in "qkvo"
    }
    weights = {name: each.astype(np.float16) for name, each in signs.items()}
    # A first row of zeros, as padding has.
    odd = rng.standard_normal((64, 64)).astype(np.float32)
    odd[0] = 0
    safetensors.numpy.save_file(
        {**weights, "layers.0.fc1.weight": odd}, tmp_path / "model.safetensors"
    )
    rules = Rules(config=FAST, share=[r"[qkv]_proj$"])
    plan = plan_checkpoint(open_checkpoint(tmp_path), rules)
    result = quantize_checkpoint(tmp_path, tmp_path / "q", rules)
    lossless = "layers.0.attn.o_proj.weight"
    assert result.reports[lossless].relative_squared_error == 0
    sizes = {layer.choice.name: layer.stored_bits for layer in plan.layers}
    assert sizes == {name: each.stored_bits for name, each in result.reports.items()}
    assert min(sizes, key=sizes.__getitem__) == lossless
    loaded = open_checkpoint(tmp_path / "q").load(lossless)
    np.testing.assert_array_equal(dequantize(loaded).T, weights[lossless])
