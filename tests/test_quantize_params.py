"""`quantize_params` on trees of parameters, of Linen models and of none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx, traverse_util
from flax.core import freeze

from kashin_jax import (
    HQQ,
    NF4,
    RTN,
    GreedyKashin,
    JointKashin,
    KashinTensor,
    Rotated,
    Rule,
    Rules,
    dequantize,
    dequantize_params,
    quantize,
    quantize_params,
)
from kashin_jax.errors import NonFiniteError, UsageError
from kashin_jax.layers import packed_dense
from kashin_jax.pipeline import path_key, plan_params

KEY = jax.random.key(0)


class Network(nn.Module):
    """Attention, convolution, embedding, norm, dense layers and a head."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(12, 16)(tokens)
        x = nn.MultiHeadDotProductAttention(2)(x)
        x = nn.Conv(16, (3,))(nn.LayerNorm()(x))
        for i in range(2):
            x = nn.Dense(16, name=f"layers_{i}")(x)
        return nn.Dense(12, name="lm_head")(x)


@pytest.fixture(scope="module")
def params():
    return Network().init(KEY, jnp.zeros((1, 4), jnp.int32))


def packed_paths(params):
    """Paths of all packed leaves, as they stand in the tree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda leaf: hasattr(leaf, "decode")
    )
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/")
        for keys, leaf in leaves
        if hasattr(leaf, "decode")
    }


def test_kernels_are_packed_and_everything_else_is_shared(params):
    result = quantize_params(params, RTN(), KEY)
    assert list(result.reports) == ["layers_0", "layers_1"]
    assert packed_paths(result.params) == {
        "params/layers_0/kernel",
        "params/layers_1/kernel",
    }
    tensor, _ = quantize(
        params["params"]["layers_1"]["kernel"], RTN(), path_key(KEY, "layers_1")
    )
    found = result.params["params"]["layers_1"]["kernel"]
    np.testing.assert_array_equal(found.packed_codes, tensor.packed_codes)
    for name in ("Embed_0", "Conv_0", "LayerNorm_0", "lm_head"):
        for a, b in zip(
            jax.tree.leaves(result.params["params"][name]),
            jax.tree.leaves(params["params"][name]),
            strict=True,
        ):
            assert a is b


def test_dequantizing_gives_dense_kernels_of_the_type_they_had(params):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    packed = quantize_params(half, RTN(bits=8)).params
    found = dequantize_params(packed)
    assert jax.tree.structure(found) == jax.tree.structure(half)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(half), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        error = jnp.max(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)))
        assert error < 0.02


def test_the_first_rule_that_matches_gives_the_method(params):
    rules = Rules(
        config=RTN(),
        rules=[
            Rule("layers_1", NF4()),
            Rule("Embed_0/embedding", JointKashin(bits=2, effort="fast")),
            Rule("lm_head", RTN(bits=8)),
        ],
    )
    result = quantize_params(params, rules=rules, key=KEY)
    assert {p: type(r.config) for p, r in result.reports.items()} == {
        "Embed_0/embedding": JointKashin,
        "layers_0": RTN,
        "layers_1": NF4,
        "lm_head": RTN,
    }
    table = result.params["params"]["Embed_0"]["embedding"]
    assert isinstance(table, KashinTensor)


STAYS = "has 3 axes; if it is a stack of kernels, name it by `stacks`, else give "
STAYS += "`call`, or a rule with `contract`"


def test_kernels_that_are_no_matrices_stay_and_the_plan_says_why(params, capsys):
    result = quantize_params(params, RTN(), dry_run=True)
    assert result.params is params and result.reports == {}
    plan = plan_params(params, RTN())
    assert capsys.readouterr().out == f"{plan}\n"
    reasons = {each.choice.path: each.choice.reason for each in plan.layers}
    attention = "MultiHeadDotProductAttention_0"
    assert reasons == {
        "Conv_0": STAYS,
        "Embed_0/embedding": "no rule names it",
        f"{attention}/key": STAYS,
        f"{attention}/out": STAYS,
        f"{attention}/query": STAYS,
        f"{attention}/value": STAYS,
        "layers_0": None,
        "layers_1": None,
        "lm_head": "skipped by default: head",
    }
    rules = Rules(config=RTN(), rules=[Rule("query", RTN())])
    with pytest.raises(UsageError, match="query`, which has to stay: has 3 axes"):
        quantize_params(params, rules=rules)


def test_the_plan_says_what_will_be_stored_and_needs_no_arrays(params):
    rules = Rules(config=HQQ(bits=3), skip=["layers_0"])
    abstract = jax.eval_shape(lambda: params)
    plan = plan_params(abstract, rules=rules)
    result = quantize_params(params, rules=rules)
    assert [e.stored_bits for e in plan.quantized] == [
        report.stored_bits for report in result.reports.values()
    ]
    leaves = jax.tree.leaves(params)
    assert plan.bytes_before == sum(leaf.nbytes for leaf in leaves)
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(result.params))
    assert plan.bytes_after == stored


@pytest.mark.parametrize("make", [freeze, lambda tree: [tree, (jnp.ones(3),)]])
def test_any_tree_keeps_its_structure(params, make):
    tree = make(params)
    packed = quantize_params(tree, RTN()).params
    assert type(packed) is type(tree)
    assert jax.tree.structure(dequantize_params(packed)) == jax.tree.structure(tree)


def test_matrices_of_other_names_need_a_rule():
    tree = {"w1": jnp.ones((16, 8)), "b1": jnp.zeros(8), "w2": np.ones((8, 8))}
    with pytest.raises(UsageError, match="Of 0 kernels the rules quantize none"):
        quantize_params(tree, RTN())
    rules = Rules(config=RTN(), rules=[Rule("^w", RTN(bits=2))])
    result = quantize_params(tree, rules=rules)
    assert packed_paths(result.params) == {"w1", "w2"}
    np.testing.assert_allclose(dequantize(result.params["w1"]), 1.0, rtol=1e-3)


def test_a_matrix_that_occurs_twice_is_quantized_once_and_stays_tied():
    kernel = jax.random.normal(KEY, (16, 8))
    tree = {"a": {"kernel": kernel}, "b": {"kernel": kernel}, "c": {"kernel": kernel.T}}
    result = quantize_params(tree, RTN())
    assert result.params["a"]["kernel"] is result.params["b"]["kernel"]
    assert list(result.reports) == ["a", "c"]
    left = quantize_params(tree, RTN(), select=lambda p: p != "b").params
    assert left["a"]["kernel"] is left["b"]["kernel"] is kernel


def test_packed_leaves_are_left_as_they_are(params):
    first = quantize_params(params, RTN(), select=lambda p: p == "layers_0")
    both = quantize_params(first.params, NF4())
    assert list(both.reports) == ["layers_1"]
    kernel = both.params["params"]["layers_0"]["kernel"]
    assert kernel is first.params["params"]["layers_0"]["kernel"]


def test_errors_name_the_layer(params):
    broken = jax.tree.map(jnp.array, params)
    kernel = broken["params"]["layers_1"]["kernel"]
    broken["params"]["layers_1"]["kernel"] = kernel.at[0, 0].set(jnp.nan)
    with pytest.raises(NonFiniteError, match="`layers_1` holds 1 NaN"):
        quantize_params(broken, RTN())
    with pytest.raises(UsageError, match=r"`layers_0`: A matrix of shape \(16, 16\)"):
        quantize_params(params, GreedyKashin(block_shape=(5, 5)))
    with pytest.raises(UsageError, match="'mlp' matches none"):
        quantize_params(params, rules=Rules(rules=[Rule("mlp", None)]))


def test_adding_a_layer_leaves_other_codes_unchanged(params):
    config = Rotated(RTN(group_size=64))
    before = quantize_params(params, config, KEY).params["params"]
    more = {"params": params["params"] | {"a": {"kernel": jnp.eye(16)}}}
    after = quantize_params(more, config, KEY).params["params"]
    for name in ("layers_0", "layers_1"):
        np.testing.assert_array_equal(
            before[name]["kernel"].packed_codes, after[name]["kernel"].packed_codes
        )


class Same(nn.Dense):
    """A subclass that computes what `nn.Dense` does."""


class Boxed(nn.Module):
    """Kernels in boxes that say how they are cut over devices."""

    kind: type = nn.Dense

    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        return self.kind(8, kernel_init=init, name="body")(x)


@pytest.mark.parametrize("kind", [nn.Dense, Same])
def test_kernels_in_boxes_are_quantized_and_run(kind):
    """Boxed parameters were "0 kernels"; subclasses of Dense were packed and failed."""
    x = jax.random.normal(KEY, (3, 16))
    model = Boxed(kind)
    params = model.init(KEY, x)
    result = quantize_params(params, RTN(bits=8, group_size=8))
    assert list(result.reports) == ["body"] and result.coverage.weights == 128 / 136
    assert hasattr(result.params["params"]["body"]["kernel"], "decode")
    plain = quantize_params(nn.meta.unbox(params), RTN(bits=8, group_size=8))
    with nn.intercept_methods(packed_dense):
        y, same = (model.apply(r.params, x) for r in (result, plain))
    np.testing.assert_array_equal(y, same)
    np.testing.assert_allclose(y, model.apply(params, x), atol=0.05)


def test_flat_trees_are_taken_as_they_are(params):
    whole = quantize_params(params, RTN())
    for sep in (None, "/"):
        flat = traverse_util.flatten_dict(params, sep=sep)
        result = quantize_params(flat, RTN())
        assert result.reports.keys() == whole.reports.keys()
        assert result.params.keys() == flat.keys()


def test_a_state_of_nnx_is_refused_with_the_remedy():
    state = nnx.state(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
    with pytest.raises(UsageError, match="`quantize_model`, or give `nnx.to_pure_dict"):
        quantize_params(state, RTN())
    assert list(quantize_params(nnx.to_pure_dict(state), RTN()).reports) == ["kernel"]


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(16)(x), None


def test_scanned_stacks_and_all_else_that_stays_is_named(params):
    """A tree of stacks alone ended in "0 kernels"."""
    stack = nn.scan(
        Scanned, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )
    tree = stack().init(KEY, jnp.ones((1, 16)), None)
    pattern = r"Not among them: Dense_0 \[3 x 16 x 16\]: has 3 axes"
    with pytest.raises(UsageError, match=pattern):
        quantize_params(tree, RTN())
    with pytest.raises(UsageError, match="'Scan' matches no kernel of more than two"):
        quantize_params(tree, RTN(), stacks=["Scan"])
    left = quantize_params(params, RTN()).coverage.left
    assert {"Conv_0", "MultiHeadDotProductAttention_0/key"} < {p.name for p in left}


def test_stacks_that_are_named_run_under_scan():
    stack = nn.scan(
        Scanned, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )
    x = jnp.ones((2, 16))
    tree = stack().init(KEY, x, None)
    packed = quantize_params(tree, RTN(), stacks=["Dense_0"]).params
    assert packed["params"]["Dense_0"]["kernel"].full_shape == (3, 16, 16)
    with nn.intercept_methods(packed_dense):
        found, _ = stack().apply(packed, x, None)
    expected, _ = stack().apply(dequantize_params(packed), x, None)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_packed_kernel_in_a_layer_that_cannot_run_it_is_an_error_that_names_it():
    """A matrix of a module of one's own may be called kernel, too."""

    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("kernel", nn.initializers.ones, (16, 8))

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Own(name="product")(x)

    x = jnp.ones((2, 16))
    packed = quantize_params(Network().init(KEY, x), RTN(group_size=8)).params
    with (
        nn.intercept_methods(packed_dense),
        pytest.raises(UsageError, match="`product` is a Own with a packed kernel"),
    ):
        Network().apply(packed, x)
