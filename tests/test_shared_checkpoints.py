"""Checkpoints whose layers share inputs: streamed, resumed and loaded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantized_sources import content, make_source, method

from kashin_jax import Rule, Rules, quantize_model
from kashin_jax.errors import UsageError
from kashin_jax.models.loading import load_opt
from kashin_jax.pipeline import (
    SHARED_INPUTS,
    checkpoint,
    load_quantized,
    quantize_checkpoint,
)

# What need not be joint coding is rounded, which compiles sooner.
STREAMED = Rules(
    config=method("kashin-joint"),
    rules=(Rule("out_proj|fc", method("rtn")),),
    share=SHARED_INPUTS,
)
NAMES = ("q_proj", "k_proj", "v_proj")


class Killed(BaseException):
    """Not caught by anything on the way."""


def fails_after(count):
    original, calls = checkpoint.record_file, []

    def record(path):
        calls.append(path)
        if len(calls) > count:
            raise Killed
        return original(path)

    return record


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("shared") / "source", dtype="float32")


@pytest.fixture(scope="module")
def streamed(source, tmp_path_factory):
    target = tmp_path_factory.mktemp("streamed") / "target"
    quantize_checkpoint(source, target, STREAMED, seed=3)
    return target


def attention(model):
    return [block.self_attn for block in model.decoder.layers]


def test_a_checkpoint_quantized_on_disk_is_the_model_quantized_in_memory(
    source, streamed
):
    loaded = load_quantized(streamed).model
    expected = quantize_model(
        load_opt(source).model, key=jax.random.key(3), rules=STREAMED
    ).model
    for found, block in zip(attention(loaded), attention(expected), strict=True):
        assert found.q_proj.inputs is found.k_proj.inputs is found.v_proj.inputs
        for name in NAMES:
            ours, theirs = (
                jax.tree.leaves(getattr(layer, name).kernel.get_value())
                for layer in (found, block)
            )
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(a, b, err_msg=name)
    tokens = jnp.arange(12).reshape(2, 6)
    np.testing.assert_allclose(loaded(tokens), expected(tokens), atol=1e-4)


def test_a_resumed_run_writes_the_same_bytes_and_never_mixes_rules(
    source, streamed, tmp_path
):
    size = 2**15
    whole, target = tmp_path / "whole", tmp_path / "target"
    quantize_checkpoint(source, whole, STREAMED, seed=3, max_shard_bytes=size)
    shards = sorted(whole.glob("*.safetensors"))
    assert len(shards) > 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "record_file", fails_after(1))
        with pytest.raises(Killed):
            quantize_checkpoint(source, target, STREAMED, seed=3, max_shard_bytes=size)
    with pytest.raises(UsageError, match="unfinished run with other"):
        alone = dataclasses.replace(STREAMED, share=())
        quantize_checkpoint(source, target, alone, seed=3, max_shard_bytes=size)
    result = quantize_checkpoint(source, target, STREAMED, seed=3, max_shard_bytes=size)
    assert result.resumed > 0
    assert content(target) == content(whole)
