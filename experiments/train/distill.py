"""The loss of a small language model that learns from a larger one."""

from typing import Any

import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PyTree

from experiments.train.step import LossFn, Params
from kashin_jax.pipeline.refine import divergence

__all__ = ["cross_entropy", "distillation_loss", "language_loss"]


def cross_entropy(
    logits: Float[Array, "b t v"], targets: Int[Array, "b t"]
) -> Float[Array, ""]:
    """Mean negative log likelihood of the targets, in nats."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def language_loss(graphdef: nnx.GraphDef) -> LossFn:
    """Mean cross entropy of all but the first token of every window, in nats."""

    def loss_fn(
        params: Params,
        frozen: PyTree[Array],
        tokens: Int[Array, "b t"],
        key: Key[Array, ""],
    ) -> Float[Array, ""]:
        return cross_entropy(_logits(graphdef, params, tokens, key), tokens[:, 1:])

    return loss_fn


def distillation_loss(
    graphdef: nnx.GraphDef, teacher: nnx.GraphDef, *, weight: float
) -> LossFn:
    """Divergence from a teacher's predictions, and cross entropy of the text.

    Args:
      graphdef: The student without its parameters.
      teacher: The teacher without its parameters, which the step gets as `frozen`.
      weight: Share of the divergence; the rest is that of the cross entropy.

    References:
      Hinton et al., "Distilling the knowledge in a neural network" (2015),
      arXiv:1503.02531, at a temperature of 1.
    """

    def loss_fn(
        params: Params,
        frozen: PyTree[Array],
        tokens: Int[Array, "b t"],
        key: Key[Array, ""],
    ) -> Float[Array, ""]:
        logits = _logits(graphdef, params, tokens, key)
        theirs: Any = nnx.merge(teacher, frozen)
        apart = divergence(theirs(tokens[:, :-1]), logits)
        return weight * apart + (1 - weight) * cross_entropy(logits, tokens[:, 1:])

    return loss_fn


def _logits(
    graphdef: nnx.GraphDef, params: Params, tokens: Int[Array, "b t"], key: Any
) -> Float[Array, "b t v"]:
    model: Any = nnx.merge(graphdef, params)
    inputs = tokens[:, :-1]
    # Decoders of the Llama kind have no dropout, and take no keys.
    if getattr(model.config, "dropout", None) is None:
        return model(inputs)
    return model(inputs, rngs=nnx.Rngs(dropout=key))
