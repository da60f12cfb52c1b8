"""Models from another package, tunix, quantized as they are (make oracle)."""

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
TOKENS = jax.random.randint(jax.random.key(1), (2, 12), 0, 128)
SHAPE = {
    "num_layers": 2, "embed_dim": 64, "hidden_dim": 128, "num_heads": 4,
    "head_dim": 16, "num_kv_heads": 2,
}  # fmt: skip
# Their attention multiplies by parameters of modules of its own.
INPUTS = {
    "llama": {"[qkv]_proj/w$": [0], "o_proj/w$": [0, 1]},
    "gemma": {"q_einsum/w$": [1], "kv_einsum/w$": [2], "vec_einsum/w$": [0, 1]},
}
OUTER = {
    "llama": ["embedder/input_embedding", "lm_head/w"],
    "gemma": ["embedder/input_embedding"],
}


def llama():
    # Imported when it is run: normal runs collect this file and lack the package.
    from tunix.models.llama3 import model

    config = model.ModelConfig(
        **SHAPE, vocab_size=128, rope_theta=10_000, norm_eps=1e-5
    )
    return model.Llama3(config, rngs=nnx.Rngs(0))


def gemma():
    from tunix.models.gemma import model

    config = model.ModelConfig(
        **SHAPE, num_embed=128, final_logit_softcap=30.0, use_post_attn_norm=True,
        use_post_ffw_norm=True, attention_types=[model.AttentionType.GLOBAL] * 2,
    )  # fmt: skip
    return model.Gemma(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module", params=[llama, gemma], ids=lambda make: make.__name__)
def case(request):
    make = request.param
    axes = INPUTS[make.__name__].items()
    rules = [Rule(pattern, METHOD, contract=inputs) for pattern, inputs in axes]
    return make.__name__, make(), Rules(config=METHOD, rules=rules)


def logits(model):
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((12, 12), bool)), (2, 12, 12))
    # The package promotes types and ranks where it sees fit.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        call = nnx.jit(lambda model: model(TOKENS, positions, None, mask)[0])
        return np.asarray(call(model))


def test_a_decoder_computes_alike_through_packed_and_dense_parameters(case):
    name, model, rules = case
    result = quantize_model(model, key=jax.random.key(0), rules=rules)
    assert len(result.reports) == 2 * (3 + {"llama": 4, "gemma": 3}[name])
    matrices, kinds = {}, set()
    for parts, node in nnx.iter_graph(result.model):
        path = "/".join(map(str, parts))
        if isinstance(node, QuantizedLinear):
            matrices[path] = dequantize(node.kernel.get_value())
        elif isinstance(node, PackedParam):
            matrices[path] = dequantize(node.array.tensor)
        else:
            continue
        kinds.add(type(node))
    assert kinds == {QuantizedLinear, PackedParam}
    dense = replace_kernels(model, matrices, rules=rules)
    found, expected, before = map(logits, (result.model, dense, model))
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)
    assert 0.01 < np.linalg.norm(before - expected) / np.linalg.norm(before) < 0.3


def test_rules_take_the_coverage_of_a_decoder_from_two_thirds_to_all(case):
    name, model, rules = case
    before, after = plan_model(model, METHOD), plan_model(model, rules=rules)
    assert before.coverage.inner == pytest.approx(2 / 3)
    assert {part.reason for part in before.coverage.left} >= {"in a Einsum"}
    assert after.coverage.inner == 1
    assert sorted(part.name for part in after.coverage.left) == OUTER[name]
