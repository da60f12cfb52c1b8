"""Names and configuration of Hugging Face for those of a GGUF file.

Of the architectures of llama.cpp these are taken whose tensors are those of Hugging
Face one by one. Only that of Llama has queries and keys in another order.
"""

import collections
import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from kashin_jax.errors import CheckpointError
from kashin_jax.io.files import shown
from kashin_jax.io.gguf.file import GGUFPlace, decoded_dtype
from kashin_jax.io.gguf.header import GGUFHeader

__all__ = [
    "ROPE_FACTORS",
    "hugging_face_config",
    "hugging_face_places",
    "quantized_before",
]

ROPE_FACTORS = "rope_freqs.weight"
"""Factors of the wavelengths of pairs; they go into the configuration."""


class _Architecture(NamedTuple):
    model_class: str
    is_interleaved: bool


_ARCHITECTURES: Mapping[str, _Architecture] = MappingProxyType({
    "llama": _Architecture("LlamaForCausalLM", True),
    "qwen2": _Architecture("Qwen2ForCausalLM", False),
    "qwen3": _Architecture("Qwen3ForCausalLM", False),
})  # fmt: skip
_OUTER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_IN_BLOCK = re.compile(r"blk\.(0|[1-9]\d{0,4})\.(\w+)\.(weight|bias)")
# Every other field of an architecture may mean another computation. Those with a value
# are known with that value alone.
_KNOWN: Mapping[str, Any] = MappingProxyType({
    "attention.causal": True,
    "attention.head_count": None,
    "attention.head_count_kv": None,
    "attention.key_length": None,
    "attention.layer_norm_rms_epsilon": None,
    "attention.value_length": None,
    "block_count": None,
    "context_length": None,
    "embedding_length": None,
    "expert_count": 0,
    "expert_used_count": 0,
    "feed_forward_length": None,
    "rope.dimension_count": None,
    "rope.freq_base": None,
    "rope.scaling.factor": None,
    "rope.scaling.finetuned": None,
    "rope.scaling.original_context_length": None,
    "rope.scaling.type": None,
    "rope.scale_linear": 1.0,
    "tensor_data_layout": None,
    "vocab_size": None,
})  # fmt: skip
_FULL = frozenset({"F32", "F16", "BF16"})
_KEY = "gguf"


def quantized_before(config: Mapping[str, Any]) -> str | None:
    """Types that weights had in the GGUF file that a checkpoint is from.

    Args:
      config: Its `config.json`.

    Returns:
      Those that are quantized, the most frequent first, such as "Q4_1, Q8_0"; None
      where there are none.
    """
    entry = config.get(_KEY)
    types = entry.get("types") if isinstance(entry, Mapping) else None
    if not isinstance(types, Mapping):
        return None
    return ", ".join(str(kind) for kind in types if kind not in _FULL) or None


def hugging_face_places(header: GGUFHeader) -> dict[str, GGUFPlace]:
    """Where the tensors lie, by Hugging Face's names.

    Raises:
      CheckpointError: If the architecture is none of those taken here, or a tensor is
        no part of it; names both.
    """
    architecture = _architecture(header)
    is_interleaved = _ARCHITECTURES[architecture].is_interleaved
    places = {}
    for name, tensor in header.tensors.items():
        if name == ROPE_FACTORS:
            continue
        found = _published(name)
        if found is None:
            raise CheckpointError(
                f"{header.path}: tensor {shown(name)} is no part of the models of "
                f"architecture {architecture!r} that are read; name the original "
                "model, in safetensors."
            )
        heads = 0
        if is_interleaved and ".q_proj." in found:
            heads = _count(header, "attention.head_count")
        elif is_interleaved and ".k_proj." in found:
            heads = _key_heads(header)
        if heads and tensor.shape[0] % (2 * heads):
            raise CheckpointError(
                f"{header.path}: tensor {shown(name)} of shape {tensor.shape} is not "
                f"of {heads} heads; copy or download it again."
            )
        places[found] = GGUFPlace(tensor, heads)
    return places


def hugging_face_config(
    header: GGUFHeader, factors: np.ndarray | None
) -> dict[str, Any]:
    """The content of a `config.json`, without the tokens that have a meaning.

    Args:
      header: Of the file.
      factors: Values of `rope_freqs.weight`, where it has them.

    Raises:
      CheckpointError: If a field is missing, of the wrong type, or means a computation
        that is not done here; names it.
    """
    architecture = _architecture(header)
    _check_fields(header, architecture)
    heads = _count(header, "attention.head_count")
    hidden = _count(header, "embedding_length")
    head_dim = _count(header, "attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (found := _count(header, key, head_dim)) != head_dim:
            raise _refused(header, key, found, f"heads are {head_dim} wide")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(
            f"{header.path}: has no `token_embd.weight`; copy or download it again."
        )
    context = _count(header, "context_length")
    values: collections.Counter[str] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()
    for tensor in header.tensors.values():
        values[decoded_dtype(tensor.kind)] += math.prod(tensor.shape)
        kinds[tensor.kind] += 1
    return {
        "architectures": [_ARCHITECTURES[architecture].model_class],
        "model_type": architecture,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": _count(header, "feed_forward_length"),
        "num_hidden_layers": _count(header, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _key_heads(header),
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "hidden_act": "silu",
        "rms_norm_eps": _real(header, "attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_output.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in header.tensors,
        "rope_theta": _real(header, "rope.freq_base", 10_000.0),
        "rope_scaling": _scaling(header, head_dim, factors),
        "torch_dtype": values.most_common(1)[0][0],
        _KEY: {"file": header.path.name, "types": dict(kinds.most_common())},
    }


def _architecture(header: GGUFHeader) -> str:
    found = header.fields.get("general.architecture")
    if not isinstance(found, str) or found not in _ARCHITECTURES:
        raise CheckpointError(
            f"{header.path}: `general.architecture` is {shown(found)}; read are "
            f"{', '.join(_ARCHITECTURES)}. Name the original model, in safetensors."
        )
    return found


def _published(name: str) -> str | None:
    """Hugging Face's name of a tensor; None if it is not known."""
    module, _, leaf = name.rpartition(".")
    if module in _OUTER and leaf == "weight":
        return f"{_OUTER[module]}.{leaf}"
    found = _IN_BLOCK.fullmatch(name)
    if found is None or found[2] not in _BLOCK:
        return None
    return f"model.layers.{found[1]}.{_BLOCK[found[2]]}.{found[3]}"


def _check_fields(header: GGUFHeader, architecture: str) -> None:
    for field, value in header.fields.items():
        owner, _, key = field.partition(".")
        if owner != architecture:
            continue
        if key not in _KNOWN or _KNOWN[key] not in (None, value):
            raise _refused(header, key, value, "that computation is not known here")


def _refused(header: GGUFHeader, key: str, value: Any, reason: str) -> CheckpointError:
    name = f"{_architecture(header)}.{key}"
    # Of a field that is not known, the name is a stranger's text.
    name = f"`{name}`" if key in _KNOWN else shown(name)
    return CheckpointError(
        f"{header.path}: {name} is {shown(value)}, but {reason}; name the original "
        "model, in safetensors."
    )


def _field(header: GGUFHeader, key: str, default: Any = None) -> Any:
    value = header.fields.get(f"{_architecture(header)}.{key}", default)
    if value is None:
        raise CheckpointError(
            f"{header.path}: field `{_architecture(header)}.{key}` is missing; copy or "
            "download it again."
        )
    return value


def _count(header: GGUFHeader, key: str, default: int | None = None) -> int:
    value = _field(header, key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise _refused(header, key, value, "a positive whole number is needed")
    return value


def _real(header: GGUFHeader, key: str, default: float | None = None) -> float:
    value = _field(header, key, default)
    if not isinstance(value, float) or not 0 < value < math.inf:
        raise _refused(header, key, value, "a positive number is needed")
    # As it was written before it became a float32: 1e-05, not 9.999999747378752e-06.
    return float(str(np.float32(value)))


def _key_heads(header: GGUFHeader) -> int:
    return _count(
        header, "attention.head_count_kv", _count(header, "attention.head_count")
    )


def _scaling(
    header: GGUFHeader, head_dim: int, factors: np.ndarray | None
) -> dict[str, Any] | None:
    """The object `rope_scaling` of a `config.json`."""
    kind = _field(header, "rope.scaling.type", "none")
    if factors is not None:
        return _llama3(header, head_dim, factors)
    if kind == "linear":
        factor = _real(header, "rope.scaling.factor")
        return {"rope_type": "linear", "factor": factor}
    if kind != "none":
        raise _refused(header, "rope.scaling.type", kind, "`linear` is known alone")
    return None


def _llama3(header: GGUFHeader, head_dim: int, factors: np.ndarray) -> dict[str, Any]:
    """Llama 3's scaling, of which a file keeps what it comes to.

    Its published models differ in the factor alone, which is that of the slowest pair.
    """
    low, high, original = 1.0, 4.0, 8192
    factor = float(np.max(factors, initial=1.0))
    theta = _real(header, "rope.freq_base", 10_000.0)
    pairs = np.arange(0, head_dim, 2) / head_dim
    turns = original * theta**-pairs / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / (kept + (1 - kept) / factor)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise CheckpointError(
            f"{header.path}: `{ROPE_FACTORS}` has other factors than those of Llama "
            "3; name the original model, in safetensors."
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
