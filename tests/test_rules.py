"""Rules: which layers are quantized and how, and the same as JSON."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kashin_jax import NF4, RTN, BasisSpec, GreedyKashin, JointKashin, Rotated
from kashin_jax.errors import UsageError
from kashin_jax.methods import config_from_json, config_to_json, method_names
from kashin_jax.pipeline import (
    SHARED_INPUTS,
    Rule,
    Rules,
    rules_from_json,
    rules_to_json,
)
from kashin_jax.pipeline.plan import Candidate, choose_methods

PATHS = (
    "decoder/embed_tokens",
    "decoder/layers/0/fc1",
    "decoder/layers/0/self_attn/q_proj",
    "decoder/layers/1/fc1",
    "decoder/layers/10/fc1",
    "lm_head",
)


def chosen(rules):
    return {path: rules.config_for(path) for path in PATHS}


def test_without_rules_everything_but_heads_and_embeddings_has_the_one_method():
    kept = {path for path, config in chosen(Rules()).items() if config is None}
    assert kept == {"decoder/embed_tokens", "lm_head"}
    assert Rules().config_for(PATHS[1]) == JointKashin()


@pytest.mark.parametrize(
    "path",
    [
        "model/embed_tokens",
        "transformer/wte",
        "bert/embeddings/word_embeddings",
        "classifier/dense",
        "layers/0/input_layernorm",
        "layers/0/self_attn_layer_norm",
        "h/0/ln_1",
        "ln_f",
        "blocks/3/norm",
        "gpt_neox/embed_in",
        "embed_out",
        "word_embeddings",
        "cls/predictions/decoder",
        "decoder",
        "head/dense",
        "proj_out",
        "v_head/summary",
        "score",
        "multiple_choice_head/summary",
        "predict_action/0",
        "transformer/output_layer",
        "embed_timestep",
        "encoder/wpe",
        "decoder/block/0/layer/0/SelfAttention/relative_attention_bias",
        "deberta/encoder/rel_embeddings",
        "layers/0/mlp/gate",
        "layers/0/mlp/router",
        "layers/0/block_sparse_moe/gate",
        "layers/0/mlp/shared_expert_gate",
        "layers/0/ffn/router/layer",
    ],
)
def test_heads_embeddings_norms_and_routers_stay(path):
    assert Rules().config_for(path) is None


@pytest.mark.parametrize(
    "path",
    [
        "decoder/project_in",
        "layers/0/normalizer_mlp",
        "h/0/plnar",
        "scores_mlp",
        "layers/0/mlp/gate_proj",
        "layers/0/mlp/gate_up_proj",
        "layers/0/mlp/experts/0/w1",
        "layers/0/mlp/shared_experts/up_proj",
        "decoder/layers/0/fc1",
        "blocks/0/attn/proj_out",
        "encoder/layer/0/output/dense",
        "cls/predictions/transform/dense",
    ],
)
def test_names_that_only_resemble_them_do_not(path):
    assert Rules().config_for(path) is not None


def test_the_first_rule_that_matches_decides():
    rules = Rules(
        config=JointKashin(bits=3),
        rules=(
            Rule(r"layers/1/", RTN(bits=8)),
            Rule(r"fc1$", NF4()),
            Rule(r"q_proj", None),
        ),
    )
    found = chosen(rules)
    assert found["decoder/layers/1/fc1"] == RTN(bits=8)
    assert found["decoder/layers/10/fc1"] == NF4()
    assert found["decoder/layers/0/self_attn/q_proj"] is None
    rules.check(PATHS)


def test_a_rule_may_name_what_is_skipped_by_default_and_skip_beats_it():
    head = Rule("lm_head", NF4())
    assert Rules(rules=(head,)).config_for("lm_head") == NF4()
    both = Rules(rules=(head,), skip=("lm_head",))
    assert both.config_for("lm_head") is None
    # Skips are added to the default ones, which stay.
    assert Rules(skip=("fc1",)).config_for("decoder/embed_tokens") is None


@pytest.mark.parametrize(
    "rules", [Rules(rules=(Rule("fc3", None),)), Rules(skip=("fc3",))]
)
def test_a_pattern_that_matches_nothing_is_an_error(rules):
    with pytest.raises(UsageError, match=r"'fc3' matches none of 6 layers"):
        rules.check(PATHS)


@pytest.mark.parametrize(
    "make",
    [lambda: Rule("(", None), lambda: Rules(skip=("[",)), lambda: Rules(share=("[",))],
)
def test_a_pattern_that_is_no_expression_is_an_early_error(make):
    with pytest.raises(UsageError, match="no regular expression"):
        make()


@pytest.mark.parametrize("method", method_names())
def test_every_method_survives_json(method):
    config = config_from_json({"method": method})
    written = json.loads(json.dumps(config_to_json(config)))
    assert written["method"] == method
    assert config_from_json(written) == config


@given(
    st.sampled_from([2, 2.5, 3, 3.5, 4, 4.5, 5]),
    st.sampled_from(["fast", "default", "max"]),
    st.floats(0, 1),
    st.none() | st.tuples(st.integers(1, 99), st.integers(1, 99)),
)
def test_fields_survive_json(bits, effort, balance, block_shape):
    config = JointKashin(
        bits=bits,
        effort=effort,
        balance=balance,
        block_shape=block_shape,
        basis=BasisSpec("haar", "dct"),
    )
    rules = Rules(config=config, rules=(Rule("a", None), Rule("b", NF4())))
    written = json.loads(json.dumps(rules_to_json(rules)))
    assert rules_from_json(written) == rules


@pytest.mark.parametrize(
    ("config", "other"),
    [
        (RTN(bits=4, act_order=True), RTN(bits=8)),
        (JointKashin(block_height=32), JointKashin(bits=3)),
        (Rotated(RTN(bits=4, act_order=True)), Rotated(RTN(bits=8))),
    ],
)
def test_a_rule_of_the_same_method_keeps_what_is_left_out_by_itself(config, other):
    """Guards fields not written at their usual value: else the default's is read."""
    rules = Rules(config=config, rules=[Rule("a", other), Rule("b", config)])
    written = json.loads(json.dumps(rules_to_json(rules)))
    found = rules_from_json(written)
    assert [rule.config for rule in found.rules] == [other, config]


def test_layers_to_share_survive_json_and_rules_without_are_written_as_before():
    rules = Rules(share=(r"[qkv]_proj$", *SHARED_INPUTS))
    written = json.loads(json.dumps(rules_to_json(rules)))
    assert rules_from_json(written) == rules
    assert rules_to_json(Rules()).keys() == {"config", "rules", "skip"}


def test_axes_survive_json_and_rules_without_are_written_as_before():
    rules = Rules(
        rules=(
            Rule("a", RTN(), contract=[0, -1], stack=(1,)),
            Rule("b", NF4(), contract=(1,)),
        )
    )
    assert hash(rules) == hash(dataclasses.replace(rules))
    written = json.loads(json.dumps(rules_to_json(rules)))
    assert rules_from_json(written) == rules
    assert written["rules"][0]["contract"] == [0, -1]
    (plain,) = rules_to_json(Rules(rules=[Rule("a", RTN())]))["rules"]
    assert plain.keys() == {"pattern", "method", "bits", "group_size"}


def test_axes_of_what_is_known_are_refused():
    candidates = [Candidate(("fc1",), (16, 16), "float32", stored_name="fc1.weight")]
    rules = Rules(rules=[Rule("fc1", RTN(), contract=[0])])
    with pytest.raises(UsageError, match="'fc1' has a `contract`, and which axes"):
        choose_methods(candidates, None, rules, None, what="layers")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("decoder/layers/0/self_attn/q_proj", "decoder/layers/0/self_attn/"),
        ("q_proj", ""),
        ("layers/1/mlp/gate_proj", "layers/1/mlp/"),
        ("encoder/layers/2/attention/query", "encoder/layers/2/attention/"),
        ("block/0/layer/1/DenseReluDense/wi_1", "block/0/layer/1/DenseReluDense/"),
        ("layers/0/self_attn/out_proj", None),
        ("layers/0/seq_proj", None),
        ("layers/0/mlp/down_proj", None),
    ],
)
def test_usual_names_of_layers_that_read_one_input_are_known(path, name):
    found = Rules(share=SHARED_INPUTS).shared_name(path)
    assert (found and found[1]) == name


def test_paths_that_different_patterns_make_equal_do_not_share():
    rules = Rules(share=SHARED_INPUTS)
    assert rules.shared_name("a/q_proj") == rules.shared_name("a/k_proj")
    assert rules.shared_name("a/q_proj") != rules.shared_name("a/up_proj")


@pytest.mark.parametrize(
    ("share", "named"),
    [
        (("fc3",), r"'fc3' matches none of 6 layers"),
        (("fc1",), r"'fc1' makes no two of 6 layers share"),
        ((r"layers/\d+/", "0/f.1"), "f.1.*makes no two"),
        (SHARED_INPUTS, r"gate.*makes no two of 6 layers"),
    ],
)
def test_a_pattern_by_which_nothing_is_shared_is_an_error(share, named):
    with pytest.raises(UsageError, match=named):
        Rules(share=share).check(PATHS)
    Rules(share=(r"layers/\d+/",)).check(PATHS)


def test_a_rule_takes_from_the_default_what_it_does_not_say():
    default = GreedyKashin(bits=4, max_steps=50)
    rules = rules_from_json(
        [
            {"pattern": "a", "bits": 3},
            {"pattern": "b", "method": "rtn", "group_size": 32},
            {"pattern": "c", "skip": True},
        ],
        default,
    )
    assert rules.config == default
    assert rules.rules[0].config == dataclasses.replace(default, bits=3)
    assert rules.rules[1].config == RTN(group_size=32)
    assert rules.rules[2].config is None


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("fc1", "str"),
        ({"rule": []}, "rule"),
        ([{"bits": 3}], "pattern"),
        ([{"pattern": 3}], "pattern"),
        ([["fc1"]], "rules"),
        ({"skip": "fc1"}, "skip"),
        ({"skip": [1]}, "skip"),
        ({"share": "fc1"}, "share"),
        ({"share": [1]}, "share"),
        ({"share": ["("]}, r"\("),
        ({"config": []}, "config"),
        ([{"pattern": "a", "skip": False}], "skip"),
        ([{"pattern": "a", "skip": True, "bits": 3}], "skip"),
        ([{"pattern": "a", "method": "gptq"}], "gptq"),
        ([{"pattern": "a", "method": ["rtn"]}], "rtn"),
        ([{"pattern": "a", "width": 3}], "width"),
        ([{"pattern": "a", "bits": 17}], "bits"),
        ([{"pattern": "a", "bits": "3"}], "bits"),
        ([{"pattern": "a", "bits": True}], "bits"),
        ([{"pattern": "a", "bits": float("nan")}], "bits"),
        ([{"pattern": "a", "basis": "fourier"}], "fourier"),
        ([{"pattern": "a", "basis": 3}], "basis"),
        ([{"pattern": "a", "block_shape": [1]}], "block_shape"),
        ([{"pattern": "a", "block_shape": [8, -8]}], "block_shape"),
        ([{"pattern": "a", "effort": "all"}], "effort"),
        ([{"pattern": "a(", "bits": 3}], r"a\("),
        ([{"pattern": "a", "contract": []}], "contract"),
        ([{"pattern": "a", "contract": 0}], "contract"),
        ([{"pattern": "a", "contract": [0.5]}], "contract"),
        ([{"pattern": "a", "contract": [True]}], "contract"),
        ([{"pattern": "a", "contract": [0], "stack": ["1"]}], "stack"),
        ([{"pattern": "a", "stack": [0]}], "contract"),
        ([{"pattern": "a", "contract": [0], "skip": True}], "skip"),
    ],
)
def test_rules_that_cannot_work_are_named(content, named):
    with pytest.raises(UsageError, match=named):
        rules_from_json(content)
