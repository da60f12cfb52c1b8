"""A Llama that begins as a smaller OPT, to be distilled from it.

OPT's parts are expressed in Llama's, as far as Llama has them:

- LayerNorm is RMSNorm of a stream without a mean, so whatever writes to the stream
  writes no mean (Ashkboos et al., "SliceGPT" (2024), arXiv:2401.15024); the biases of
  the norms go into the products behind them.
- relu(z) is about silu(s z) / s for a large s, and a gate times one is no gate: the
  other factor starts with a bias of 1 and small weights.
- Fewer layers are those at equal distances, the first and the last included; fewer
  hidden features those of the largest weights in and out, by the product of their
  norms; fewer heads of keys and values are means of neighbours (Ainslie et al., "GQA"
  (2023), arXiv:2305.13245).

What Llama has not is lost: learned positions, of which only their mean stays, and the
bias of the last norm. That is for the training to mend.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from kashin_jax.errors import UsageError
from kashin_jax.models import DecoderConfig, DecoderForCausalLM, OPTForCausalLM
from kashin_jax.models.opt import POSITION_OFFSET

__all__ = ["SHARPNESS", "check_transplant", "kept_layers", "transplant"]

SHARPNESS = 4.0
"""How often gates are steeper than the ReLU that they stand for."""

# Positions behind these exist in the embedded OPT, but are not trained.
_TRAINED = 512


def check_transplant(teacher: OPTForCausalLM, config: DecoderConfig) -> None:
    """Raises UsageError unless a Llama of that configuration can begin as the OPT."""
    theirs = teacher.config
    if not (
        theirs.has_final_layer_norm
        and theirs.enable_bias
        and theirs.layer_norm_elementwise_affine
        and theirs.activation_function == "relu"
    ):
        raise UsageError(
            "`--start=teacher` needs an OPT with norms before its parts and behind the "
            "last, biases and ReLU; give `--start=random`."
        )
    same = {
        "hidden_size": (config.hidden_size, theirs.hidden_size),
        "heads": (config.num_attention_heads, theirs.num_attention_heads),
        "vocab_size": (config.vocab_size, theirs.vocab_size),
        "embedding width": (config.hidden_size, theirs.embedding_size),
    }
    fewer = {
        "layers": (config.num_hidden_layers, theirs.num_hidden_layers),
        "ffn_dim": (config.intermediate_size, theirs.ffn_dim),
    }
    for name, (our, their) in same.items():
        if our != their:
            raise UsageError(f"`--{name}`={our} must be the teacher's {their}.")
    for name, (our, their) in fewer.items():
        if our > their:
            raise UsageError(f"`--{name}`={our} must be at most the teacher's {their}.")


def kept_layers(ours: int, theirs: int) -> list[int]:
    """Layers at equal distances, the first and the last included."""
    return np.round(np.linspace(0, theirs - 1, ours)).astype(int).tolist()


def transplant(
    teacher: OPTForCausalLM,
    student: DecoderForCausalLM,
    key: Key[Array, ""],
    *,
    up_std: float = 0.005,
) -> None:
    """Sets the parameters of a Llama to those of an OPT, as far as it has them.

    Args:
      teacher: Pre-norm, with affine norms and biases.
      student: With biases everywhere, as `attention_bias` and `mlp_bias` ask for;
        changed in place.
      key: Of the weights that start small.
      up_std: Their standard deviation.

    Raises:
      UsageError: If the sizes do not fit.
    """
    check_transplant(teacher, student.config)
    decoder = teacher.decoder
    positions = _value(decoder.embed_positions.embedding)[POSITION_OFFSET:]
    seen = positions[:_TRAINED].mean(axis=0)
    embedding = _value(decoder.embed_tokens.embedding) + seen[None, :]
    _set(student.embed_tokens, embedding=_centred(embedding))
    assert decoder.final_layer_norm is not None
    _set(student.norm, scale=_value(decoder.final_layer_norm.scale))
    kept = kept_layers(len(student.layers), len(decoder.layers))
    for index, (block, theirs) in enumerate(
        zip(student.layers, (decoder.layers[i] for i in kept), strict=True)
    ):
        _attention(block, theirs, student.config)
        shape = block.mlp.up_proj.kernel.shape
        noise = up_std * jax.random.normal(jax.random.fold_in(key, index), shape)
        _feed_forward(block, theirs, noise)


def _attention(block: Any, theirs: Any, config: DecoderConfig) -> None:
    ours, norm = block.self_attn, theirs.self_attn_layer_norm
    _set(block.attn_norm, scale=_value(norm.scale))
    groups = config.num_attention_heads // config.num_key_value_heads
    for name, size in (("q_proj", 1), ("k_proj", groups), ("v_proj", groups)):
        kernel, bias = _behind(norm, getattr(theirs.self_attn, name))
        _set(
            getattr(ours, name),
            kernel=_mean_heads(kernel, config.head_dim, size),
            bias=_mean_heads(bias, config.head_dim, size),
        )
    out = theirs.self_attn.out_proj
    _set(ours.o_proj, **_writing(_value(out.kernel), _value(out.bias)))


def _feed_forward(block: Any, theirs: Any, noise: Float[Array, "d h"]) -> None:
    ours, norm = block.mlp, theirs.final_layer_norm
    _set(block.mlp_norm, scale=_value(norm.scale))
    kernel, bias = _behind(norm, theirs.fc1)
    out = _value(theirs.fc2.kernel)
    kept = _largest(kernel, out, noise.shape[1])
    _set(
        ours.gate_proj,
        kernel=SHARPNESS * kernel[:, kept],
        bias=SHARPNESS * bias[kept],
    )
    _set(ours.up_proj, kernel=noise, bias=jnp.ones(noise.shape[1]))
    down = _writing(out[kept] / SHARPNESS, _value(theirs.fc2.bias))
    _set(ours.down_proj, **down)


def _largest(
    kernel: Float[Array, "d h"], out: Float[Array, "h d"], count: int
) -> Int[Array, " count"]:
    size = jnp.linalg.norm(kernel, axis=0) * jnp.linalg.norm(out, axis=1)
    return jnp.sort(jnp.argsort(-size)[:count])


def _behind(norm: Any, linear: Any) -> tuple[Array, Array]:
    """Kernel and bias of a product whose input has no bias of a norm."""
    kernel = _value(linear.kernel)
    return kernel, _value(linear.bias) + _value(norm.bias) @ kernel


def _writing(kernel: Array, bias: Array) -> Mapping[str, Array]:
    return {"kernel": _centred(kernel), "bias": _centred(bias)}


def _centred(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    return x - x.mean(axis=-1, keepdims=True)


def _mean_heads(
    x: Float[Array, "*n d"], head_dim: int, size: int
) -> Float[Array, "*n d_over_size"]:
    heads = x.reshape(*x.shape[:-1], -1, size, head_dim).mean(axis=-2)
    return heads.reshape(*x.shape[:-1], -1)


def _value(variable: Any) -> Array:
    return jnp.asarray(variable[...], jnp.float32)


def _set(module: Any, **values: Array) -> None:
    for name, value in values.items():
        variable = getattr(module, name)
        variable[...] = value.astype(variable.dtype)
