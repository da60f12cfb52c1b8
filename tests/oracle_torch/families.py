"""Small random models of many families, as transformers' torch models have them."""

_TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT = {k: v for k, v in _TEXT.items() if k != "num_key_value_heads"}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_GPT = {
    "vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_IMAGES = {"image_size": 16, "patch_size": 8}

CAUSAL, MASKED, SEQ2SEQ = "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration"

FAMILIES = {
    "llama": ("Llama", CAUSAL, _TEXT),
    "qwen3": ("Qwen3", CAUSAL, _TEXT | {"head_dim": 12, "tie_word_embeddings": True}),
    "gpt2": ("GPT2", "LMHeadModel", _GPT),
    "gpt_neox": ("GPTNeoX", CAUSAL, _BERT),
    "opt": ("OPT", CAUSAL, _BERT | {"ffn_dim": 40, "word_embed_proj_dim": 32}),
    "bloom": ("Bloom", CAUSAL, {"vocab_size": 96, "hidden_size": 32, "n_head": 4}),
    "falcon": ("Falcon", CAUSAL, _BERT),
    "phi": ("Phi", CAUSAL, _TEXT),
    "mamba": ("Mamba", CAUSAL, _TEXT | {"state_size": 4, "time_step_rank": 16}),
    "rwkv": ("Rwkv", CAUSAL, _TEXT | {"attention_hidden_size": 32}),
    "mixtral": ("Mixtral", CAUSAL, _TEXT | {"num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2Moe", CAUSAL,
        _TEXT | _EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 40},
    ),
    "qwen3_moe": ("Qwen3Moe", CAUSAL, _TEXT | _EXPERTS | {"num_experts": 4}),
    # As many features within the experts as without, as GPT-OSS has them.
    "gpt_oss": (
        "GptOss", CAUSAL,
        _TEXT | {
            "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
            "intermediate_size": 32,
        },
    ),
    "granitemoe": (
        "GraniteMoe", CAUSAL,
        _TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "deepseek_v3": (
        "DeepseekV3", CAUSAL,
        _TEXT | _EXPERTS | {
            "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "q_lora_rank": 16,
            "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
            "v_head_dim": 8, "first_k_dense_replace": 1, "num_key_value_heads": 4,
        },
    ),
    "bert": ("Bert", MASKED, _BERT),
    "deberta-v2": (
        "DebertaV2", MASKED,
        _BERT | {
            "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
            "type_vocab_size": 0, "position_biased_input": False, "conv_kernel_size": 3,
        },
    ),
    "modernbert": (
        "ModernBert", MASKED,
        _BERT | {"cls_token_id": 1, "sep_token_id": 2},
    ),
    "t5": (
        "T5", SEQ2SEQ,
        {
            "vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2,
            "num_heads": 4, "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False, "decoder_start_token_id": 0,
        },
    ),
    "bart": (
        "Bart", SEQ2SEQ,
        {
            "vocab_size": 96, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4,
            "encoder_ffn_dim": 40, "decoder_ffn_dim": 40,
            "max_position_embeddings": 64,
        },
    ),
    "whisper": (
        "Whisper", SEQ2SEQ,
        {
            "vocab_size": 96, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4,
            "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "num_mel_bins": 8,
            "max_source_positions": 16, "max_target_positions": 32,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
    ),
    "vit": ("ViT", "ForImageClassification", _BERT | _IMAGES),
    "clip": (
        "CLIP", "Model",
        {
            "text_config": _BERT, "vision_config": _BERT | _IMAGES,
            "projection_dim": 16,
        },
    ),
}  # fmt: skip
"""By `model_type`: the name of the family, what the model is for, its configuration."""


def random_model(family, seed=0):
    """A model of which every part matters: weights large enough, biases not 0."""
    import torch
    import transformers

    name, task, content = FAMILIES[family]
    config = transformers.AutoConfig.for_model(family, **content)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}{task}")(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            noise = torch.randn(value.shape, generator=generator)
            # Norms stay near 1, A_log near what keeps a state.
            value.add_(0.1 * noise if value.ndim > 1 else 0.02 * noise)
    return model


def inputs(model, seed=0):
    """What a model of its kind is called with."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (2, 12), generator=generator)
    config = model.config
    if config.model_type == "whisper":
        sound = torch.randn(2, 8, 32, generator=generator)
        return {"input_features": sound, "decoder_input_ids": ids}
    images = torch.randn(2, 3, 16, 16, generator=generator)
    if config.model_type == "vit":
        return {"pixel_values": images}
    if config.model_type == "clip":
        return {"input_ids": ids, "pixel_values": images}
    if config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    return {"input_ids": ids}


def outputs(model):
    """The logits of a model, of both kinds if it compares two."""
    import torch

    with torch.no_grad():
        found = model(**inputs(model))
    return (found.logits if "logits" in found else found.logits_per_text).numpy()
