"""`quantize_model` on NNX layers whose kernels have more axes than a matrix."""

import copy
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
from flax import nnx

from kashin_jax import RTN, JointKashin, QuantizedLinear, Rule, Rules, quantize_model
from kashin_jax.errors import NonFiniteError, UsageError
from kashin_jax.layers import PackedKernel, PackedParam, QuantizedEinsum
from kashin_jax.pipeline import plan_model, replace_kernels, selected_kernels
from kashin_jax.tensors import dequantize, stored_bits

KEY = jax.random.key(0)
JOINT = JointKashin(bits=4, effort="fast")


class Experts(nnx.Module):
    """A module of one's own, which reads its parameters itself."""

    def __init__(self, rngs):
        draw = nnx.initializers.normal()
        self.w = nnx.Param(draw(rngs.params(), (3, 8, 8)))
        self.tables = nnx.Dict(back=nnx.Param(draw(rngs.params(), (16, 8))))

    def __call__(self, x):
        y = jnp.einsum("bd,edf->bef", x, self.w[...])
        return y @ self.tables["back"].T


class Network(nnx.Module):
    """Every kind of layer whose kernel can be read as a matrix, in a chain."""

    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(4, 16, rngs=rngs)
        self.split = nnx.LinearGeneral(16, (2, 8), rngs=rngs)
        self.heads = nnx.LinearGeneral(8, 8, batch_axis={0: 2}, rngs=rngs)
        self.join = nnx.Einsum("...nh,nhd->...d", (2, 8, 16), (16,), rngs=rngs)
        self.turn = nnx.Einsum("btd,vd->btv", (16, 16), rngs=rngs)
        self.conv = nnx.Conv(16, 16, (1, 1), strides=(1, 2), rngs=rngs)
        self.wide = nnx.Conv(16, 16, (3,), rngs=rngs)
        self.experts = Experts(rngs)

    def __call__(self, x):
        x = x + self.attention(x, decode=False)
        heads = jnp.moveaxis(self.heads(jnp.moveaxis(self.split(x), 2, 0)), 0, 2)
        x = self.turn(self.join(heads))
        x = self.wide(self.conv(x[None])[0])
        return self.experts(x.reshape(-1, 8))


OWN = [
    Rule("experts/w", JOINT, contract=[1], stack=[0]),
    Rule("tables/back", RTN(), contract=(-2,)),
]
# One shape of joint coding: every other would be compiled for.
RULES = Rules(
    config=RTN(),
    rules=[*OWN, Rule("heads", JOINT), Rule("wide", RTN(), contract=[0, 1])],
)
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 16)), jnp.float32)
SHAPES = {
    "attention/key": (16, 16),
    "attention/out": (16, 16),
    "attention/query": (16, 16),
    "attention/value": (16, 16),
    "conv": (16, 16),
    "heads": (2, 8, 8),
    "join": (16, 16),
    "split": (16, 16),
    "turn": (16, 16),
    "wide": (48, 16),
    "experts/tables/back": (16, 8),
    "experts/w": (3, 8, 8),
}


@pytest.fixture(scope="module")
def original():
    model = Network(nnx.Rngs(0))
    for path, bias in nnx.to_flat_state(nnx.state(model)):
        if path[-1] == "bias":
            drawn = jax.random.normal(jax.random.fold_in(KEY, bias.size), bias.shape)
            bias.set_value(0.1 * drawn)
            nnx.update(model, nnx.from_flat_state({path: bias}))
    return model


@pytest.fixture(scope="module")
def result(original):
    return quantize_model(original, key=KEY, rules=RULES)


@nnx.jit
def run(model, x):
    return model(x)


def decoded(result):
    """The packed matrices by path, as they are decoded."""
    found = {}
    for path, node in nnx.iter_graph(result.model):
        name = "/".join(map(str, path))
        if isinstance(node, QuantizedLinear):
            found[name] = dequantize(node.kernel.get_value())
        elif isinstance(node, PackedParam):
            name = name.removesuffix("/kernel")
            found[name] = dequantize(node.array.tensor)
    return found


def assert_close(found, expected, tolerance=1e-5):
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    error = np.linalg.norm(np.asarray(found) - np.asarray(expected))
    assert error <= tolerance * np.linalg.norm(expected)


def test_every_layer_is_packed_as_a_matrix_and_computes_what_it_did(original, result):
    shapes = {path: report.shape for path, report in result.reports.items()}
    assert shapes == SHAPES
    assert result.coverage.inner == 1 and not result.coverage.left
    dense = replace_kernels(original, decoded(result), rules=RULES)
    assert dense.attention.query.kernel.shape == (16, 4, 4)
    assert_close(run(result.model, X), run(dense, X))
    assert np.linalg.norm(run(dense, X) - run(original, X)) > 0
    stored = stored_bits(nnx.state(result.model, PackedKernel))
    assert stored == sum(each.stored_bits for each in result.reports.values())


def test_a_matrix_is_the_kernel_with_its_inputs_first(original):
    kernels = selected_kernels(
        original, lambda path: path not in ("heads", "experts/w"), rules=RULES
    )
    assert kernels.keys() == SHAPES.keys() - {"heads", "experts/w"}
    query = original.attention.query.kernel[...]
    np.testing.assert_array_equal(kernels["attention/query"], query.reshape(16, 16))
    np.testing.assert_array_equal(kernels["turn"], original.turn.kernel[...].T)
    with pytest.raises(
        ValueError, match=r"`turn/kernel` has shape \(16, 16\); the new"
    ):
        replace_kernels(original, {"turn": jnp.ones((16, 8))})


def test_the_plan_has_the_shape_of_matrix_and_kernel(original, result):
    plan = plan_model(original, rules=RULES)
    lines = {line.split()[0]: line for line in str(plan).splitlines()}
    assert " 48 x 16 of 3 x 16 x 16 " in lines["wide"]
    assert " 3 x 8 x 8 " in lines["experts/w"] and " of " not in lines["experts/w"]
    assert plan.coverage == result.coverage
    assert {each.choice.path: each.stored_bits for each in plan.quantized} == {
        path: report.stored_bits for path, report in result.reports.items()
    }


def test_without_rules_modules_of_their_own_stay_and_say_why(original):
    left = {
        part.name: part.reason for part in plan_model(original, RTN()).coverage.left
    }
    assert left == {
        "wide": "convolves over 3 positions",
        "experts/w": "in a Experts",
        "experts/tables/back": "in a Dict",
    }


def test_attention_goes_on_decoding_with_its_cache(original, result):
    dense = replace_kernels(original, decoded(result), rules=RULES).attention
    packed = result.model.attention
    outputs = []
    for layer in (nnx.clone(packed), nnx.clone(dense)):
        layer.init_cache((2, 4, 16))
        step = nnx.jit(lambda layer, x: layer(x, decode=True))
        outputs.append(
            jnp.concatenate([step(layer, X[:, i : i + 1]) for i in range(3)], axis=1)
        )
        assert int(layer.cache_index[...]) == 3
    assert_close(*outputs)


def test_a_module_reads_a_packed_parameter_as_it_read_the_dense_one(result):
    param = result.model.experts.w
    assert isinstance(param, PackedParam) and not isinstance(param, nnx.Param)
    whole = dequantize(param.array.tensor)
    assert (param.shape, param.ndim, param.dtype) == ((3, 8, 8), 3, jnp.float32)
    np.testing.assert_array_equal(param[...], whole)
    np.testing.assert_array_equal(param[1], whole[1])
    np.testing.assert_array_equal(jnp.asarray(param), whole)
    np.testing.assert_array_equal(param + 1, whole + 1)
    assert param.bits_per_weight == result.reports["experts/w"].bits_per_weight
    back = result.model.experts.tables["back"]
    np.testing.assert_array_equal(back.T, dequantize(back.array.tensor).T)


def test_states_and_copies_keep_the_structure(result, tmp_path):
    model = result.model
    expected = run(model, X)
    graphdef, state = nnx.split(model)
    hash(graphdef)
    for found in (nnx.merge(graphdef, state), copy.deepcopy(model),
                  pickle.loads(pickle.dumps(model))):  # fmt: skip
        np.testing.assert_array_equal(run(found, X), expected)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        other = nnx.eval_shape(
            lambda: quantize_model(Network(nnx.Rngs(0)), key=KEY, rules=RULES).model
        )
        again, shapes = nnx.split(other)
        restored = checkpointer.restore(tmp_path / "state", shapes)
    np.testing.assert_array_equal(run(nnx.merge(again, restored), X), expected)


def test_gradients_reach_inputs_and_biases(original, result):
    def gradient(model):
        loss = lambda model, x: jnp.sum(jnp.square(model(x)))  # noqa: E731
        found, x = nnx.jit(nnx.grad(loss, argnums=(0, 1)))(model, X)
        flat = dict(nnx.to_flat_state(found))
        return x, {path: v[...] for path, v in flat.items() if path[-1] == "bias"}

    dense = replace_kernels(original, decoded(result), rules=RULES)
    chex.assert_trees_all_close(
        gradient(result.model), gradient(dense), rtol=1e-3, atol=1e-4
    )


def test_stacks_of_such_layers_are_scanned():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.LinearGeneral(16, (2, 8), rngs=rngs)
            self.down = nnx.Einsum("bnh,hnd->bd", (8, 2, 16), rngs=rngs)
            self.w = nnx.Param(0.1 * jax.random.normal(rngs.params(), (2, 8, 16)))

        def __call__(self, x):
            y = self.up(x)
            return self.down(y) + jnp.einsum("bnh,nhd->bd", y, self.w[...])

    blocks = nnx.vmap(Block)(nnx.Rngs(0).split(3))
    scan = nnx.scan(
        lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
    )
    # An axis of layers is a stack like any other.
    rules = Rules(config=RTN(), rules=[Rule("^w$", RTN(), contract=[1, 2], stack=[0])])
    result = quantize_model(blocks, rules=rules)
    shapes = {path: report.shape for path, report in result.reports.items()}
    assert shapes == dict.fromkeys(("down", "up", "w"), (3, 16, 16))
    dense = replace_kernels(blocks, decoded(result), rules=rules)
    assert_close(nnx.jit(scan)(X[0], result.model), nnx.jit(scan)(X[0], dense))


def test_an_einsum_takes_another_equation_of_the_same_axes_only(result):
    layer = result.model.join
    assert isinstance(layer, QuantizedEinsum)
    heads = X.reshape(2, 4, 2, 8)
    layer = QuantizedEinsum(layer.packed, contraction=layer.contraction)
    expected = jnp.moveaxis(layer(heads), 2, 0)
    assert_close(layer(heads, "abnh,nhd->dab"), expected)
    with pytest.raises(UsageError, match="reads the kernel otherwise than"):
        layer(X, "abd,nhd->abnh")


HALF = {"dtype": jnp.bfloat16}
WIDE = {**HALF, "preferred_element_type": jnp.float32}


@pytest.mark.parametrize(
    "options", [HALF, WIDE, {"param_dtype": jnp.float16}, {"use_bias": False, **HALF}]
)
@jax.numpy_dtype_promotion("standard")  # biases of another type are added
def test_types_of_outputs_are_those_of_the_dense_layers(options):
    rngs = nnx.Rngs(0)
    given = {k: v for k, v in options.items() if k != "use_bias"}
    bias = (2, 8) if options.get("use_bias", True) else None
    for layer in (
        nnx.LinearGeneral(16, (2, 8), **options, rngs=rngs),
        nnx.Einsum("...d,dnh->...nh", (16, 2, 8), bias, **given, rngs=rngs),
        nnx.Conv(16, 16, 1, **options, rngs=rngs),
    ):
        packed = nnx.eval_shape(
            lambda each: QuantizedLinear.from_linear(each, RTN()), layer
        )
        found, expected = (
            nnx.eval_shape(lambda each, x: each(x), each, X.astype(jnp.float16))
            for each in (packed, layer)
        )
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


LEFT = {
    "diagonal": ("bi,ii->bi", (8, 8), "takes a diagonal"),
    "ellipsis": ("bi,...->b...", (8, 8), "has a kernel of 2 axes"),
    "sum": ("bi,io->b", (8, 8), "sums over an axis of one operand alone"),
    "entries": ("bi,io->bio", (8, 8), "multiplies entry by entry"),
    "whole": ("bij,ij->b", (8, 8), "has a kernel without outputs"),
}


@pytest.mark.parametrize("name", LEFT)
def test_einsums_of_another_form_stay_and_say_why(name):
    equation, shape, why = LEFT[name]
    model = nnx.Dict(odd=nnx.Einsum(equation, shape, rngs=nnx.Rngs(0)))
    with pytest.raises(UsageError, match=rf"Not among them: odd \[8 x 8\]: {why}"):
        quantize_model(model, RTN())


def test_layers_run_under_vmap(result):
    model = result.model
    for layer, x in (
        (model.turn, jnp.stack([X, -X])),
        (model.heads, X.reshape(4, 2, 2, 8)),
    ):
        found = jax.jit(jax.vmap(layer))(x)
        assert_close(found, jnp.stack([layer(each) for each in x]))


def test_an_input_that_does_not_suit_is_an_error_with_both_shapes(result):
    model = result.model
    with pytest.raises(
        UsageError, match=r"shape \(16, 16\) and the equation btd,vd->btv"
    ):
        model.turn(X[0])
    with pytest.raises(
        UsageError, match=r"shape \(2, 8, 8\), which an input of shape \(8,"
    ):
        model.heads(X[0, 0, :8])
    with pytest.raises(
        UsageError, match=r"an input of shape \(2, 4, 16\) does not suit"
    ):
        model.heads(X)


@pytest.mark.parametrize(
    "options, why",
    [
        ({"feature_group_count": 2}, "in 2 groups"),
        ({"padding": 1}, "pads or dilates"),
        ({"padding": ((0, 0),), "input_dilation": 2}, "pads or dilates"),
        ({"mask": jnp.ones((1, 8, 8))}, "masks its kernel"),
    ],
)
def test_convolutions_of_another_form_stay_and_say_why(options, why):
    model = nnx.Dict(odd=nnx.Conv(8, 8, (1,), **options, rngs=nnx.Rngs(0)))
    with pytest.raises(UsageError, match=why):
        quantize_model(model, RTN())


def test_layers_that_share_a_kernel_but_read_it_differently_stay(original):
    model = nnx.Dict(
        one=nnx.Linear(16, 16, rngs=nnx.Rngs(0)), two=nnx.clone(original.turn)
    )
    model["two"].kernel = model["one"].kernel
    with pytest.raises(UsageError, match="read in different ways by one and two"):
        quantize_model(model, RTN())
    # Who decodes reads it in any way.
    rules = Rules(rules=[Rule("one|two", RTN(), contract=[0])])
    result = quantize_model(model, rules=rules)
    assert result.model["one"].kernel is result.model["two"].kernel
    assert result.model["two"](X).shape == (2, 4, 16)


@pytest.mark.parametrize(
    "rule, message",
    [
        (
            Rule("experts/w", RTN(), contract=[3]),
            "does not suit `experts/w`: there are 3",
        ),
        (Rule("experts/w", RTN(), contract=[0, -3]), "an axis is named twice"),
        (Rule("experts/w", RTN(), contract=[0, 1, 2]), "no axis is left for outputs"),
        (Rule("turn", RTN(), contract=[0]), r"`turn` sums over axes \[1\] of 2"),
    ],
)
def test_axes_that_cannot_be_are_named(original, rule, message):
    with pytest.raises(UsageError, match=message):
        plan_model(original, rules=Rules(rules=[rule]))


def test_an_own_parameter_that_a_rule_names_without_axes_is_an_error(original):
    message = (
        "in a Experts. Remove the rule, or name the axes of its inputs by `contract`"
    )
    with pytest.raises(UsageError, match=message):
        plan_model(original, rules=Rules(rules=[Rule("experts/w", RTN())]))


def test_a_damaged_parameter_is_named(original):
    model = nnx.clone(original)
    model.experts.w[...] = model.experts.w[...].at[2, 0, 0].set(jnp.nan)
    with pytest.raises(NonFiniteError, match=r"`experts/w\[2\]` holds 1 NaN"):
        quantize_model(model, rules=RULES, select=lambda path: path == "experts/w")
