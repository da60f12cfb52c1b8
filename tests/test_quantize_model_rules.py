"""`quantize_model` with rules: a method per layer, tied weights, the plan."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kashin_jax import (
    NF4,
    RTN,
    GreedyKashin,
    JointKashin,
    QuantizedEmbed,
    QuantizedLinear,
    Rule,
    Rules,
    dequantize,
    quantize,
    quantize_model,
    stored_bits,
)
from kashin_jax.errors import UsageError
from kashin_jax.layers import PackedKernel
from kashin_jax.pipeline import path_key, plan_model, replace_kernels, selected_kernels

KEY = jax.random.key(0)
TOKENS = jnp.arange(10).reshape(2, 5)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.up = nnx.Linear(16, 32, rngs=rngs)
        self.down = nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(x)
        return x + self.down(nnx.relu(self.up(self.norm(x))))


class Network(nnx.Module):
    """A language model of Flax's own layers, its head tied to the embedding."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(12, 16, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.lm_head = nnx.Linear(16, 12, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x), self.embed.attend(x)


@pytest.fixture(scope="module")
def original():
    return Network(nnx.Rngs(0))


@pytest.fixture
def network(original):
    return nnx.clone(original)


def kinds(model):
    """Method of every packed layer, by path: the type and width of what it holds."""
    found = {}
    for parts, node in nnx.iter_graph(model):
        if isinstance(node, QuantizedLinear | QuantizedEmbed):
            tensor = node.packed.kernel.get_value()
            name = type(tensor).__name__, tensor.layout.bits
            found["/".join(map(str, parts))] = name
    return found


def test_the_first_rule_that_matches_gives_the_method(network):
    rules = Rules(
        config=RTN(bits=4),
        rules=[
            Rule(r"blocks/0/up", None),
            Rule(r"/up$", RTN(bits=3)),
            Rule(r"blocks/1", NF4()),
        ],
        skip=["attention"],
    )
    result = quantize_model(network, key=KEY, rules=rules)
    assert kinds(result.model) == {
        "blocks/0/down": ("AffineTensor", 4),
        "blocks/1/down": ("CodebookTensor", 4),
        "blocks/1/up": ("AffineTensor", 3),
    }
    assert {p: r.config for p, r in result.reports.items()} == {
        "blocks/0/down": RTN(bits=4),
        "blocks/1/down": NF4(),
        "blocks/1/up": RTN(bits=3),
    }


def test_skips_add_to_those_there_are_by_default(network):
    rules = Rules(config=RTN(), skip=["blocks/0", "attention"])
    result = quantize_model(network, rules=rules)
    assert set(result.reports) == {"blocks/1/down", "blocks/1/up"}


def test_select_and_rules_must_both_agree(network):
    rules = Rules(config=RTN(), skip=["blocks/0"])
    result = quantize_model(network, rules=rules, select=lambda p: "up" in p)
    assert set(result.reports) == {"blocks/1/up"}


def test_a_rule_that_matches_nothing_is_an_error_that_names_it(network):
    with pytest.raises(UsageError, match=r"'decoder/fc1' matches none of 14 layers"):
        quantize_model(network, rules=Rules(rules=[Rule("decoder/fc1", RTN())]))
    network.extra = nnx.Conv(16, 16, kernel_size=(3,), rngs=nnx.Rngs(0))
    pattern = "which has to stay: convolves over 3 positions. Remove the rule, or name"
    with pytest.raises(UsageError, match=pattern):
        quantize_model(network, rules=Rules(rules=[Rule("extra", RTN())]))


def test_the_method_may_stand_beside_rules_but_only_once(network):
    rules = Rules(rules=[Rule("down", None)])
    result = quantize_model(network, RTN(bits=2), rules=rules)
    assert set(kinds(result.model).values()) == {("AffineTensor", 2)}
    with pytest.raises(UsageError, match="differ; give one"):
        quantize_model(network, RTN(), rules=Rules(config=NF4()))


def test_rules_that_leave_everything_are_an_error(network):
    with pytest.raises(UsageError, match="Of 13 layers the rules quantize none"):
        quantize_model(network, rules=Rules(skip=[""]))


def test_heads_and_embeddings_are_packed_when_a_rule_names_them(network):
    rules = Rules(config=RTN(), rules=[Rule("embed|lm_head", RTN(bits=8))])
    result = quantize_model(network, key=KEY, rules=rules)
    assert isinstance(result.model.embed, QuantizedEmbed)
    assert isinstance(result.model.lm_head, QuantizedLinear)
    kernel = dequantize(result.model.lm_head.kernel.get_value())
    dense = replace_kernels(network, {
        path: dequantize(node.kernel.get_value())
        for path, node in (
            ("/".join(map(str, parts)), node)
            for parts, node in nnx.iter_graph(result.model)
            if isinstance(node, QuantizedLinear)
        )
    })  # fmt: skip
    np.testing.assert_array_equal(dense.lm_head.kernel.get_value(), kernel)
    dense.embed = nnx.clone(dense.embed)
    dense.embed.embedding.set_value(result.model.embed.embedding)
    run = nnx.jit(lambda model, tokens: model(tokens))
    found, expected = run(result.model, TOKENS), run(dense, TOKENS)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)
    assert type(quantize_model(network, RTN()).model.embed) is nnx.Embed


def test_a_method_that_cannot_code_a_layer_is_an_error_before_any_work(network):
    rules = Rules(
        config=RTN(),
        rules=[Rule("blocks/1/up", GreedyKashin(block_shape=(7, 7)))],
    )
    seen = []
    with pytest.raises(UsageError, match=r"`blocks/1/up`: A matrix of shape \(16, 32"):
        quantize_model(network, rules=rules, select=lambda p: seen.append(p) or True)
    assert "blocks/0/down" in seen and not kinds(network)


def own_product(*args, **kwargs):
    return jax.lax.dot_general(*args, **kwargs)


def test_layers_that_cannot_be_packed_stay_and_say_why(network):
    """One of them was an error of the whole call, and of all calls after it."""
    network.odd = nnx.Linear(16, 16, dot_general=own_product, rngs=nnx.Rngs(0))
    network.held = nnx.data((nnx.Linear(16, 16, rngs=nnx.Rngs(1)),))
    inner = nnx.Linear(16, 16, rngs=nnx.Rngs(2))
    network.normed = nnx.WeightNorm(inner, rngs=nnx.Rngs(3))
    result = quantize_model(network, RTN())
    assert type(result.model.odd) is nnx.Linear
    # It normalises the kernel in place at every call, which no codes allow.
    assert result.model.normed(jnp.ones((2, 16))).shape == (2, 16)
    assert type(result.model.held[0]) is nnx.Linear
    assert len(result.reports) == 4 + 8
    reasons = {
        each.choice.path: each.choice.reason
        for each in plan_model(network, RTN()).layers
    }
    assert "function of its own" in reasons["odd"]
    assert reasons["held/0"].startswith("held by a tuple, which cannot be changed")
    assert "nnx.WeightNorm" in reasons["normed/layer_instance"]


def tie(network):
    network.blocks[1].up.kernel = network.blocks[0].up.kernel
    return network


def test_linears_that_share_a_kernel_are_quantized_once_and_share_it(network):
    tie(network)
    seen = []

    def layer(path, kernel):
        seen.append(path)
        return quantize(kernel, RTN(), path_key(KEY, path))

    result = quantize_model(network, key=KEY, quantize_layer=layer, select=is_block)
    assert seen == ["blocks/0/down", "blocks/0/up", "blocks/1/down"]
    assert list(result.reports) == seen == list(selected_kernels(network, is_block))
    first, second = (block.up for block in result.model.blocks)
    assert first is not second and first.kernel is second.kernel
    assert first.bias is network.blocks[0].up.bias is not second.bias
    stored = nnx.state(result.model, PackedKernel)
    assert stored_bits(stored) == sum(r.stored_bits for r in result.reports.values())


def is_block(path):
    return path.startswith("blocks") and "attention" not in path


def test_what_shares_a_kernel_stays_with_what_has_to_stay(network):
    tie(network)
    rules = Rules(config=RTN(), skip=["blocks/1/up"])
    result = quantize_model(network, rules=rules)
    ups = [block.up for block in result.model.blocks]
    assert [type(up) for up in ups] == [nnx.Linear] * 2
    assert ups[0].kernel is ups[1].kernel
    plan = plan_model(network, rules=rules)
    reasons = {each.choice.path: each.choice.reason for each in plan.layers}
    assert reasons["blocks/0/up"] == "tied to blocks/1/up"


def test_two_methods_for_one_kernel_are_an_error(network):
    tie(network)
    rules = Rules(config=RTN(), rules=[Rule("blocks/1/up", NF4())])
    with pytest.raises(UsageError, match="`blocks/0/up` and `blocks/1/up` share one"):
        quantize_model(network, rules=rules)


def test_an_embedding_whose_table_is_a_kernel_too_stays_tied(network):
    network.blocks[0].one_hot = nnx.Linear(12, 16, use_bias=False, rngs=nnx.Rngs(0))
    network.blocks[0].one_hot.kernel = network.embed.embedding
    plain = quantize_model(network, RTN()).model
    assert plain.blocks[0].one_hot.kernel is plain.embed.embedding
    rules = Rules(config=RTN(), rules=[Rule("embed|one_hot", RTN(bits=6))])
    packed = quantize_model(network, rules=rules).model
    assert packed.blocks[0].one_hot.kernel is packed.embed.table
    np.testing.assert_allclose(
        packed.blocks[0].one_hot(jnp.eye(12)), packed.embed.embedding, rtol=1e-6
    )


def test_a_table_that_something_else_reads_stays(network):
    class Head(nnx.Module):
        def __init__(self, table):
            self.table = table

    network.head = Head(network.embed.embedding)
    rules = Rules(config=RTN(), rules=[Rule("blocks/0/up|embed", RTN())])
    result = quantize_model(network, rules=rules)
    assert type(result.model.embed) is nnx.Embed
    assert result.model.head.table is result.model.embed.embedding
    plan = plan_model(network, rules=rules)
    assert {e.choice.path: e.choice.reason for e in plan.layers}["embed"] == (
        "tied to head/table"
    )


def test_a_dry_run_prints_the_plan_and_quantizes_nothing(network, capsys):
    rules = Rules(config=JointKashin(bits=2.5), rules=[Rule("down", NF4(group_size=8))])
    network.extra = nnx.Conv(16, 16, kernel_size=(3,), rngs=nnx.Rngs(0))
    before = len(jax.live_arrays())
    result = quantize_model(network, rules=rules, dry_run=True)
    assert result.model is network and result.reports == {}
    assert len(jax.live_arrays()) <= before + 1
    plan = plan_model(network, rules=rules)
    lines = capsys.readouterr().out.splitlines()
    assert "\n".join(lines) == str(plan)
    assert lines[0].split() == [
        "layer", "shape", "method", "bits/weight", "bytes", "before", "after",
    ]  # fmt: skip
    table = [line for line in lines if not line.startswith(("Quantized", "Largest"))]
    assert len({len(line) for line in table}) == 1 and len(table) == len(lines) - 2
    assert result.coverage == plan.coverage and 0 < plan.coverage.inner < 1
    line = next(line for line in lines if line.startswith("blocks/1/up"))
    assert line.split()[1:6] == ["16", "x", "32", "kashin-joint", "2.5"]
    query = next(line for line in lines if "attention/query" in line)
    assert "16 x 16 of 16 x 2 x 8 " in query and "kashin-joint 2.5" in query
    assert "stays: convolves over 3" in next(x for x in lines if x.startswith("extra"))
    assert "stays: no rule names it" in next(x for x in lines if x.startswith("embed"))


def test_the_plan_says_what_will_be_stored(network):
    rules = Rules(
        config=JointKashin(bits=2, effort="fast"),
        rules=[Rule("down", NF4(group_size=8)), Rule("embed", RTN())],
    )
    plan = plan_model(network, rules=rules)
    result = quantize_model(network, rules=rules)
    assert {e.choice.path: e.stored_bits for e in plan.quantized} == {
        path: report.stored_bits for path, report in result.reports.items()
    }
    params = jax.tree.leaves(nnx.state(network, nnx.Param))
    assert plan.bytes_before == sum(leaf.nbytes for leaf in params)
    kept = jax.tree.leaves(nnx.state(result.model, nnx.Param))
    stored = stored_bits(nnx.state(result.model, PackedKernel)) // 8
    assert plan.bytes_after == sum(leaf.nbytes for leaf in kept) + stored


def test_a_model_without_arrays_can_be_planned_for(network):
    abstract = nnx.eval_shape(lambda: Network(nnx.Rngs(0)))
    assert str(plan_model(abstract, RTN())) == str(plan_model(network, RTN()))


class Own(nnx.Module):
    """Multiplies by an array of its own, as many attentions do."""

    def __init__(self, rngs):
        self.w = nnx.Param(jnp.ones((4, 16, 8)))
        self.einsum = nnx.Einsum("bi,io->bio", (16, 16), rngs=rngs)
        self.small = nnx.Linear(8, 8, rngs=rngs)
        self.lm_head = nnx.Linear(16, 64, rngs=rngs)


def test_what_stays_dense_is_returned_and_warned_of(caplog):
    """Attention made of einsums stayed dense without a word."""
    result = quantize_model(Own(nnx.Rngs(0)), RTN())
    assert list(result.reports) == ["small"]
    model, _ = result
    assert model is result.model
    coverage = result.coverage
    assert [part.name for part in coverage.left] == ["lm_head", "w", "einsum"]
    inner = 8 * 8 + 4 * 16 * 8 + 16 * 16
    assert coverage.inner == 8 * 8 / inner
    biases = 8 + 64
    assert coverage.weights == 8 * 8 / (inner + 16 * 64 + biases)
    (record,) = caplog.records
    assert "w [4 x 16 x 8]: in a Own; einsum [16 x 16]: multiplies" in record.message
    assert "lm_head" not in record.message
    caplog.clear()
    assert quantize_model(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), RTN()).coverage.inner == 1
    assert not caplog.records
