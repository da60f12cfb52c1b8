"""What Flax NNX, Python and Orbax do with any model, they do with a quantized one."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
from flax import nnx
from quantized_sources import method

from kashin_jax import Rule, Rules, quantize_model
from kashin_jax.layers import QuantizedEmbed, QuantizedLinear
from kashin_jax.models import OPTConfig, OPTForCausalLM
from kashin_jax.pipeline import SHARED_INPUTS

CONFIG = OPTConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=1, ffn_dim=64,
    num_attention_heads=2, max_position_embeddings=32,
)  # fmt: skip
IDS = jnp.arange(12).reshape(2, 6)
# One of every kind of packed tensor; a table; layers with one input, which share what
# the product does to it, and layers that do not.
JOINT = method("kashin-joint")
RULES = {
    "alone": Rules(config=JOINT, rules=[Rule("embed_tokens", JOINT)]),
    "shared": Rules(config=JOINT, share=SHARED_INPUTS),
    "controls": Rules(
        config=method("rtn"),
        rules=[Rule("fc1", method("nf4")), Rule("fc2", method("rotate-rtn"))],
    ),
}


def make(rules):
    model = OPTForCausalLM(CONFIG, rngs=nnx.Rngs(0))
    return quantize_model(model, rules=rules, key=jax.random.key(1)).model


@pytest.fixture(
    scope="module",
    params=[
        "shared",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("alone", "controls")),
    ],
)
def rules(request):
    return RULES[request.param]


@pytest.fixture(scope="module")
def model(rules):
    return make(rules)


@nnx.jit
def logits(model):
    return model(IDS)


def packed(model):
    kinds = QuantizedLinear, QuantizedEmbed
    return {p: n for p, n in nnx.iter_graph(model) if isinstance(n, kinds)}


def assert_equal(found, expected):
    """The same outputs, leaves bit by bit, and variables shared by the same layers."""
    np.testing.assert_array_equal(logits(found), logits(expected))
    ours, theirs = nnx.state(found), nnx.state(expected)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert sharing(found) == sharing(expected)


def sharing(model):
    """For every layer the first one that has the same input side."""
    sides, found = {}, {}
    for path, layer in packed(model).items():
        if layer.inputs is not None:
            found[path] = sides.setdefault(id(layer.inputs), path)
    return found


def test_shapes_are_known_without_quantizing_anything(model):
    # `eval_shape` of a copy: what there is becomes shapes, in the same structure.
    abstract = nnx.eval_shape(lambda: nnx.clone(model))
    assert packed(abstract).keys() == packed(model).keys()
    shapes, values = nnx.state(abstract), nnx.state(model)
    assert jax.tree.structure(shapes) == jax.tree.structure(values)
    for a, b in zip(jax.tree.leaves(shapes), jax.tree.leaves(values), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert isinstance(a, jax.ShapeDtypeStruct)
    graphdef, _ = nnx.split(abstract)
    assert_equal(nnx.merge(graphdef, values), model)


def test_quantizing_has_its_shapes_without_being_done(model, rules):
    # So a program that restores makes its target; it failed at the first value.
    abstract = nnx.eval_shape(lambda: make(rules))
    shapes, values = nnx.state(abstract), nnx.state(model)
    assert jax.tree.structure(shapes) == jax.tree.structure(values)
    for a, b in zip(jax.tree.leaves(shapes), jax.tree.leaves(values), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert sharing(abstract) == sharing(model)
    assert_equal(nnx.merge(nnx.split(abstract)[0], values), model)


def test_a_call_has_its_shape_without_being_run(model):
    found = nnx.eval_shape(lambda m: m(IDS), model)
    assert (found.shape, found.dtype) == ((2, 6, 64), jnp.float32)


def test_a_model_is_split_and_merged(model):
    assert_equal(nnx.merge(*nnx.split(model)), model)
    assert_equal(nnx.clone(model), model)
    graphdef, kernels, rest = nnx.split(model, nnx.Param, ...)
    assert_equal(nnx.merge(graphdef, kernels, rest), model)
    hash(graphdef)


def test_a_model_is_copied(model):
    found = copy.deepcopy(model)
    assert_equal(found, model)
    ours = {id(v) for _, v in nnx.iter_graph(found) if isinstance(v, nnx.Variable)}
    theirs = {id(v) for _, v in nnx.iter_graph(model) if isinstance(v, nnx.Variable)}
    assert ours and not ours & theirs


def test_a_model_is_pickled(model):
    assert_equal(pickle.loads(pickle.dumps(model)), model)


def test_a_packed_layer_is_copied_and_pickled(model):
    for layer in packed(model).values():
        variable = layer.kernel if hasattr(layer, "kernel") else layer.table
        tensor = variable.get_value()
        for found in (copy.copy(tensor), copy.deepcopy(tensor),
                      pickle.loads(pickle.dumps(tensor))):  # fmt: skip
            assert type(found) is type(tensor) and found.layout == tensor.layout
            for a, b in zip(
                jax.tree.leaves(found), jax.tree.leaves(tensor), strict=True
            ):
                np.testing.assert_array_equal(a, b)


def test_a_model_comes_back_from_orbax(model, tmp_path):
    graphdef, state = nnx.split(model)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        target = jax.tree.map(orbax.checkpoint.utils.to_shape_dtype_struct, state)
        restored = checkpointer.restore(tmp_path / "state", target)
    assert_equal(nnx.merge(graphdef, restored), model)


def test_a_model_comes_back_from_orbax_into_one_that_was_made_anew(tmp_path):
    # Another process has no model: it makes one of shapes, and quantizes nothing.
    model = make(RULES["shared"])
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(model))
        checkpointer.wait_until_finished()
        other = nnx.eval_shape(lambda: make(RULES["shared"]))
        graphdef, abstract = nnx.split(other)
        restored = checkpointer.restore(tmp_path / "state", abstract)
    assert_equal(nnx.merge(graphdef, restored), model)
