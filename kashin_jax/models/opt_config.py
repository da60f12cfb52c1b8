"""What an OPT checkpoint says about its architecture, read from its `config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.models.config_fields import check_rates, check_sizes, read_fields
from kashin_jax.models.transformer import ACTIVATIONS

__all__ = ["OPTConfig"]

# The only field that Hugging Face spells in a way a dataclass should not.
_ALIASES = {"remove_final_layer_norm": "_remove_final_layer_norm"}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class OPTConfig:
    """Architecture of an OPT language model; field names are Hugging Face's.

    Layer dropping (`layerdrop`) is not implemented and not read; every published
    model has it at 0.

    Attributes:
      vocab_size: Rows of the token embedding.
      hidden_size: Width of the residual stream.
      num_hidden_layers: Number of blocks.
      ffn_dim: Width of the hidden layer of each feed-forward part.
      num_attention_heads: Heads per block; divides `hidden_size`.
      max_position_embeddings: Longest sequence that has positions. Says nothing of
        the length a model was trained at.
      word_embed_proj_dim: Width of the token embedding; `None` means `hidden_size`.
        Where it differs (opt-350m) two linears lead in and out of the stream.
      do_layer_norm_before: Pre-norm blocks and a final layer norm. False is opt-350m:
        post-norm blocks, no final norm.
      remove_final_layer_norm: Leaves the final norm out of a pre-norm model, for
        checkpoints fine-tuned before transformers 4.20.1.
      enable_bias: Whether the linears of the blocks have biases.
      layer_norm_elementwise_affine: Whether layer norms have scale and bias.
      activation_function: One of `ACTIVATIONS`.
      tie_word_embeddings: Whether the token embedding is also the output matrix.
      dropout: Rate on the output of attention and feed-forward parts, training only.
      attention_dropout: Rate on attention probabilities, training only.
      init_std: Standard deviation of freshly drawn weights.
      pad_token_id: Token used as padding by the tokenizer.
      bos_token_id: Token that starts a text.
      eos_token_id: Token that ends a text.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    ffn_dim: int
    num_attention_heads: int
    max_position_embeddings: int
    word_embed_proj_dim: int | None = None
    do_layer_norm_before: bool = True
    remove_final_layer_norm: bool = False
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    activation_function: str = "relu"
    tie_word_embeddings: bool = True
    dropout: float = 0.1
    attention_dropout: float = 0.0
    init_std: float = 0.02
    pad_token_id: int | None = 1
    bos_token_id: int | None = 2
    eos_token_id: int | None = 2

    def __post_init__(self) -> None:
        check_sizes(self, _SIZES)
        if self.activation_function not in ACTIVATIONS:
            raise UsageError(
                f"`activation_function`={self.activation_function!r} is not supported; "
                f"known are {', '.join(ACTIVATIONS)}."
            )
        check_rates(self, ("dropout", "attention_dropout"))

    @property
    def embedding_size(self) -> int:
        """Width of the token embedding."""
        return self.word_embed_proj_dim or self.hidden_size

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def has_final_layer_norm(self) -> bool:
        """Whether a layer norm follows the last block."""
        return self.do_layer_norm_before and not self.remove_final_layer_norm

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], source: str) -> "OPTConfig":
        """Reads the content of a Hugging Face `config.json`.

        Sizes must be present; other fields default as they do at Hugging Face, and
        fields unknown here are ignored.

        Args:
          mapping: The parsed JSON object.
          source: Where it came from, for error messages.

        Returns:
          The configuration.

        Raises:
          CheckpointError: If the model type is not "opt", a size is missing, or a
            value is of the wrong type or not supported; names `source` and the field.
        """
        model_type = mapping.get("model_type", "opt")
        if model_type != "opt":
            raise CheckpointError(
                f"{source}: `model_type` is {model_type!r}; only 'opt' checkpoints can "
                "be loaded here."
            )
        return read_fields(cls, mapping, source, aliases=_ALIASES)

    def to_dict(self) -> dict[str, Any]:
        """The content of a Hugging Face `config.json`; inverse of `from_dict`."""
        fields = dataclasses.asdict(self)
        named = {_ALIASES.get(name, name): value for name, value in fields.items()}
        return {
            "architectures": ["OPTForCausalLM"],
            "model_type": "opt",
            **named,
            "word_embed_proj_dim": self.embedding_size,
        }


_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "ffn_dim",
    "num_attention_heads",
    "max_position_embeddings",
    "word_embed_proj_dim",
)
