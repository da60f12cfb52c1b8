"""AdamW with a warm-up and cosine schedule, decaying matrices only."""

import jax
import optax
from jaxtyping import Array, PyTree

from experiments.training.config import TrainConfig

__all__ = ["decays", "make_optimizer", "make_schedule"]


def make_schedule(config: TrainConfig) -> optax.Schedule:
    """Learning rate of step 0, 1, ...

    Rises linearly from `peak / warmup_steps`, so that no step is wasted at rate zero,
    to the peak at step `warmup_steps`, and falls on a cosine to `final_fraction` of it
    at step `steps`, the first that is not taken.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / max(warmup, 1),
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=config.steps,
        end_value=peak * config.final_fraction,
    )


def decays(params: PyTree[Array]) -> PyTree[bool]:
    """Marks what weight decay applies to: matrices, embeddings among them."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW.

    References:
      Loshchilov and Hutter, "Decoupled weight decay regularization" (2019).
    """
    adamw = optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            make_schedule(config),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=decays,
        ),
    )

    def update(
        grads: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        # Optax raises floats to integer powers, which strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            return adamw.update(grads, state, params)

    return optax.GradientTransformation(adamw.init, update)
