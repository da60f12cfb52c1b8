"""How much a model's predictions suffer from errors in each layer, without any data.

The text is the model's own: it is sampled from it. Each layer in turn is coded at 2
bits, all others left as they are, and the distributions of the next token are compared
with those of the whole model.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key
from tqdm import tqdm

from experiments.common.layer_store import StoredLayer
from experiments.common.quantized_layers import decoded_kernels
from experiments.common.resumable import PartialScores
from kashin_jax.evaluation import ScoredBatch
from kashin_jax.models.generation import generate
from kashin_jax.models.opt import OPTForCausalLM
from kashin_jax.pipeline import replace_kernels

__all__ = ["LENGTH", "WINDOWS", "layer_sensitivities", "sampled_text"]

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
    layers: Mapping[str, StoredLayer],
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
