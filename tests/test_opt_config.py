"""OPT's configuration: what Hugging Face publishes is read, the rest refused."""

import json

import jax
import pytest
from flax import nnx

from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.models.opt import OPTConfig, OPTForCausalLM

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "ffn_dim": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        # Sizes of Zhang et al. (2022), table 1; counts as Hugging Face reports them.
        ((768, 12, 12, {}), 125_239_296),
        (
            (1024, 24, 16, {"do_layer_norm_before": False, "word_embed_proj_dim": 512}),
            331_196_416,
        ),
        ((2048, 24, 32, {}), 1_315_758_080),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(changes, parameters):
    width, layers, heads, other = changes
    config = OPTConfig.from_dict(
        {
            "model_type": "opt",
            "vocab_size": 50272,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "ffn_dim": 4 * width,
            "num_attention_heads": heads,
            "max_position_embeddings": 2048,
            "torch_dtype": "float16",
        }
        | other,
        "config.json",
    )
    shapes = nnx.eval_shape(lambda: OPTForCausalLM(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(shapes))
    assert sum(leaf.size for leaf in leaves) == parameters


@pytest.mark.parametrize("field", SIZES)
def test_a_config_without_a_size_names_the_field(field):
    content = {"model_type": "opt"} | SIZES
    del content[field]
    with pytest.raises(CheckpointError, match=f"here.json: field `{field}` is missing"):
        OPTConfig.from_dict(content, "here.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "`model_type` is 'llama'"),
        ({"activation_function": "quick_gelu"}, "'quick_gelu' is not supported"),
        ({"hidden_size": "32"}, "field `hidden_size` is '32'; expected int"),
        ({"hidden_size": True}, "field `hidden_size` is True; expected int"),
        ({"enable_bias": 1}, "field `enable_bias` is 1; expected bool"),
        ({"num_attention_heads": 5}, "`num_attention_heads`=5 must divide"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` must be at least 1"),
        ({"dropout": 1.5}, r"`dropout` must lie in \[0, 1\)"),
        ({"eos_token_id": [2, "5"]}, "field `eos_token_id` is '5'; expected int"),
        ({"eos_token_id": True}, "field `eos_token_id` is True; expected int"),
        ({"hidden_size": None}, "field `hidden_size` is None; expected int"),
        ({"activation_function": None}, "`activation_function` is None; expected str"),
    ],
)
def test_a_config_that_cannot_work_is_refused_in_one_line(changes, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        OPTConfig.from_dict({"model_type": "opt"} | SIZES | changes, "here.json")
    assert str(caught.value).startswith("here.json: ")
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="activation_function"):
        OPTConfig(**SIZES, activation_function="tanh")


def test_a_config_survives_the_way_to_json_and_back():
    config = OPTConfig(
        **SIZES,
        remove_final_layer_norm=True,
        activation_function="gelu",
        dropout=0.0,
        pad_token_id=None,
        word_embed_proj_dim=16,
    )
    content = config.to_dict()
    assert content["_remove_final_layer_norm"] is True
    assert OPTConfig.from_dict(content, "memory") == config
    assert OPTConfig.from_dict(content | {"dropout": 0}, "memory") == config


@pytest.mark.parametrize(
    ("changes", "meant"),
    [
        # Lists and nulls, as transformers reads them, were refused.
        ({"eos_token_id": [2, 5]}, {"eos_token_id": (2, 5)}),
        ({"eos_token_id": []}, {"eos_token_id": ()}),
        ({"eos_token_id": None}, {"eos_token_id": None}),
        ({"dropout": None}, {"dropout": 0.0}),
        ({"attention_dropout": None}, {"attention_dropout": 0.0}),
        ({"tie_word_embeddings": None}, {"tie_word_embeddings": False}),
        ({"_remove_final_layer_norm": None}, {"remove_final_layer_norm": False}),
        ({"word_embed_proj_dim": None}, {"word_embed_proj_dim": None}),
    ],
)
def test_lists_and_nulls_are_read_as_transformers_reads_them(changes, meant):
    found = OPTConfig.from_dict({"model_type": "opt"} | SIZES | changes, "here.json")
    assert found == OPTConfig(**SIZES, **meant)
    again = json.loads(json.dumps(found.to_dict()))
    assert hash(OPTConfig.from_dict(again, "x")) == hash(
        OPTConfig.from_dict(again, "x")
    )
    assert OPTConfig.from_dict(again, "x").eos_token_id == found.eos_token_id
