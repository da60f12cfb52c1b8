"""Experts in one array are coded matrix by matrix, and come back as they were."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from kashin_jax.io import open_checkpoint
from kashin_jax.methods import RTN, JointKashin
from kashin_jax.models.tensor_roles import tensor_roles
from kashin_jax.pipeline import (
    Rules,
    dequantize_checkpoint,
    packed_layers,
    plan_checkpoint,
    quantize_checkpoint,
)
from kashin_jax.tensors import dequantize

GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"
DOWN = "model.layers.0.mlp.experts.down_proj"
GRANITE = "model.layers.0.block_sparse_moe.output_linear.weight"
CONV = "model.conv.weight"
SHAPES = {
    GATE_UP: (3, 16, 32),
    DOWN: (3, 16, 24),
    GRANITE: (3, 16, 24),
    CONV: (8, 4, 3),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    weights = {name: np.float16(rng.normal(size=s)) for name, s in SHAPES.items()}
    weights[f"{GATE_UP}_bias"] = np.ones((3, 32), np.float16)
    # Of one value: whether all of a stack are, is known before any is coded.
    weights[GATE_UP][1] = 0.5
    safetensors.numpy.save_file(weights, directory / "model.safetensors")
    config = {"model_type": "a_new_one", "text_config": {"hidden_size": 16}}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("config", [RTN(), JointKashin(bits=2, effort="fast")])
def test_stacks_of_experts_are_coded_and_decoded(source, tmp_path, config):
    rules = Rules(config=config)
    plan = plan_checkpoint(open_checkpoint(source), rules)
    result = quantize_checkpoint(source, tmp_path / "q", rules)
    assert result.reports.keys() == {GATE_UP, DOWN, GRANITE}
    assert [part.name for part in result.coverage.left] == [CONV]
    planned = {layer.choice.name: layer.stored_bits for layer in plan.quantized}
    assert planned == {name: one.stored_bits for name, one in result.reports.items()}
    dequantize_checkpoint(tmp_path / "q", tmp_path / "d")
    decoded, original = open_checkpoint(tmp_path / "d"), open_checkpoint(source)
    limit = 0.05 if isinstance(config, RTN) else 0.3
    for name, shape in SHAPES.items():
        found, expected = decoded.load(name), original.load(name)
        assert found.shape == shape and found.dtype == expected.dtype
        lost = np.square(np.float32(found) - np.float32(expected))
        assert lost.sum() <= limit * np.square(np.float32(expected)).sum()


def test_packed_stacks_are_handed_out_as_inputs_by_outputs(source, tmp_path):
    quantize_checkpoint(source, tmp_path / "q", Rules(config=RTN()))
    layers = packed_layers(open_checkpoint(tmp_path / "q"))
    shapes = {path: tensor.full_shape for path, tensor in layers.items()}
    assert shapes == {
        "layers/0/mlp/experts/gate_up_proj": (3, 16, 32),
        # Stored as [out, in], as 16 hidden features tell.
        "layers/0/mlp/experts/down_proj": (3, 24, 16),
        "layers/0/block_sparse_moe/output_linear": (3, 24, 16),
    }
    stack = layers["layers/0/mlp/experts/down_proj"]
    one = jax.tree.map(lambda leaf: leaf[2], stack)
    np.testing.assert_array_equal(dequantize(stack)[2], dequantize(one))


@pytest.mark.parametrize(
    ("name", "shape", "is_transposed"),
    [
        (GATE_UP, (4, 8, 32), False),
        (GATE_UP, (4, 32, 8), True),
        (DOWN, (4, 32, 8), False),
        (DOWN, (4, 8, 32), True),
        # Nothing tells: as nearly all families are.
        (GATE_UP, (4, 8, 8), True),
        (GRANITE, (4, 8, 8), True),
    ],
)
def test_hidden_features_tell_how_experts_are_stored(name, shape, is_transposed):
    role = tensor_roles({"hidden_size": 8}).of(name, shape)
    assert (role.kind, role.is_transposed) == ("experts", is_transposed)


@pytest.mark.parametrize(
    ("family", "is_transposed"),
    [("gpt_oss", False), ("llama4", False), ("aria", False), ("qwen3_moe", True)],
)
def test_a_table_tells_where_all_sides_are_equal(family, is_transposed):
    """GPT-OSS has as many features within its experts as without."""
    role = tensor_roles({"model_type": family, "hidden_size": 8}).of(DOWN, (4, 8, 8))
    assert role.is_transposed == is_transposed


@pytest.mark.parametrize(
    ("name", "shape"), [(CONV, (8, 4, 3)), (GATE_UP, (8, 4)), ("experts", (2, 3, 4))]
)
def test_other_arrays_are_no_experts(name, shape):
    role = tensor_roles({}).of(name, shape)
    assert role.kind != "experts" and not role.is_matrix
