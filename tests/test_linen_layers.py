"""Linen layers whose kernels have more axes than a matrix: packed, and run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import serialization

from kashin_jax import (
    RTN,
    Rule,
    Rules,
    dequantize,
    dequantize_params,
    quantize_params,
)
from kashin_jax.errors import UsageError
from kashin_jax.layers import packed_dense
from kashin_jax.pipeline import plan_params
from kashin_jax.tensors import AffineTensor, PackedArray

KEY = jax.random.key(0)
RULES = Rules(config=RTN())


class Own(nn.Module):
    """Reads a matrix itself: it can be packed, but nothing runs it so."""

    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.normal(), (16, 16))


class Inner(nn.Module):
    """Compiled by the model: JAX does not trace it twice."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(16, name="dense")(x)


class Network(nn.Module):
    """Every kind of layer whose kernel can be read as a matrix, in a chain."""

    @nn.compact
    def __call__(self, x, decode=False):
        attention = nn.MultiHeadDotProductAttention(4, name="attention", decode=decode)
        x = attention(x)
        x = nn.DenseGeneral((2, 8), name="split")(x)
        x = jnp.moveaxis(x, 2, 0)
        x = nn.DenseGeneral(8, batch_dims=(0,), name="heads")(x)
        x = nn.Einsum((2, 8, 16), "nbth,nhd->btd", name="join")(x)
        x = nn.Einsum((16, 16), "...d,vd->...v", name="turn")(x)
        x = nn.Conv(16, (1,), strides=2, name="conv")(x)
        x = nn.Conv(16, (3,), name="wide")(x)
        return Own(name="own")(nn.jit(Inner)(name="inner")(x))


X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 16)), jnp.float32)
SHAPES = {
    "attention/key": (16, 16),
    "attention/out": (16, 16),
    "attention/query": (16, 16),
    "attention/value": (16, 16),
    "conv": (16, 16),
    "heads": (2, 8, 8),
    "inner/dense": (16, 16),
    "join": (16, 16),
    "split": (16, 16),
    "turn": (16, 16),
}


def call(params):
    return Network().apply(params, X)


@jax.jit
def run(params):
    with nn.intercept_methods(packed_dense):
        return call(params)


@pytest.fixture(scope="module")
def params():
    drawn = jax.jit(Network().init)(KEY, X)
    # Biases start as zeros, which tell nothing.
    return jax.tree.map(lambda leaf: leaf + 0.1 * (leaf.ndim == 1), drawn)


@pytest.fixture(scope="module")
def result(params):
    return quantize_params(params, RTN(), KEY, call=call)


def assert_close(found, expected, tolerance=1e-5):
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    error = np.linalg.norm(np.asarray(found) - np.asarray(expected))
    assert error <= tolerance * np.linalg.norm(expected)


def test_what_is_packed_runs_and_what_would_not_run_stays(params, result):
    assert {p: report.shape for p, report in result.reports.items()} == SHAPES
    left = {part.name: part.reason for part in result.coverage.left}
    assert left == {
        "wide": "convolves over 3 positions",
        "own": "is of a kind of its own, Own",
    }
    dense = dequantize_params(result.params)
    assert jax.tree.map(jnp.shape, dense) == jax.tree.map(jnp.shape, params)
    assert_close(run(result.params), run(dense))
    assert np.linalg.norm(run(dense) - run(params)) > 0


def test_a_kernel_that_is_no_matrix_keeps_its_axes_beside_its_codes(params, result):
    packed, before = result.params["params"], params["params"]
    assert isinstance(packed["heads"]["kernel"], AffineTensor)
    query = packed["attention"]["query"]["kernel"]
    assert isinstance(query, PackedArray) and query.tensor.shape == (16, 16)
    assert (query.shape, query.ndim, query.dtype) == ((16, 4, 4), 3, jnp.float32)
    error = query.decode() - before["attention"]["query"]["kernel"]
    assert 0 < jnp.max(jnp.abs(error)) < 0.1


def test_the_plan_needs_shapes_alone_and_says_how_kernels_are_read(params, result):
    shapes = jax.eval_shape(lambda: params)
    plan = plan_params(shapes, RTN(), call=call)
    assert plan.coverage == result.coverage
    lines = {line.split()[0]: line for line in str(plan).splitlines()}
    assert " 16 x 16 of 4 x 4 x 16 " in lines["attention/out"]


def test_attention_goes_on_decoding_with_its_cache(result):
    model = nn.MultiHeadDotProductAttention(4, decode=True)
    cache = model.init(KEY, X)["cache"]
    packed = result.params["params"]["attention"]

    @jax.jit
    def step(params, cache, x):
        with nn.intercept_methods(packed_dense):
            variables = {"params": params, "cache": cache}
            return model.apply(variables, x, mutable=["cache"])

    for params in (packed, dequantize_params(packed)):
        state, found = {"cache": cache}, []
        for i in range(2):
            y, state = step(params, state["cache"], X[:, i : i + 1])
            found.append(y)
        if params is packed:
            expected = found
    assert_close(jnp.stack(found), jnp.stack(expected))


def test_rules_name_the_inputs_where_no_call_is_given(params, result):
    rules = Rules(
        config=RTN(),
        rules=[
            Rule("attention/out|join", RTN(), contract=[1, 0]),
            Rule("attention|split", RTN(), contract=[0]),
            Rule("heads", RTN(), contract=[1], stack=[0]),
            Rule("turn", RTN(), contract=[1]),
            Rule("conv", RTN(), contract=[0, 1]),
            Rule("wide|own", None),
        ],
    )
    found = quantize_params(params, key=KEY, rules=rules)
    assert jax.tree.structure(found.params) == jax.tree.structure(result.params)
    for ours, theirs in zip(
        jax.tree.leaves(found.params), jax.tree.leaves(result.params), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(UsageError, match=r"`turn` sums over axes \[1\] of 2"):
        plan_params(
            params, rules=Rules(rules=[Rule("turn", RTN(), contract=[0])]), call=call
        )


def test_arrays_of_no_model_are_packed_where_a_rule_names_their_inputs():
    tree = {"block": {"w": jax.random.normal(KEY, (4, 16, 4)), "mean": jnp.ones(4)}}
    rules = Rules(config=RTN(), rules=[Rule("block/w", RTN(), contract=[1])])
    packed = quantize_params(tree, rules=rules).params
    leaf = packed["block"]["w"]
    assert leaf.tensor.shape == (16, 16) and leaf.shape == (4, 16, 4)
    dense = jax.jit(dequantize_params)(packed)["block"]["w"]
    columns = jnp.moveaxis(dense, 1, 0).reshape(16, 16)
    np.testing.assert_array_equal(columns, dequantize(leaf.tensor))
    with pytest.raises(UsageError, match="`block/w`, which has to stay: has 3 axes"):
        quantize_params(tree, rules=Rules(rules=[Rule("block/w", RTN())]))


def test_a_matrix_of_unknown_use_is_run_whichever_way_its_layer_reads_it(params):
    tree = {"params": {"turn": params["params"]["turn"]}}
    packed = quantize_params(tree, RTN()).params

    class Alone(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Einsum((16, 16), "...d,vd->...v", name="turn")(x)

    assert isinstance(packed["params"]["turn"]["kernel"], AffineTensor)
    with nn.intercept_methods(packed_dense):
        found = Alone().apply(packed, X)
    assert_close(found, Alone().apply(dequantize_params(packed), X))


def test_kernels_that_were_packed_along_other_axes_are_refused(params):
    rules = Rules(config=RTN(), rules=[Rule("split", RTN(), contract=[1])])
    packed = quantize_params(params, rules=rules, select=lambda p: p == "split").params
    with (
        nn.intercept_methods(packed_dense),
        pytest.raises(UsageError, match=r"`split` sums over axes \(0,\) of a kernel"),
    ):
        jax.eval_shape(call, packed)


HALF = {"dtype": jnp.bfloat16}


@pytest.mark.parametrize(
    "layer",
    [
        nn.DenseGeneral((2, 8), **HALF),
        nn.DenseGeneral((2, 8), param_dtype=jnp.float16, use_bias=False),
        nn.Einsum(
            (16, 2, 8), "...d,dnh->...nh", **HALF, preferred_element_type="float32"
        ),
        nn.Conv(16, 1, **HALF),
    ],
)
@jax.numpy_dtype_promotion("standard")  # biases of another type are added
def test_types_of_outputs_are_those_of_the_dense_layers(layer):
    def apply(params):
        return layer.apply(params, X.astype(jnp.float16))

    params = layer.init(KEY, X.astype(jnp.float16))
    packed = quantize_params(params, RTN(), call=apply).params
    with nn.intercept_methods(packed_dense):
        found = jax.eval_shape(apply, packed)
    expected = jax.eval_shape(apply, params)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.DenseGeneral((2, 8), name="up")(x)
        return nn.Einsum((8, 2, 16), "...nh,hnd->...d", name="down")(y), None


def test_stacks_under_scan_run_where_they_are_named():
    stack = nn.scan(
        Scanned, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )()
    tree = jax.jit(stack.init)(KEY, X, None)

    def scanned(params):
        return stack.apply(params, X, None)[0]

    plan = plan_params(tree, RTN(), stacks=["down"], call=scanned)
    reasons = {each.choice.path: each.choice.reason for each in plan.layers}
    assert reasons == {
        "down": None,
        "up": "is a stack of (16, 2, 8); name it by `stacks`",
    }
    packed = quantize_params(tree, RTN(), stacks=["up|down"], call=scanned).params

    @jax.jit
    def run(params):
        with nn.intercept_methods(packed_dense):
            return scanned(params)

    assert packed["params"]["up"]["kernel"].shape == (3, 16, 2, 8)
    assert_close(run(packed), run(dequantize_params(packed)))


def test_trees_are_written_and_read_by_flax(result):
    data = serialization.to_bytes(result.params)
    blank = jax.tree.map(jnp.zeros_like, result.params)
    found = serialization.from_bytes(blank, data)
    assert_close(run(found), run(result.params), 0)
