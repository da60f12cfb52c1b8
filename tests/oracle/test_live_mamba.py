"""A model from another package, mamba2-jax, quantized as it is (make oracle)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kashin_jax import (
    NF4,
    JointKashin,
    QuantizedEmbed,
    QuantizedLinear,
    Rule,
    Rules,
    dequantize,
    quantize_model,
)
from kashin_jax.pipeline import plan_model, replace_kernels

pytestmark = [pytest.mark.oracle]

RULES = Rules(
    config=NF4(),
    rules=[
        Rule(r"/embedder$", JointKashin(bits=4, effort="fast")),
        Rule(r"/in_proj$", JointKashin(bits=3, effort="fast")),
    ],
)
TOKENS = jax.random.randint(jax.random.key(1), (2, 12), 0, 1000)


@pytest.fixture
def mamba():
    """Imported by the test, since normal runs collect this file and lack the model."""
    import mamba2_jax

    config = mamba2_jax.Mamba2Config.tiny()
    return mamba2_jax.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))


def logits(model):
    # The package promotes types where it sees fit.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return nnx.jit(lambda model: model(TOKENS)["logits"])(model)


def test_a_mamba_computes_alike_through_packed_and_dense_layers(mamba):
    result = quantize_model(mamba, key=jax.random.key(0), rules=RULES)
    packed = result.model.backbone
    assert isinstance(packed.embedder, QuantizedEmbed)
    assert isinstance(packed.layers[1].mixer.in_proj, QuantizedLinear)
    assert list(result.reports) == ["backbone/embedder"] + [
        f"backbone/layers/{i}/mixer/{name}"
        for i in range(2)
        for name in ("in_proj", "out_proj")
    ]
    kernels = {
        "/".join(map(str, parts)): dequantize(node.kernel.get_value())
        for parts, node in nnx.iter_graph(result.model)
        if isinstance(node, QuantizedLinear)
    }
    dense = replace_kernels(nnx.clone(mamba), kernels)
    # Its head is the table, which it reads by itself.
    dense.backbone.embedder.embedding.set_value(packed.embedder.embedding)
    found, expected = np.asarray(logits(result.model)), np.asarray(logits(dense))
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)
    assert np.linalg.norm(found - np.asarray(logits(mamba))) > 0


def test_the_plan_of_a_mamba_says_what_stays(mamba):
    plan = plan_model(mamba, rules=RULES)
    reasons = {each.choice.path: each.choice.reason for each in plan.layers}
    assert (
        reasons["backbone/layers/0/mixer/conv1d/conv"] == "convolves over 4 positions"
    )
    params = jax.tree.leaves(nnx.state(mamba, nnx.Param))
    assert plan.bytes_before == sum(leaf.nbytes for leaf in params)
    assert plan.bytes_after < 0.2 * plan.bytes_before
    assert jnp.isfinite(plan.bits_per_weight)
