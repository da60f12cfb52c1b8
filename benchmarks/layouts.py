"""Names and shapes of checkpoints that are too large to ship."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

__all__ = ["LAYOUTS", "Layout"]

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """A checkpoint without its weights.

    Attributes:
      tensors: Shapes by name.
      config: Its `config.json`.
      dtype: Type of all tensors.
      shard_bytes: Most bytes of a file.
      runs: Whether it is whole: a model that can be loaded.
    """

    tensors: Mapping[str, Shape]
    config: Mapping[str, Any]
    dtype: str = "float16"
    shard_bytes: int = 10**9
    runs: bool = False


def _opt(*, layers: int, width: int, ffn: int, vocabulary: int) -> Layout:
    """OPT with norms before the blocks, as all sizes but 350M have them."""
    top = "model.decoder"
    tensors: dict[str, Shape] = {
        f"{top}.embed_tokens.weight": (vocabulary, width),
        f"{top}.embed_positions.weight": (2050, width),
        f"{top}.final_layer_norm.weight": (width,),
        f"{top}.final_layer_norm.bias": (width,),
    }
    linears = {f"self_attn.{x}": (width, width) for x in _OPT_ATTENTION}
    linears |= {"fc1": (ffn, width), "fc2": (width, ffn)}
    for i in range(layers):
        block = f"{top}.layers.{i}"
        for name, shape in linears.items():
            tensors[f"{block}.{name}.weight"] = shape
            tensors[f"{block}.{name}.bias"] = shape[:1]
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            tensors[f"{block}.{name}.weight"] = (width,)
            tensors[f"{block}.{name}.bias"] = (width,)
    config = {
        "model_type": "opt", "vocab_size": vocabulary, "hidden_size": width,
        "word_embed_proj_dim": width, "num_hidden_layers": layers, "ffn_dim": ffn,
        "num_attention_heads": 32, "max_position_embeddings": 2048,
        "do_layer_norm_before": True, "activation_function": "relu",
    }  # fmt: skip
    return Layout(tensors, config, runs=True)


_OPT_ATTENTION = ("k_proj", "v_proj", "q_proj", "out_proj")


def _llama(
    *, layers: int, width: int, ffn: int, key_values: int, vocabulary: int
) -> Layout:
    """Llama 3.2 with its tied head, in bfloat16 and four files."""
    tensors: dict[str, Shape] = {"model.embed_tokens.weight": (vocabulary, width)}
    linears = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (key_values, width),
        "self_attn.v_proj": (key_values, width), "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (ffn, width), "mlp.up_proj": (ffn, width),
        "mlp.down_proj": (width, ffn),
    }  # fmt: skip
    for i in range(layers):
        block = f"model.layers.{i}"
        for name, shape in linears.items():
            tensors[f"{block}.{name}.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{block}.{name}.weight"] = (width,)
    tensors["model.norm.weight"] = (width,)
    config = {
        "model_type": "llama", "vocab_size": vocabulary, "hidden_size": width,
        "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": width // 64, "num_key_value_heads": key_values // 64,
        "head_dim": 64, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "tie_word_embeddings": True,
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    }  # fmt: skip
    return Layout(tensors, config, "bfloat16", 650 * 10**6, runs=True)


def _square(*, layers: int, width: int, vocabulary: int) -> Layout:
    """Four square matrices per block below a large vocabulary, as recent models."""
    tensors: dict[str, Shape] = {"model.embed_tokens.weight": (vocabulary, width)}
    for i in range(layers):
        for x in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"model.layers.{i}.self_attn.{x}.weight"] = (width, width)
        tensors[f"model.layers.{i}.input_layernorm.weight"] = (width,)
    return Layout(tensors, {"model_type": "llama"})


def _matrix(*, width: int) -> Layout:
    name = "model.layers.0.self_attn.q_proj.weight"
    return Layout({name: (width, width)}, {"model_type": "llama"})


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "opt-1.3b": _opt(layers=24, width=2048, ffn=8192, vocabulary=50272),
        "llama-3.2-1b": _llama(
            layers=16, width=2048, ffn=8192, key_values=512, vocabulary=128256
        ),
        "4gb": _square(layers=21, width=4096, vocabulary=152064),
        "matrix": _matrix(width=4096),
        "bare": _square(layers=1, width=128, vocabulary=256),
    }
)
"""By name; `matrix` is one alone, and `bare` takes next to no memory itself."""
