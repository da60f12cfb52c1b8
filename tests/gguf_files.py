"""Small GGUF files, written by the package `gguf` as llama.cpp's converter does."""

import gguf
import numpy as np

from kashin_jax.io import open_checkpoint

BLOCKS = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
OUTER = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm",
    "lm_head": "output",
}  # fmt: skip
BYTES = [*"\u0120abcdefghijklmnopqrstuvwxyz0123456789.,!?'ABS"]
# Of words that some ways to cut a text make, and others do not.
MERGES = ["a b", "ab c", "\u0120 a", "' S", "1 2", "12 3", "123 4"]


def gguf_name(name):
    module, _, leaf = name.rpartition(".")
    if module in OUTER:
        return f"{OUTER[module]}.{leaf}"
    _, _, number, inner = module.split(".", 3)
    return f"blk.{number}.{BLOCKS[inner]}.{leaf}"


def interleaved(array, heads):
    """Rows of the two halves of each head in turn."""
    halves = array.reshape(heads, 2, len(array) // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def byte_level(size, pre="smollm"):
    """Fields of a vocabulary of so many tokens, the first three with a meaning."""
    special = ["<pad>", "<|begin|>", "<|end|>"]
    tokens = special + BYTES + [merge.replace(" ", "") for merge in MERGES]
    tokens += [f"<unused{i}>" for i in range(size - len(tokens))]
    types = [3] * 3 + [1] * (len(tokens) - 3)
    return {
        "model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types,
        "merges": MERGES, "add_bos_token": False,
        "bos_token_id": 1, "eos_token_id": 2, "padding_token_id": 0,
    }  # fmt: skip


def fields_of(config, **more):
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    return {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config.get("rms_norm_eps", 1e-6),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.freq_base": config.get("rope_theta", 10_000.0),
    } | more


def write_gguf(
    path, tensors, fields, tokenizer, *, architecture="llama", kinds=None, more=None
):
    """Writes arrays by name in the file.

    Args:
      path: The file.
      tensors: Arrays, by llama.cpp's names.
      fields: Of the architecture; None leaves one out.
      tokenizer: Of the tokenizer.
      architecture: What it calls itself.
      kinds: Types by name; float32 where none is given.
      more: Fields by their whole name.
    """
    writer = gguf.GGUFWriter(path, architecture)
    named = {f"{architecture}.{k}": v for k, v in fields.items()}
    named |= {f"tokenizer.ggml.{k}": v for k, v in tokenizer.items()} | (more or {})
    for key, value in named.items():
        if value is not None:
            add(writer, key, value)
    for name, array in tensors.items():
        kind = gguf.GGMLQuantizationType[(kinds or {}).get(name, "F32")]
        if kind == gguf.GGMLQuantizationType.F16:
            writer.add_tensor(name, array.astype(np.float16))
        elif kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, array)
        else:
            packed = gguf.quants.quantize(array, kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer, key, value):
    adders = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
        str: writer.add_string, list: writer.add_array,
    }  # fmt: skip
    adders[type(value)](key, value)


def of_checkpoint(directory, path, *, kinds=None, more=None, tokenizer=None, **fields):
    """A dense checkpoint as a GGUF file of the same values."""
    source = open_checkpoint(directory)
    config = source.config
    tensors = {}
    for name in source.names():
        array = source.load(name)
        if config["model_type"] == "llama" and ".q_proj." in name:
            array = interleaved(array, config["num_attention_heads"])
        if config["model_type"] == "llama" and ".k_proj." in name:
            array = interleaved(array, config["num_key_value_heads"])
        tensors[gguf_name(name)] = array
    return write_gguf(
        path,
        tensors,
        fields_of(config, **fields),
        tokenizer or byte_level(config["vocab_size"]),
        architecture=config["model_type"],
        kinds=kinds,
        more=more,
    )
