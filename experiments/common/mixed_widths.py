"""Widths that differ from layer to layer, under a total budget of stored bits.

They follow how much a model's predictions suffer from errors in each layer, which takes
no data: the text is the model's own, sampled from it. Each layer in turn is coded at 2
bits, all others left as they are, and the distributions of the next token are compared
with those of the whole model.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key
from tqdm import tqdm

from experiments.common.methods import Width, joint_config
from experiments.common.quantized_layers import QuantizedLayer, decoded_kernels
from experiments.common.resumable import PartialScores
from kashin_jax import BasisSpec, JointKashin
from kashin_jax.evaluation import ScoredBatch
from kashin_jax.methods import encode
from kashin_jax.models.generation import generate
from kashin_jax.models.opt import OPTForCausalLM
from kashin_jax.pipeline import replace_kernels
from kashin_jax.pipeline.allocate import JOINT_ERRORS, allocate_widths
from kashin_jax.tensors import stored_bits

__all__ = [
    "LENGTH",
    "MIXED_NOTE",
    "WINDOWS",
    "layer_sensitivities",
    "mixed_widths",
    "probe",
    "sampled_text",
]

WINDOWS = 4
"""Sampled texts."""

LENGTH = 256
"""Tokens of each, if the model has so many positions."""


def sampled_text(model: OPTForCausalLM, key: Key[Array, ""]) -> Int[Array, "w t"]:
    """Texts drawn from the model itself at temperature 1, each from its first token."""
    begin = model.config.bos_token_id
    prompts = jnp.full((WINDOWS, 1), 0 if begin is None else begin, jnp.int32)
    length = min(LENGTH, model.config.max_position_embeddings)
    return generate(model, prompts, max_new_tokens=length - 1, temperature=1.0, key=key)


def layer_sensitivities(
    model: OPTForCausalLM,
    layers: Mapping[str, QuantizedLayer],
    key: Key[Array, ""],
    store: PartialScores,
) -> dict[str, float]:
    """Divergence of the next-token distributions per relative squared error.

    For each layer the mean Kullback-Leibler divergence, in nats, of the whole model's
    distribution from that of the model with this layer decoded, over the relative
    squared error of the layer; 0 for a layer without error.

    Args:
      model: In full precision.
      layers: All layers, coded at a width at which errors tell.
      key: Of the sampled text.
      store: Where finished layers are read from and written to, one number each.
    """
    done = store.load().tolist()
    if len(done) < len(layers):
        tokens = sampled_text(model, key)
        graphdef, state = nnx.split(model)
        whole = _log_probabilities(graphdef, state, tokens)
    rest = list(layers.items())[len(done) :]
    for path, layer in tqdm(rest, desc="sensitivity", unit="layer", disable=None):
        error = float(layer.report.relative_squared_error)
        other = replace_kernels(model, decoded_kernels({path: layer}))
        graphdef, state = nnx.split(other)
        divergence = float(_divergence(graphdef, state, tokens, whole))
        # Rounding may leave a divergence of zero slightly below it.
        value = max(divergence, 0.0) / error if error > 0 else 0.0
        store.append(ScoredBatch(len(done), np.asarray([value])))
        done.append(value)
    return dict(zip(layers, done, strict=True))


@partial(jax.jit, static_argnums=0)
def _log_probabilities(
    graphdef: Any, state: Any, tokens: Int[Array, "w t"]
) -> Float[Array, "w t v"]:
    logits = nnx.merge(graphdef, state)(tokens)
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)


# One compilation for all layers: parameters are arguments.
@partial(jax.jit, static_argnums=0)
def _divergence(
    graphdef: Any,
    state: Any,
    tokens: Int[Array, "w t"],
    whole: Float[Array, "w t v"],
) -> Float[Array, ""]:
    other = _log_probabilities(graphdef, state, tokens)
    return jnp.mean(jnp.sum(jnp.exp(whole) * (whole - other), axis=-1))


MIXED_NOTE = (
    "Joint coding with a width per layer (2 to 5 bits in halves), chosen under a total "
    "budget of stored bits by what a 2-bit error in that layer alone does to the "
    "next-token distributions, on text sampled from the model itself; `seconds` leaves "
    "that measurement out."
)


def probe(basis: BasisSpec) -> JointKashin:
    """How layers are coded to measure what their errors do."""
    return dataclasses.replace(joint_config(min(JOINT_ERRORS), basis), effort="fast")


def mixed_widths(
    kernels: Mapping[str, Float[Array, "m n"]],
    sensitivities: Mapping[str, float],
    basis: BasisSpec,
    budget: Width,
) -> dict[str, Width]:
    """The width of every layer.

    Args:
      kernels: By path.
      sensitivities: As `layer_sensitivities` measures them.
      basis: Families of the bases of all layers.
      budget: Stored bits per weight of all kernels together.

    Raises:
      ValueError: If the budget is too small for the narrowest width.
    """
    widths = list(JOINT_ERRORS)
    overheads = {
        path: [_overhead(kernel, joint_config(width, basis)) for width in widths]
        for path, kernel in kernels.items()
    }
    return allocate_widths(
        {path: kernel.size for path, kernel in kernels.items()},
        overheads,
        sensitivities,
        widths,
        list(JOINT_ERRORS.values()),
        budget,
    )


def _overhead(kernel: Float[Array, "m n"], config: JointKashin) -> float:
    """Bits stored beside the codes; infinite where the layer cannot have the width."""

    def tensor(kernel: Float[Array, "m n"], key: Key[Array, ""]) -> object:
        return encode(kernel, key, config)[0]

    try:
        shapes = jax.eval_shape(tensor, kernel, jax.random.key(0))
    except ValueError:
        return math.inf
    # As large as what is stored: an eighth of the matrix or less.
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return stored_bits(zeros) - config.bits * kernel.size
