"""Configurations of decoders: what Hugging Face reads in them, and bad input."""

import json

import numpy as np
import pytest
from decoders import make

from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.models.decoder_config import FAMILIES, DecoderConfig
from kashin_jax.models.gpt import GPTConfig
from kashin_jax.models.rope import Rope, frequencies

SIZES = {
    "vocab_size": 61, "hidden_size": 1024, "intermediate_size": 40,
    "num_hidden_layers": 8, "num_attention_heads": 32,
}  # fmt: skip
COMPARED = (
    "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "attention_bias",
    "mlp_bias", "num_key_value_heads", "head_dim", "attention_multiplier",
    "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
    "embedding_multiplier", "residual_multiplier", "logits_scaling", "pad_token_id",
    "bos_token_id", "eos_token_id",
)  # fmt: skip
LLAMA3 = {
    "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3",
}  # fmt: skip
# As they were published, with version 4 of transformers.
PUBLISHED = {
    "llama-3.2": {
        "model_type": "llama", "head_dim": 64, "num_key_value_heads": 2,
        "max_position_embeddings": 131_072, "rope_theta": 500_000.0,
        "rope_scaling": LLAMA3, "eos_token_id": [128_001, 128_008],
        "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "bos_token_id": 128_000,
    },
    "mistral-v0.3": {
        "model_type": "mistral", "sliding_window": None, "rope_theta": 1e6,
        "max_position_embeddings": 32_768, "num_key_value_heads": 2,
    },
    "qwen2.5-yarn": {
        "model_type": "qwen2", "use_sliding_window": False, "sliding_window": 131_072,
        "max_window_layers": 70, "num_key_value_heads": 2, "rope_theta": 1e6,
        "rope_scaling": {
            "factor": 4.0, "original_max_position_embeddings": 32_768, "type": "yarn",
        },
    },
    "gemma-3-1b": {
        "model_type": "gemma3_text", "sliding_window_pattern": 6, "rope_theta": 1e6,
        "sliding_window": 512, "rope_local_base_freq": 10_000, "rope_scaling": None,
        "attn_logit_softcapping": None, "final_logit_softcapping": None,
    },
    "gemma-3-4b": {
        "model_type": "gemma3_text", "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
    "phi-3-128k": {
        "model_type": "phi3", "max_position_embeddings": 131_072,
        "original_max_position_embeddings": 4096, "sliding_window": 262_144,
        "rope_scaling": {
            "long_factor": [2.0] * 16, "short_factor": [1] * 16, "type": "longrope",
        },
    },
}  # fmt: skip


def read(content, source="here.json"):
    return DecoderConfig.from_dict(content, source)


def assert_means_the_same(ours, theirs):
    """Fields, layers and ropes are those that transformers has."""
    for name in COMPARED:
        if hasattr(theirs, name):
            expected = getattr(theirs, name)
            expected = tuple(expected) if isinstance(expected, list) else expected
            assert getattr(ours, name) == expected, name
    assert ours.hidden_act == getattr(theirs, "hidden_activation", None) or (
        ours.hidden_act == theirs.hidden_act
    )
    types = getattr(theirs, "layer_types", None)
    if types is None:
        window = getattr(theirs, "sliding_window", None)
        types = ["full_attention" if window is None else "sliding_attention"] * 8
    assert ours.layer_types == tuple(types)
    if "sliding_attention" in types:
        assert ours.sliding_window == theirs.sliding_window
    ropes = theirs.rope_parameters
    if ours.local_rope is not None:
        assert_same_rope(ours.local_rope, ropes["sliding_attention"], ours)
        ropes = ropes["full_attention"]
    assert_same_rope(ours.rope, ropes, ours)


def assert_same_rope(ours, theirs, config):
    """By the numbers that a kind of rope has, its default for what is left out."""
    default = {"original_max_position_embeddings": config.max_position_embeddings}
    for name, value in theirs.items():
        if name != "type":
            found = getattr(ours, name)
            found = list(found) if isinstance(found, tuple) else found
            assert (default.get(name) if found is None else found) == value, name


@pytest.mark.parametrize("content", [
    *({"model_type": name} for name in FAMILIES), *PUBLISHED.values(),
], ids=[*FAMILIES, *PUBLISHED])  # fmt: skip
def test_a_configuration_means_what_it_means_to_transformers(content):
    """Fields that are left out, too; and what we write is read as what we read."""
    from transformers import AutoConfig

    content = SIZES | json.loads(json.dumps(content))
    ours = read(content)
    assert_means_the_same(ours, AutoConfig.for_model(**content))
    written = json.loads(json.dumps(ours.to_dict()))
    assert read(written) == ours and hash(read(written)) == hash(ours)
    model_type = written.pop("model_type")
    assert written.pop("architectures")[0].endswith("ForCausalLM")
    assert_means_the_same(ours, AutoConfig.for_model(model_type, **written))


@pytest.mark.parametrize(("content", "words"), [
    ({"rope_scaling": {"rope_type": "mrope"}}, "`rope_type` is 'mrope'; known are def"),
    ({"rope_scaling": {"type": "linear"}}, "'linear' needs `factor`"),
    ({"rope_scaling": "long"}, "`rope_scaling` is 'long'; expected an object"),
    ({"rope_scaling": {"type": "llama3", "factor": "8"}}, "`factor` is '8'; expected"),
    ({"rope_theta": -1.0}, "`rope_theta` of a rope must be positive"),
    ({"rope_scaling": PUBLISHED["phi-3-128k"]["rope_scaling"] | {
        "type": "longrope", "long_factor": [1.0]}}, "must have 16 numbers, one for"),
    ({"head_dim": 7}, "it would turn 7"),
    ({"num_key_value_heads": 3}, "must divide `num_attention_heads`=32"),
    ({"num_attention_heads": 5}, "must divide `hidden_size`=1024"),
    ({"num_attention_heads": 0}, "`num_attention_heads` must be at least 1"),
    ({"vocab_size": None}, "field `vocab_size` is None"),
    ({"hidden_act": "swish2"}, "`hidden_act`='swish2' is not supported"),
    ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "8 layers need one"),
    ({"model_type": "qwen3", "layer_types": ["chunked_attention"] * 8}, "has 'chunked"),
    ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 8}, "give a `slid"),
    ({"model_type": "qwen3", "layer_types": "all"}, "`layer_types` is 'all'; expected"),
    ({"model_type": "smollm3", "no_rope_layers": [1]}, "`no_rope_layers` has 1 entr"),
    ({"model_type": "smollm3", "no_rope_layers": 4}, "expected whole numbers"),
    ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "whole number of at"),
    ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "backwards"),
    ({"model_type": "gemma3_text", "rope_parameters": {"full_attention": 3}}, "object"),
    ({"model_type": "mixtral"}, "`model_type` is 'mixtral'; known here are llama"),
])  # fmt: skip
def test_bad_input_is_one_line_with_file_and_field(content, words):
    with pytest.raises(CheckpointError) as caught:
        read({"model_type": "llama"} | SIZES | content)
    text = str(caught.value)
    assert text.startswith("here.json: ") and words in text and "\n" not in text


def test_a_missing_size_is_named():
    for name in SIZES:
        content = {key: value for key, value in SIZES.items() if key != name}
        with pytest.raises(CheckpointError, match=f"field `{name}` is missing"):
            read({"model_type": "llama"} | content)


@pytest.mark.parametrize(("rope", "tokens"), [
    (Rope(), 2048),
    (Rope(rope_type="linear", factor=4.0), 8192),
    (Rope(rope_type="dynamic", factor=2.0), 4096),
    (Rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=1024), 4096),
    (Rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=256), 2048),
])  # fmt: skip
def test_scaled_ropes_reach_further_than_the_configuration_says(rope, tokens):
    assert rope.reach(2048) == tokens
    content = {"model_type": "llama", "rope_parameters": rope.to_dict()}
    assert read(SIZES | content).context_length == tokens
    # What Gemma 3 says has been scaled.
    assert read(SIZES | PUBLISHED["gemma-3-4b"]).context_length == 131_072


def test_ropes_that_follow_the_length_leave_short_texts_alone():
    """A cache for more tokens than the original length is read with other speeds."""
    for variant, limit in (("dynamic", 24), ("longrope", 16)):
        config = read(make.content_of(variant))

        def speeds(length, config=config):
            return frequencies(
                config.rope,
                head_dim=config.head_dim,
                length=length,
                max_positions=config.max_position_embeddings,
            )[0]

        np.testing.assert_array_equal(speeds(limit), speeds(1))
        assert np.all(speeds(limit + 1)[1:] < speeds(limit)[1:])


def test_what_phi_3_called_its_rope_at_first_is_longrope():
    content = SIZES | json.loads(json.dumps(PUBLISHED["phi-3-128k"]))
    for name in ("su", "yarn"):
        content["rope_scaling"] |= {"type": name}
        assert read(content).rope.rope_type == "longrope"


def test_a_rope_of_nothing_is_refused():
    with pytest.raises(UsageError, match=r"must lie in \(0, 1\]. Got 0"):
        Rope(partial_rotary_factor=0.0)


GPT_SIZES = {
    "gpt2": {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": {
        "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 40,
    },
}  # fmt: skip


@pytest.mark.parametrize("model_type", GPT_SIZES)
def test_a_gpt_means_what_it_means_to_transformers(model_type):
    """In words of their own, with fields left out."""
    from transformers import AutoConfig

    content = {"model_type": model_type} | GPT_SIZES[model_type]
    ours = GPTConfig.from_dict(content, "here.json")
    written = json.loads(json.dumps(ours.to_dict()))
    assert GPTConfig.from_dict(written, "here.json") == ours
    assert written.pop("model_type") == model_type and written.pop("architectures")
    for theirs in (
        AutoConfig.for_model(**content), AutoConfig.for_model(model_type, **written),
    ):  # fmt: skip
        names = {"hidden_act": "activation_function"} | {
            "layer_norm_eps": "layer_norm_epsilon", "intermediate_size": "n_inner"
        }  # fmt: skip
        for name in (
            "hidden_size", "num_hidden_layers", "num_attention_heads",
            "intermediate_size", "max_position_embeddings", "hidden_act",
            "layer_norm_eps", "tie_word_embeddings", "pad_token_id", "bos_token_id",
            "eos_token_id", "attention_bias", "use_parallel_residual",
        ):  # fmt: skip
            value = getattr(theirs, name, getattr(theirs, names.get(name, ""), None))
            if value is not None:
                assert getattr(ours, name) == value, name
        if ours.rope is not None:
            assert_same_rope(ours.rope, theirs.rope_parameters, ours)
    assert ours.intermediate_size == (128 if model_type == "gpt2" else 40)


@pytest.mark.parametrize(("content", "words"), [
    ({"n_embd": 30}, "must divide `hidden_size`=30"),
    ({"scale_attn_weights": False}, "`scale_attn_weights` is false"),
    ({"n_head": None}, "field `n_head` is None"),
    ({"activation_function": "swish2"}, "`hidden_act`='swish2' is not supported"),
    ({"model_type": "gptj"}, "`model_type` is 'gptj'; known here are gpt2, gpt_neox"),
])  # fmt: skip
def test_bad_input_of_a_gpt_is_one_line(content, words):
    content = {"model_type": "gpt2"} | GPT_SIZES["gpt2"] | content
    with pytest.raises(CheckpointError) as caught:
        GPTConfig.from_dict(content, "here.json")
    text = str(caught.value)
    assert text.startswith("here.json: ") and words in text and "\n" not in text
