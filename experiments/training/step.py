"""One optimizer step as a pure, jitted function of state and batch."""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Float, Int, Key, PyTree

from experiments.training.config import TrainConfig
from experiments.training.optimizer import make_optimizer
from kashin_jax.models.opt import OPTConfig, OPTForCausalLM

__all__ = [
    "StepMetrics",
    "TrainState",
    "Trainer",
    "init_state",
    "make_loss",
    "make_trainer",
    "model_graph",
    "train_step",
]

Params: TypeAlias = PyTree[Array]
# Mean loss of windows, given parameters, tokens and the key of dropout.
LossFn: TypeAlias = Callable[
    [Params, Int[Array, "b t"], Key[Array, ""]], Float[Array, ""]
]


class TrainState(NamedTuple):
    """What a checkpoint holds: parameters and moments in float32, steps done."""

    params: Params
    opt_state: optax.OptState
    step: Int[Array, ""]


class StepMetrics(NamedTuple):
    """Of one step, before its update.

    Attributes:
      loss: Nats per token, mean over the batch, with dropout.
      grad_norm: Global norm of the gradient, before clipping.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]


class Trainer(NamedTuple):
    """The compiled step and where its arguments live.

    Attributes:
      step: `(state, batch) -> (state, metrics)`; consumes its state.
      replicated: Placement of the state: a copy on every device.
      batched: Placement of batches: rows of every part spread over the devices.
    """

    step: Callable[[TrainState, Int[Array, "a b t"]], tuple[TrainState, StepMetrics]]
    replicated: NamedSharding
    batched: NamedSharding


def train_step(
    state: TrainState,
    batch: Int[Array, "a b t"],
    *,
    key: Key[Array, ""],
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, StepMetrics]:
    """Takes one optimizer step on the mean loss of a batch.

    Args:
      state: Parameters, moments, steps done.
      batch: Windows in `a` parts that pass through the model one after the other;
        the gradient is the mean over all of them. All but the first token of a window
        are predicted.
      key: Root key of dropout, folded with the number of the step and the part, so
        that no key has to be stored.
      loss_fn: Mean loss of one part.
      optimizer: Turns the gradient into an update.

    Returns:
      The next state and what was measured.
    """
    step_key = jax.random.fold_in(key, state.step)
    value_and_grad = jax.value_and_grad(loss_fn)

    def add_part(
        total: tuple[Float[Array, ""], Params], part: tuple[Array, Array]
    ) -> tuple[tuple[Float[Array, ""], Params], None]:
        index, tokens = part
        new = value_and_grad(state.params, tokens, jax.random.fold_in(step_key, index))
        return jax.tree.map(jnp.add, total, new), None

    parts = batch.shape[0]
    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
    total, _ = jax.lax.scan(add_part, zeros, (jnp.arange(parts), batch))
    loss, grads = jax.tree.map(lambda x: x / parts, total)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = StepMetrics(loss, optax.tree.norm(grads))
    return TrainState(params, opt_state, state.step + 1), metrics


def _build_model(config: TrainConfig, model_config: OPTConfig) -> OPTForCausalLM:
    rngs = nnx.Rngs(params=jax.random.fold_in(jax.random.key(config.seed), 0))
    return OPTForCausalLM(model_config, rngs=rngs, dtype=config.compute_dtype)


def init_state(
    config: TrainConfig, model_config: OPTConfig, placement: Sharding | None = None
) -> TrainState:
    """State before the first step; with no placement on the default device."""

    def init() -> TrainState:
        params = nnx.state(_build_model(config, model_config), nnx.Param)
        moments = make_optimizer(config).init(params)
        return TrainState(params, moments, jnp.zeros((), jnp.int32))

    return jax.jit(init, out_shardings=placement)()


def model_graph(
    config: TrainConfig, model_config: OPTConfig, *, training: bool
) -> nnx.GraphDef:
    """The model without its parameters, with dropout on or off."""
    model = nnx.eval_shape(lambda: _build_model(config, model_config))
    if training:
        model.train()
    return nnx.split(model, nnx.Param)[0]


def make_loss(graphdef: nnx.GraphDef) -> LossFn:
    """Mean cross entropy of all but the first token of every window, in nats."""

    def loss_fn(
        params: Params, tokens: Int[Array, "b t"], key: Key[Array, ""]
    ) -> Float[Array, ""]:
        model = nnx.merge(graphdef, params)
        logits = model(tokens[:, :-1], rngs=nnx.Rngs(dropout=key))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.mean(losses)

    return loss_fn


def make_trainer(config: TrainConfig, model_config: OPTConfig) -> Trainer:
    """Prepares the step for all local devices; it compiles at its first call."""
    mesh = jax.make_mesh((jax.local_device_count(),), ("data",), (AxisType.Auto,))
    replicated = NamedSharding(mesh, PartitionSpec())
    step = functools.partial(
        train_step,
        key=jax.random.fold_in(jax.random.key(config.seed), 1),
        loss_fn=make_loss(model_graph(config, model_config, training=True)),
        optimizer=make_optimizer(config),
    )
    return Trainer(
        step=jax.jit(step, donate_argnums=0, out_shardings=replicated),
        replicated=replicated,
        batched=NamedSharding(mesh, PartitionSpec(None, "data")),
    )
