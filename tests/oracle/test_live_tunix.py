"""A model from another package, tunix's Llama, quantized as it is (make oracle)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kashin_jax import (
    JointKashin,
    QuantizedLinear,
    Rule,
    Rules,
    dequantize,
    quantize_model,
)
from kashin_jax.layers import PackedParam
from kashin_jax.pipeline import plan_model, replace_kernels

# The package uses names that Flax has renamed since.
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

METHOD = JointKashin(bits=4, effort="fast")
# Its attention multiplies by parameters of modules of its own.
RULES = Rules(
    config=METHOD,
    rules=[
        Rule(r"[qkv]_proj/w$", METHOD, contract=[0]),
        Rule(r"o_proj/w$", METHOD, contract=[0, 1]),
    ],
)
TOKENS = jax.random.randint(jax.random.key(1), (2, 12), 0, 128)


@pytest.fixture(scope="module")
def llama():
    """Imported by the test, since normal runs collect this file and lack the model."""
    from tunix.models.llama3 import model

    config = model.ModelConfig(
        num_layers=2, vocab_size=128, embed_dim=64, hidden_dim=128, num_heads=4,
        head_dim=16, num_kv_heads=2, rope_theta=10_000, norm_eps=1e-5,
    )  # fmt: skip
    return model.Llama3(config, rngs=nnx.Rngs(0))


def logits(model):
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((12, 12), bool)), (2, 12, 12))
    # The package promotes types and ranks where it sees fit.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        call = nnx.jit(lambda model: model(TOKENS, positions, None, mask)[0])
        return np.asarray(call(model))


def test_a_llama_computes_alike_through_packed_and_dense_parameters(llama):
    result = quantize_model(llama, key=jax.random.key(0), rules=RULES)
    attention = result.model.layers[1].attn
    assert isinstance(attention.q_proj.w, PackedParam)
    assert isinstance(result.model.layers[1].mlp.up_proj, QuantizedLinear)
    assert len(result.reports) == 2 * 7
    matrices = {}
    for parts, node in nnx.iter_graph(result.model):
        path = "/".join(map(str, parts))
        if isinstance(node, QuantizedLinear):
            matrices[path] = dequantize(node.kernel.get_value())
        elif isinstance(node, PackedParam):
            matrices[path] = dequantize(node.array.tensor)
    dense = replace_kernels(llama, matrices, rules=RULES)
    found, expected, before = map(logits, (result.model, dense, llama))
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)
    assert 0.01 < np.linalg.norm(before - expected) / np.linalg.norm(before) < 0.2


def test_rules_take_the_coverage_of_a_llama_from_two_thirds_to_all(llama):
    before, after = plan_model(llama, METHOD), plan_model(llama, rules=RULES)
    assert before.coverage.inner == pytest.approx(2 / 3)
    reasons = {part.name: part.reason for part in before.coverage.left}
    assert reasons["layers/0/attn/q_proj/w"] == "in a Einsum"
    assert after.coverage.inner == 1
    left = [part.name for part in after.coverage.left]
    assert sorted(left) == ["embedder/input_embedding", "lm_head/w"]
