"""GPT-2 and GPT-NeoX (Pythia): decoders with layer norms, in Flax NNX.

They differ from those of the Llama kind in their blocks alone: layer norms, one matrix
for queries, keys and values, biases everywhere, no gate. GPT-2 has a table of
positions, NeoX turns a part of each head and may compute both parts of a block side by
side.
"""

import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from kashin_jax.errors import CheckpointError
from kashin_jax.models.architecture import Architecture
from kashin_jax.models.config_fields import (
    TokenIds,
    check_heads,
    check_known,
    check_sizes,
    read_fields,
)
from kashin_jax.models.decoder import DecoderForCausalLM
from kashin_jax.models.names import Names
from kashin_jax.models.rope import Angles, Rope, read_ropes, rotate
from kashin_jax.models.transformer import (
    ACTIVATIONS,
    LayerCache,
    LayerFactory,
    LayerNorm,
    Past,
    attend,
    remember,
    split_heads,
)

__all__ = ["GPTS", "GPTBlock", "GPTConfig", "GPTForCausalLM"]

_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
# GPT-2's own words.
_ALIASES: Mapping[str, Mapping[str, str]] = {
    "gpt2": {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
        "hidden_act": "activation_function",
        "layer_norm_eps": "layer_norm_epsilon",
    },
    "gpt_neox": {},
}
# What transformers takes for fields that are left out, in these words.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {
        "n_inner": None,
        "n_positions": 1024,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
        "bos_token_id": 50_256,
        "eos_token_id": 50_256,
    },
    "gpt_neox": {"use_parallel_residual": True, "bos_token_id": 0, "eos_token_id": 2},
}
_ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "gpt_neox": "GPTNeoXForCausalLM"}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Architecture of a GPT-2 or GPT-NeoX language model.

    Field names are those of NeoX at Hugging Face. Dropout, which these models can be
    trained with, is not implemented and not read.

    Attributes:
      model_type: "gpt2" or "gpt_neox".
      vocab_size: Rows of the token embedding.
      hidden_size: Width of the residual stream.
      num_hidden_layers: Number of blocks.
      num_attention_heads: Heads per block; divides `hidden_size`.
      intermediate_size: Width of the hidden layer of each feed-forward part.
      max_position_embeddings: Longest sequence that has positions.
      hidden_act: One of `ACTIVATIONS`.
      layer_norm_eps: Added to variances by layer norms.
      tie_word_embeddings: Whether the token embedding is also the output matrix.
      attention_bias: Whether the linears of attention have biases.
      use_parallel_residual: Whether both parts of a block read the same input.
      rope: Rotary positions; None for a table of positions.
      scale_attn_by_inverse_layer_idx: Whether scores of block i, from 0, are divided by
        i + 1.
      initializer_range: Standard deviation of freshly drawn weights.
      pad_token_id: Token used as padding by the tokenizer.
      bos_token_id: Token that starts a text.
      eos_token_id: Token that ends a text, or several of which any does.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 2048
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    attention_bias: bool = True
    use_parallel_residual: bool = False
    rope: Rope | None = None
    scale_attn_by_inverse_layer_idx: bool = False
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: TokenIds = None

    def __post_init__(self) -> None:
        check_sizes(self, _SIZES)
        check_heads(self)
        check_known(self, "hidden_act", ACTIVATIONS)
        if self.rope is not None:
            self.rope.rotated(self.head_dim)

    # What the shell of a decoder asks for.
    sliding_window = None
    embedding_scale = logits_scaling = 1.0
    final_logit_softcapping = None

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """Heads of keys and values: every head has its own."""
        return self.num_attention_heads

    @property
    def context_length(self) -> int:
        """Tokens of the longest text that has positions."""
        positions = self.max_position_embeddings
        return positions if self.rope is None else self.rope.reach(positions)

    def window(self, layer: int) -> None:
        """All layers look back over the whole text."""

    def rope_of(self, layer: int) -> Rope | None:
        """The rotary positions of a layer, the same for all."""
        return self.rope

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], source: str) -> "GPTConfig":
        """Reads the content of a Hugging Face `config.json`; see `DecoderConfig`.

        Raises:
          CheckpointError: If the model type is another one, a size is missing, or a
            value is of the wrong type or not supported; names `source` and the field.
        """
        model_type = mapping.get("model_type", "gpt2")
        if model_type not in _DEFAULTS:
            raise CheckpointError(
                f"{source}: `model_type` is {model_type!r}; known here are "
                f"{', '.join(_DEFAULTS)}."
            )
        content = {"model_type": model_type, **_DEFAULTS[model_type], **mapping}
        if content.get("scale_attn_weights") is False:
            raise CheckpointError(
                f"{source}: `scale_attn_weights` is false; such models do not run here."
            )
        rope = None
        if model_type == "gpt_neox":
            words = {
                "rope_theta": content.get("rotary_emb_base"),
                "partial_rotary_factor": content.get("rotary_pct", 0.25),
            }
            rope, _ = read_ropes(words | content, source)
        elif content["n_inner"] is None and isinstance(content.get("n_embd"), int):
            content["n_inner"] = 4 * content["n_embd"]
        aliases = _ALIASES[model_type]
        return read_fields(cls, content, source, aliases=aliases, fixed={"rope": rope})

    def to_dict(self) -> dict[str, Any]:
        """The content of a Hugging Face `config.json`; inverse of `from_dict`."""
        aliases = _ALIASES[self.model_type]
        content: dict[str, Any] = {"architectures": [_ARCHITECTURES[self.model_type]]}
        for field in dataclasses.fields(self):
            content[aliases.get(field.name, field.name)] = getattr(self, field.name)
        rope = content.pop("rope")
        if rope is not None:
            content["rope_parameters"] = rope.to_dict()
        return content


class GPTBlock(nnx.Module):
    """Attention and feed-forward part, one behind the other or side by side."""

    def __init__(self, config: GPTConfig, layer: int, make: LayerFactory):
        width, hidden = config.hidden_size, config.intermediate_size
        bias = config.attention_bias
        self.attn_norm = _norm(config, make)
        self.qkv_proj = make.linear(width, 3 * width, use_bias=bias)
        self.o_proj = make.linear(width, width, use_bias=bias)
        self.mlp_norm = _norm(config, make)
        self.up_proj = make.linear(width, hidden)
        self.down_proj = make.linear(hidden, width)
        self.config = config
        divisor = layer + 1 if config.scale_attn_by_inverse_layer_idx else 1
        self.score_scale = float(config.head_dim) ** -0.5 / divisor

    def __call__(
        self,
        x: Float[Array, "b t d"],
        visible: Bool[Array, "b 1 t s"],
        turn: Angles | None,
        past: Past | None = None,
    ) -> tuple[Float[Array, "b t d"], LayerCache]:
        queries, keys, values = self._heads(self.qkv_proj(self.attn_norm(x)))
        if turn is not None:
            queries, keys = rotate(queries, turn), rotate(keys, turn)
        cache = remember(LayerCache(keys=keys, values=values), past)
        mixed = attend(
            queries, cache["keys"], cache["values"], visible, scale=self.score_scale
        )
        attended = x + self.o_proj(mixed)
        read = x if self.config.use_parallel_residual else attended
        h = ACTIVATIONS[self.config.hidden_act](self.up_proj(self.mlp_norm(read)))
        return attended + self.down_proj(h), cache

    def _heads(
        self, row: Float[Array, "b t e"]
    ) -> tuple[Float[Array, "b t heads head_dim"], ...]:
        """Queries, keys and values; NeoX has those of a head side by side."""
        head_dim = self.config.head_dim
        if self.config.model_type == "gpt_neox":
            return tuple(jnp.split(split_heads(row, 3 * head_dim), 3, axis=-1))
        return tuple(split_heads(part, head_dim) for part in jnp.split(row, 3, axis=-1))


class GPTForCausalLM(DecoderForCausalLM):
    """A GPT-2 or GPT-NeoX language model; called as `DecoderForCausalLM`.

    Attributes:
      embed_positions: Table of positions; None where there are rotary ones.

    References:
      Radford et al., "Language models are unsupervised multitask learners" (2019);
      Black et al., "GPT-NeoX-20B" (2022), arXiv:2204.06745; Biderman et al., "Pythia"
      (2023), arXiv:2304.01373.
    """

    def __init__(
        self,
        config: GPTConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        """Draws fresh weights; arguments are those of `DecoderForCausalLM`."""
        make = LayerFactory(
            init_std=config.initializer_range,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        width, positions = config.hidden_size, config.max_position_embeddings
        self.config: Any = config
        self.dtype = dtype
        self.embed_tokens = make.embed(config.vocab_size, width)
        self.embed_positions = (
            make.embed(positions, width) if config.rope is None else None
        )
        self.layers = nnx.List(
            [GPTBlock(config, i, make) for i in range(config.num_hidden_layers)]
        )
        self.norm: Any = _norm(config, make)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else make.linear(width, config.vocab_size, use_bias=False)
        )

    def _embed(
        self, input_ids: Int[Array, "b t"], positions: Int[Array, "b t"]
    ) -> Float[Array, "b t d"]:
        x = self.embed_tokens(input_ids)
        if self.embed_positions is None:
            return x
        # Padding has position -1.
        return x + self.embed_positions(jnp.maximum(positions, 0))


def _norm(config: GPTConfig, make: LayerFactory) -> LayerNorm:
    return make.layer_norm(config.hidden_size, epsilon=config.layer_norm_eps)


def _architecture(model_type: str, names: Names) -> Architecture:
    return Architecture(
        model_type=model_type,
        config=GPTConfig,
        model=GPTForCausalLM,
        names=names,
        tied=(("lm_head", "kernel"), ("embed_tokens", "embedding")),
        tied_by_default=bool(_DEFAULTS[model_type].get("tie_word_embeddings", False)),
    )


def _blocks(published: str, modules: Mapping[str, str]) -> dict[str, str]:
    """Names of the modules of a block, which is published as `published.NUMBER`."""
    return {
        f"layers.*.{ours}": f"{published}.*.{name}" for ours, name in modules.items()
    }


_GPT2 = _architecture(
    "gpt2",
    Names(
        prefix="transformer.",
        modules=MappingProxyType(
            {"embed_tokens": "wte", "embed_positions": "wpe", "norm": "ln_f"}
            | _blocks(
                "h",
                {
                    "attn_norm": "ln_1",
                    "qkv_proj": "attn.c_attn",
                    "o_proj": "attn.c_proj",
                    "mlp_norm": "ln_2",
                    "up_proj": "mlp.c_fc",
                    "down_proj": "mlp.c_proj",
                },
            )
        ),
        # Masks were stored once.
        ignored=re.compile(r"h\.\d+\.attn\.(bias|masked_bias)$"),
        # Their Conv1D.
        untransposed=re.compile(r"h\.\d+\.(attn|mlp)\.c_\w+\.weight$"),
    ),
)
_NEOX = _architecture(
    "gpt_neox",
    Names(
        prefix="gpt_neox.",
        bare=frozenset({"embed_out"}),
        modules=MappingProxyType(
            {
                "embed_tokens": "embed_in",
                "norm": "final_layer_norm",
                "lm_head": "embed_out",
            }
            | _blocks(
                "layers",
                {
                    "attn_norm": "input_layernorm",
                    "qkv_proj": "attention.query_key_value",
                    "o_proj": "attention.dense",
                    "mlp_norm": "post_attention_layernorm",
                    "up_proj": "mlp.dense_h_to_4h",
                    "down_proj": "mlp.dense_4h_to_h",
                },
            )
        ),
        ignored=re.compile(
            r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$"
        ),
    ),
)
GPTS: tuple[Architecture, ...] = (_GPT2, _NEOX)
"""Entries of the registry."""
