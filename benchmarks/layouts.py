"""Names and shapes of checkpoints that are too large to ship."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

__all__ = ["LAYOUTS", "Layout"]

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """A checkpoint in float16 without its weights.

    Attributes:
      tensors: Shapes by name.
      config: Its `config.json`.
    """

    tensors: Mapping[str, Shape]
    config: Mapping[str, Any]


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
    return Layout(tensors, config)


_OPT_ATTENTION = ("k_proj", "v_proj", "q_proj", "out_proj")


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
        "4gb": _square(layers=21, width=4096, vocabulary=152064),
        "matrix": _matrix(width=4096),
        "bare": _square(layers=1, width=128, vocabulary=256),
    }
)
"""By name; `matrix` is one alone, and `bare` takes next to no memory itself."""
