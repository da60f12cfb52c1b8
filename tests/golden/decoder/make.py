"""Makes the golden decoders with Hugging Face's torch models; see `make oracle-torch`.

    PYTHONPATH=.oracle-torch .venv/bin/python tests/golden/decoder/make.py

Every family is a small random model in a directory of its own. Kinds of ropes are
changes of a family's `config.json`, for the same weights. `golden.npz` has the tokens
and the logits of a padded batch.
"""

import json
import pathlib

import numpy as np

HERE = pathlib.Path(__file__).parent
SIZES = {
    "vocab_size": 61,
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
# Embeddings, of tokens and positions.
TABLES = ("embed_tokens.weight", "embed_in.weight", "wte.weight", "wpe.weight")
# More tokens than the windows and original lengths below.
LENGTH, PADDING, WINDOW = 40, 5, 8
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": WINDOW}
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": WINDOW, "head_dim": 12},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    },
    "qwen3": {"head_dim": 12, "tie_word_embeddings": True},
    "gemma2": _GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
    "gemma3_text": _GEMMA
    | {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {
                "rope_type": "linear",
                "rope_theta": 1e6,
                "factor": 8.0,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "phi3": {
        "sliding_window": WINDOW,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
        },
    },
    "smollm3": {
        "no_rope_layers": [1, 0],
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "tie_word_embeddings": False,
    },
    "olmo2": {},
    "granite": {
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "logits_scaling": 4.0,
    },
    "gpt2": {
        "n_embd": 32,
        "n_inner": 40,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "scale_attn_by_inverse_layer_idx": True,
    },
    "gpt_neox": {"rotary_pct": 0.5, "rotary_emb_base": 1000},
}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 5.0],
}
# A kind of rope: its family, and what changes in the configuration.
ROPES = {
    "linear": ("llama", {}, {"rope_type": "linear", "factor": 4.0}),
    # Beyond the model's positions: it starts to scale there.
    "dynamic": (
        "llama",
        {"max_position_embeddings": 24},
        {"rope_type": "dynamic", "factor": 2.0},
    ),
    "llama3": (
        "llama",
        {},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "yarn": (
        "llama",
        {},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 4.0,
        },
    ),
    "longrope": ("phi3", {"original_max_position_embeddings": 16}, _LONG),
    "longrope-short": ("phi3", {"original_max_position_embeddings": 48}, _LONG),
}
VARIANTS = (*FAMILIES, *ROPES)


def family_of(variant):
    """The directory with its weights."""
    return ROPES[variant][0] if variant in ROPES else variant


def content_of(variant):
    """The content of its `config.json`, as transformers 5 writes it."""
    family = family_of(variant)
    content = {"model_type": family} | SIZES | FAMILIES[family]
    if family == "gpt2":
        # It has words of its own for the others.
        theirs = ("model_type", "vocab_size", "bos_token_id", "eos_token_id")
        content = {name: content[name] for name in (*theirs, *FAMILIES[family])}
    if variant in ROPES:
        _, changes, rope = ROPES[variant]
        content |= changes | {"rope_parameters": {"rope_theta": 1e4} | rope}
    return content


def random_model(variant, seed=0):
    """A small model with weights large enough that every part of it matters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**content_of(variant))
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).float().eval()
    rng = np.random.RandomState(seed + list(FAMILIES).index(family_of(variant)))
    with torch.no_grad():
        for name, value in sorted(model.named_parameters()):
            noise = rng.normal(size=value.shape)
            if value.ndim == 1:
                # Fresh norms are all 1 (Gemma's 0), fresh biases 0.
                noise = value.mean().item() + 0.3 * noise
            elif not name.endswith(TABLES):
                noise = noise / np.sqrt(noise.shape[-1])
            value.copy_(torch.tensor(noise, dtype=torch.float32))
    return model


def tokens_and_mask(seed, length=LENGTH):
    """Two rows, the second padded on the left."""
    ids = np.random.RandomState(seed).randint(3, SIZES["vocab_size"], size=(2, length))
    mask = np.ones_like(ids)
    mask[1, :PADDING] = 0
    return ids.astype(np.int32), mask.astype(np.int32)


def logits(model, ids, mask, first=None):
    """Logits of a batch; read through a cache, the `first` tokens at once, if given."""
    import torch

    ids, mask = torch.tensor(ids).long(), torch.tensor(mask).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    count = ids.shape[1]
    ends = [count] if first is None else range(first, count + 1)
    cache, parts, start = None, [], 0
    with torch.no_grad():
        for end in ends:
            found = model(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                cache=cache,
                use_cache=first is not None,
            )
            cache, start = found.cache, end
            parts.append(found.logits)
    return torch.cat(parts, 1).numpy()


def save(model, variant, directory):
    """Writes weights and configuration; a tied head is left out."""
    import safetensors.numpy

    directory.mkdir(exist_ok=True)
    left = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    is_neox = variant == "gpt_neox"
    tensors = {
        # As it is published; the new name is one of transformers alone.
        name.replace("lm_head", "embed_out") if is_neox else name: value.numpy()
        for name, value in model.state_dict().items()
        if name not in left
    }
    path = directory / "model.safetensors"
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})
    write_config(variant, directory)


def write_config(variant, directory):
    """Writes `config.json`."""
    text = json.dumps(content_of(variant), indent=2) + "\n"
    (directory / "config.json").write_text(text)


def main():
    """Writes the directories and the logits."""
    import torch
    import transformers

    torch.set_num_threads(1)
    golden = dict(zip(("ids", "mask"), tokens_and_mask(seed=1), strict=True))
    for variant in VARIANTS:
        model = random_model(variant)
        golden[variant] = logits(model, golden["ids"], golden["mask"])
        if variant in FAMILIES:
            save(model, variant, HERE / variant)
        else:
            # A kind of rope that changed nothing would test nothing.
            plain = golden[family_of(variant)]
            assert np.abs(golden[variant] - plain).max() > 0.01 * np.abs(plain).max()
    np.savez_compressed(HERE / "golden.npz", **golden)
    print(torch.__version__, transformers.__version__)


if __name__ == "__main__":
    main()
