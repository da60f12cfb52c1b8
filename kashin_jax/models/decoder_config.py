"""Configurations of decoder-only language models of the Llama kind, a family a row.

A `config.json` says how large a model is and how it is scaled. What else tells the
families apart is nowhere in it: that stands here, in `FAMILIES`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax

from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.models.config_fields import (
    Counts,
    TokenIds,
    check_heads,
    check_known,
    check_sizes,
    read_fields,
)
from kashin_jax.models.rope import FULL, SLIDING, Rope, read_ropes
from kashin_jax.models.transformer import ACTIVATIONS

__all__ = ["FAMILIES", "DecoderConfig", "Family"]

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "sliding_window",
)
# No bias is no bias.
_NULLS = {"attention_bias": False}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What the models of one `model_type` have in common.

    Attributes:
      architecture: Their class in transformers.
      defaults: Of fields that may be left out, where they are not those of Llama.
      norms: "before" attention and feed-forward part, "after" them, or "around".
      norm_offset: 1 where scales of norms are stored as differences from 1, else 0.
      normed_heads: Whether queries and keys have a norm of their own: no "none" of
        them, each "head", or the whole "row" of heads.
      qkv_bias: Whether these have biases though the output of attention has none.
      fused: Whether queries, keys and values are one matrix, and gate and up another.
      scales_embedding: Whether embeddings are multiplied by the root of their width.
      slides: Which layers look back over a window only, where the configuration has
        no list of them: "none", "all" if there is a window, "late" ones, all but the
        last "of_2" or "of_6", or those "without_rope".
      local_theta: Base of the rope of these layers, if they have another one.
    """

    architecture: str
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    norms: str = "before"
    norm_offset: float = 0.0
    normed_heads: str = "none"
    qkv_bias: bool = False
    fused: bool = False
    scales_embedding: bool = False
    slides: str = "none"
    local_theta: float | None = None

    @property
    def lists_layers(self) -> bool:
        """Whether a configuration may list which layers slide."""
        return self.slides not in ("none", "all")

    @property
    def has_switch(self) -> bool:
        """Whether windows are off unless `use_sliding_window` is set."""
        return self.slides in ("late", "without_rope")

    @property
    def aliases(self) -> Mapping[str, str]:
        """Keys of the fields that are spelled otherwise in `config.json`."""
        return {"hidden_act": "hidden_activation"} if self.scales_embedding else {}


_GEMMA = {
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "sliding_window": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
}

_TOKENS = ("bos_token_id", "eos_token_id")

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(architecture="LlamaForCausalLM"),
        "mistral": Family(
            architecture="MistralForCausalLM",
            defaults={
                "num_key_value_heads": 8,
                "max_position_embeddings": 131_072,
                "sliding_window": 4096,
            },
            slides="all",
        ),
        "qwen2": Family(
            architecture="Qwen2ForCausalLM",
            defaults=_QWEN,
            qkv_bias=True,
            slides="late",
        ),
        "qwen3": Family(
            architecture="Qwen3ForCausalLM",
            defaults=_QWEN | {"head_dim": 128},
            normed_heads="head",
            slides="late",
        ),
        "gemma2": Family(
            architecture="Gemma2ForCausalLM",
            defaults=_GEMMA
            | {
                "max_position_embeddings": 8192,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
            },
            norms="around",
            norm_offset=1.0,
            scales_embedding=True,
            slides="of_2",
        ),
        "gemma3_text": Family(
            architecture="Gemma3ForCausalLM",
            defaults=_GEMMA
            | {"max_position_embeddings": 131_072, "rope_theta": 1_000_000.0},
            norms="around",
            norm_offset=1.0,
            normed_heads="head",
            scales_embedding=True,
            slides="of_6",
            local_theta=10_000.0,
        ),
        "phi3": Family(
            architecture="Phi3ForCausalLM",
            defaults={
                "max_position_embeddings": 4096,
                "original_max_position_embeddings": 4096,
                "rms_norm_eps": 1e-5,
                "pad_token_id": 32_000,
                "eos_token_id": 32_000,
            },
            fused=True,
            slides="all",
        ),
        "smollm3": Family(
            architecture="SmolLM3ForCausalLM",
            defaults={
                "tie_word_embeddings": True,
                "num_key_value_heads": 4,
                "max_position_embeddings": 32_768,
                "rope_theta": 2_000_000.0,
                "pad_token_id": 128_004,
                "bos_token_id": 128_000,
                "eos_token_id": 128_001,
            },
            slides="without_rope",
        ),
        "olmo2": Family(
            architecture="Olmo2ForCausalLM",
            defaults={
                "rms_norm_eps": 1e-5,
                "pad_token_id": 1,
                "bos_token_id": None,
                "eos_token_id": 50_279,
            },
            norms="after",
            normed_heads="row",
        ),
        "granite": Family(
            architecture="GraniteForCausalLM",
            defaults={"attention_multiplier": 1.0},
        ),
    }
)
"""By the `model_type` of their `config.json`."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Architecture of a language model of one of `FAMILIES`; names are Hugging Face's.

    Dropout of attention, which these models can be trained with, is not implemented
    and not read.

    Attributes:
      model_type: The family.
      vocab_size: Rows of the token embedding.
      hidden_size: Width of the residual stream.
      intermediate_size: Width of the hidden layer of each feed-forward part.
      num_hidden_layers: Number of blocks.
      num_attention_heads: Heads of queries of a block.
      num_key_value_heads: Heads of keys and values; divides that of queries.
      head_dim: Width of a head.
      max_position_embeddings: Length of text that the model was made for; `rope` may
        reach further, see `context_length`.
      hidden_act: One of `ACTIVATIONS`.
      rms_norm_eps: Added to mean squares by norms.
      tie_word_embeddings: Whether the token embedding is also the output matrix.
      attention_bias: Whether all linears of attention have biases.
      mlp_bias: Whether those of the feed-forward part have.
      rope: Rotary positions of all layers but those of `local_rope` and without any.
      local_rope: Those of layers with a window, where they have their own.
      no_rope_layers: 0 for every layer without rotary positions, 1 for others; None
        for none without.
      layer_types: "full_attention" or "sliding_attention", for each layer.
      sliding_window: Tokens that the latter look back over, the newest included.
      attention_multiplier: Factor of attention scores; follows from the next one, or
        from `head_dim`, when None.
      query_pre_attn_scalar: One over the square of the same factor.
      attn_logit_softcapping: Bound of the size of scores.
      final_logit_softcapping: Bound of the size of logits.
      embedding_multiplier: Factor of embeddings.
      residual_multiplier: Factor of what a part adds to the stream.
      logits_scaling: What logits are divided by.
      initializer_range: Standard deviation of freshly drawn weights.
      pad_token_id: Token used as padding by the tokenizer.
      bos_token_id: Token that starts a text.
      eos_token_id: Token that ends a text, or several of which any does.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope: Rope = Rope()
    local_rope: Rope | None = None
    no_rope_layers: Counts = None
    layer_types: tuple[str, ...]
    sliding_window: int | None = None
    attention_multiplier: float | None = None
    query_pre_attn_scalar: int | float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: TokenIds = 2

    def __post_init__(self) -> None:
        if self.model_type not in FAMILIES:
            raise UsageError(
                f"`model_type` is {self.model_type!r}; known here are "
                f"{', '.join(FAMILIES)}."
            )
        check_sizes(self, _SIZES)
        if self.num_attention_heads % self.num_key_value_heads:
            raise UsageError(
                f"`num_key_value_heads`={self.num_key_value_heads} must divide "
                f"`num_attention_heads`={self.num_attention_heads}."
            )
        check_known(self, "hidden_act", ACTIVATIONS)
        for rope in (self.rope, self.local_rope):
            if rope is not None:
                rope.rotated(self.head_dim)
        for name in ("layer_types", "no_rope_layers"):
            found = getattr(self, name)
            if found is not None and len(found) < self.num_hidden_layers:
                raise UsageError(
                    f"`{name}` has {len(found)} entries; {self.num_hidden_layers} "
                    "layers need one each."
                )
        if unknown := set(self.layer_types) - {FULL, SLIDING}:
            raise UsageError(
                f"`layer_types` has {min(unknown)!r}; known are {FULL} and {SLIDING}."
            )
        if SLIDING in self.layer_types and self.sliding_window is None:
            raise UsageError(f"`layer_types` has {SLIDING}: give a `sliding_window`.")

    @property
    def family(self) -> Family:
        """What models of this type have in common."""
        return FAMILIES[self.model_type]

    @property
    def context_length(self) -> int:
        """Tokens of the longest text that has positions."""
        positions = self.max_position_embeddings
        # Gemma 3 says the length that its scaling reached.
        return positions if self.local_rope else self.rope.reach(positions)

    @property
    def score_scale(self) -> float:
        """Factor of attention scores."""
        if self.attention_multiplier is not None:
            return self.attention_multiplier
        return float(self.query_pre_attn_scalar or self.head_dim) ** -0.5

    @property
    def embedding_scale(self) -> float:
        """Factor of embeddings."""
        if self.family.scales_embedding:
            return float(self.hidden_size) ** 0.5
        return self.embedding_multiplier

    def window(self, layer: int) -> int | None:
        """Tokens that a layer looks back over; None for all."""
        return self.sliding_window if self.layer_types[layer] == SLIDING else None

    def rope_of(self, layer: int) -> Rope | None:
        """The rotary positions of a layer, if it has any."""
        if self.no_rope_layers is not None and not self.no_rope_layers[layer]:
            return None
        if self.layer_types[layer] == SLIDING and self.local_rope is not None:
            return self.local_rope
        return self.rope

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], source: str) -> "DecoderConfig":
        """Reads the content of a Hugging Face `config.json`, of version 4 or 5.

        Sizes must be present; other fields default as they do at Hugging Face, and
        fields unknown here are ignored.

        Args:
          mapping: The parsed JSON object.
          source: Where it came from, for error messages.

        Returns:
          The configuration.

        Raises:
          CheckpointError: If the model type is none of `FAMILIES`, a size is missing,
            or a value is of the wrong type or not supported; names `source` and the
            field.
        """
        model_type = mapping.get("model_type", "llama")
        if model_type not in FAMILIES:
            raise CheckpointError(
                f"{source}: `model_type` is {model_type!r}; known here are "
                f"{', '.join(FAMILIES)}."
            )
        family = FAMILIES[model_type]
        content = {**family.defaults, **mapping}
        if content.get("use_bidirectional_attention"):
            raise CheckpointError(
                f"{source}: `use_bidirectional_attention` is set; models that read "
                "backwards too do not run here."
            )
        sizes = read_fields(_Sizes, content, source)
        derived = _heads(content, sizes, source)
        derived |= _layers(content, family, sizes, source)
        rope, local = read_ropes(content, source, local_theta=family.local_theta)
        derived |= {"rope": rope, "local_rope": local}
        return read_fields(
            cls, content, source, aliases=family.aliases, fixed=derived, nulls=_NULLS
        )

    def to_dict(self) -> dict[str, Any]:
        """The content of a Hugging Face `config.json`; inverse of `from_dict`."""
        family = self.family
        content: dict[str, Any] = {"architectures": [family.architecture]}
        for field in dataclasses.fields(self):
            name = family.aliases.get(field.name, field.name)
            value = getattr(self, field.name)
            # What is not theirs would mean something to other libraries; tokenizers
            # read there with which token a text begins.
            if value != field.default or name in family.defaults or name in _TOKENS:
                content[name] = value
        del content["layer_types"]
        content.pop("local_rope", None)
        rope = content.pop("rope", self.rope).to_dict()
        content["rope_parameters"] = rope
        if self.local_rope is not None:
            local = self.local_rope.to_dict()
            content["rope_parameters"] = {FULL: rope, SLIDING: local}
        # Where it is a field of its own, it is the one that counts.
        original = self.rope.original_max_position_embeddings
        if original and (name := "original_max_position_embeddings") in family.defaults:
            content[name] = original
        if self.no_rope_layers is not None:
            content["no_rope_layers"] = list(self.no_rope_layers)
        if family.lists_layers:
            content["layer_types"] = list(self.layer_types)
        if family.has_switch:
            content["use_sliding_window"] = SLIDING in self.layer_types
        return content


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    """What other fields follow from."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int

    def __post_init__(self) -> None:
        check_sizes(self, tuple(field.name for field in dataclasses.fields(self)))


def _heads(content: Mapping[str, Any], sizes: _Sizes, source: str) -> dict[str, Any]:
    """Number and width of heads, where the configuration leaves them out."""
    derived = {}
    if content.get("num_key_value_heads") is None:
        derived["num_key_value_heads"] = sizes.num_attention_heads
    if content.get("head_dim") is None:
        try:
            check_heads(sizes)
        except UsageError as error:
            raise CheckpointError(f"{source}: {error}") from error
        derived["head_dim"] = sizes.hidden_size // sizes.num_attention_heads
    return derived


def _layers(
    content: Mapping[str, Any], family: Family, sizes: _Sizes, source: str
) -> dict[str, Any]:
    """Which layers look back over a window, and which have no rotary positions."""
    layers = range(sizes.num_hidden_layers)
    roped = _whole_numbers(content, "no_rope_layers", source)
    if family.slides != "without_rope":
        roped = None
    elif roped is None:
        every = _whole_number(content, "no_rope_layer_interval", 4, source)
        roped = tuple(int((i + 1) % every != 0) for i in layers)
    window = content.get("sliding_window")
    if family.slides == "none" or (
        family.has_switch and not content.get("use_sliding_window")
    ):
        window = None
    late = _whole_number(content, "max_window_layers", 28, source, least=0)
    pattern = _whole_number(content, "sliding_window_pattern", 6, source)
    slides: Callable[[int], bool] = {
        "all": lambda i: True,
        "late": lambda i: i >= late,
        "of_2": lambda i: (i + 1) % 2 != 0,
        "of_6": lambda i: (i + 1) % pattern != 0,
        "without_rope": lambda i: roped is not None and not roped[i],
    }.get(family.slides, lambda i: False)
    types = tuple(SLIDING if window and slides(i) else FULL for i in layers)
    given = content.get("layer_types") if family.lists_layers else None
    if given is not None:
        if not isinstance(given, list | tuple):
            raise CheckpointError(
                f"{source}: field `layer_types` is {given!r}; expected a list."
            )
        types = tuple(map(str, given))
    return {
        "no_rope_layers": roped,
        "layer_types": types,
        "sliding_window": window if SLIDING in types else None,
    }


def _whole_number(
    content: Mapping[str, Any], key: str, default: int, source: str, least: int = 1
) -> int:
    value = content.get(key, default)
    if not isinstance(value, int) or value < least:
        raise CheckpointError(
            f"{source}: field `{key}` is {value!r}; expected a whole number of at "
            f"least {least}."
        )
    return value


def _whole_numbers(
    content: Mapping[str, Any], key: str, source: str
) -> tuple[int, ...] | None:
    """A list of whole numbers, if there is one."""
    value = content.get(key)
    is_list = isinstance(value, list | tuple)
    if value is None or (is_list and all(isinstance(each, int) for each in value)):
        return None if value is None else tuple(map(int, value))
    raise CheckpointError(
        f"{source}: field `{key}` is {value!r}; expected whole numbers."
    )
