"""One optimizer step as a pure, jitted function of state and batch."""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Float, Int, Key, PyTree

from kashin_jax.errors import UsageError

__all__ = [
    "DTYPES",
    "Batch",
    "LossFn",
    "Params",
    "StepMetrics",
    "TrainState",
    "Trainer",
    "check_devices",
    "init_state",
    "make_trainer",
    "train_step",
]

DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
"""What activations may be computed in; weights are float32."""

Params: TypeAlias = PyTree[Array]
Batch: TypeAlias = PyTree[Array]
# Mean loss of the rows of a batch, given what is trained, what is not, the batch, and
# the key of dropout.
LossFn: TypeAlias = Callable[
    [Params, PyTree[Array], Batch, Key[Array, ""]], Float[Array, ""]
]


class TrainState(NamedTuple):
    """What a checkpoint holds: parameters and moments in float32, steps done."""

    params: Params
    opt_state: optax.OptState
    step: Int[Array, ""]


class StepMetrics(NamedTuple):
    """Loss and norm of one step, before its update.

    Attributes:
      loss: Mean over the batch, with dropout.
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

    step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
    replicated: NamedSharding
    batched: NamedSharding


def train_step(
    state: TrainState,
    batch: Batch,
    frozen: PyTree[Array] = (),
    *,
    key: Key[Array, ""],
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, StepMetrics]:
    """Takes one optimizer step on the mean loss of a batch.

    Args:
      state: Parameters, moments, steps done.
      batch: Every leaf has a leading axis of parts that pass through the model one
        after the other; the gradient is the mean over all of them.
      frozen: Arrays that the loss needs and nobody trains.
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
        total: tuple[Float[Array, ""], Params], part: tuple[Array, Batch]
    ) -> tuple[tuple[Float[Array, ""], Params], None]:
        index, rows = part
        part_key = jax.random.fold_in(step_key, index)
        new = value_and_grad(state.params, frozen, rows, part_key)
        return jax.tree.map(jnp.add, total, new), None

    parts = jax.tree.leaves(batch)[0].shape[0]
    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
    total, _ = jax.lax.scan(add_part, zeros, (jnp.arange(parts), batch))
    loss, grads = jax.tree.map(lambda x: x / parts, total)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = StepMetrics(loss, optax.tree.norm(grads))
    return TrainState(params, opt_state, state.step + 1), metrics


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    placement: Sharding | None = None,
) -> TrainState:
    """State before the first step.

    Args:
      params: Where training starts; consumed, the first step may overwrite them.
      optimizer: Whose moments are kept.
      placement: Where all leaves shall live; by default they stay where they are.
    """

    def init(params: Params) -> TrainState:
        return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    return jax.jit(init, out_shardings=placement)(jax.device_put(params, placement))


def make_trainer(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    frozen: PyTree[Array] = (),
) -> Trainer:
    """Prepares the step for all local devices.

    It compiles at its first call, and again for every new shape of a batch.

    Args:
      loss_fn: Mean loss of one part of a batch.
      optimizer: Turns the gradient into an update.
      seed: Of dropout.
      frozen: Arrays that the loss needs and nobody trains. They are arguments of the
        compiled step, since constants of their size would slow its compilation.
    """
    mesh = jax.make_mesh((jax.local_device_count(),), ("data",), (AxisType.Auto,))
    replicated = NamedSharding(mesh, PartitionSpec())
    step = functools.partial(
        train_step,
        key=jax.random.fold_in(jax.random.key(seed), 1),
        loss_fn=loss_fn,
        optimizer=optimizer,
    )
    compiled = jax.jit(step, donate_argnums=0, out_shardings=replicated)
    frozen = jax.device_put(frozen, replicated)
    return Trainer(
        step=lambda state, batch: compiled(state, batch, frozen),
        replicated=replicated,
        batched=NamedSharding(mesh, PartitionSpec(None, "data")),
    )


def check_devices(batch_size: int, parts: int) -> None:
    """Raises UsageError unless the parts of a batch can be spread over the devices."""
    devices = jax.local_device_count()
    if batch_size // parts % devices:
        raise UsageError(
            f"`--batch_size`={batch_size} in {parts} parts does not divide over "
            f"{devices} devices; make it a multiple of {devices * parts}."
        )
