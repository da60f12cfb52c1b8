"""What a run of `experiments.train_opt` trains: model, loss, recipe, windows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Sharding
from jaxtyping import Array, Float, Int, Key, PyTree

from experiments.train.config import TrainConfig
from experiments.train.corpus import ShuffledStream
from experiments.train.loop import LoopSettings
from experiments.train.optimizer import make_optimizer, warmup_cosine
from experiments.train.step import LossFn, Params
from kashin_jax.models.opt import OPTConfig, OPTForCausalLM

__all__ = [
    "init_params",
    "loop_settings",
    "make_loss",
    "model_graph",
    "read_windows",
    "recipe_optimizer",
    "recipe_schedule",
]


def _build_model(config: TrainConfig, model_config: OPTConfig) -> OPTForCausalLM:
    rngs = nnx.Rngs(params=jax.random.fold_in(jax.random.key(config.seed), 0))
    return OPTForCausalLM(model_config, rngs=rngs, dtype=config.compute_dtype)


def init_params(
    config: TrainConfig, model_config: OPTConfig, placement: Sharding | None = None
) -> Params:
    """Random parameters; with no placement on the default device."""

    def init() -> Params:
        return nnx.state(_build_model(config, model_config), nnx.Param)

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
        params: Params,
        frozen: PyTree[Array],
        tokens: Int[Array, "b t"],
        key: Key[Array, ""],
    ) -> Float[Array, ""]:
        model = nnx.merge(graphdef, params)
        logits = model(tokens[:, :-1], rngs=nnx.Rngs(dropout=key))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.mean(losses)

    return loss_fn


def recipe_schedule(config: TrainConfig) -> optax.Schedule:
    """Warm-up and cosine of a run."""
    return warmup_cosine(
        peak=config.learning_rate,
        warmup_steps=config.warmup_steps,
        steps=config.steps,
        final_fraction=config.final_fraction,
    )


def recipe_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW of a run."""
    return make_optimizer(
        recipe_schedule(config),
        weight_decay=config.weight_decay,
        clip=config.clip,
        beta1=config.beta1,
        beta2=config.beta2,
    )


def read_windows(
    config: TrainConfig, stream: ShuffledStream, step: int
) -> Int[np.ndarray, "a b t"]:
    """The windows of one step, each beginning with the last token of the one before.

    So every token of the stream is predicted exactly once.
    """
    predicted = config.batch_size * config.context
    tokens = stream.read(step * predicted, predicted + 1)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, config.context + 1)
    rows = windows[:: config.context]
    return rows.reshape(config.grad_accumulation, -1, config.context + 1)


def loop_settings(config: TrainConfig) -> LoopSettings:
    """When a run logs, saves, validates and stops."""
    return LoopSettings(
        steps=config.steps,
        stop_after=config.stop_after,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        validate_at=range(config.eval_every, config.steps + 1, config.eval_every),
        unit="tokens",
        units_per_step=config.batch_size * config.context,
        warmup_flag="warmup_steps",
    )
