"""AdamW behind clipping, and the schedules of its learning rate."""

from collections.abc import Callable

import jax
import optax
from jaxtyping import Array, PyTree

__all__ = ["decays", "make_optimizer", "warmup_cosine", "warmup_linear"]


def warmup_cosine(
    *, peak: float, warmup_steps: int, steps: int, final_fraction: float
) -> optax.Schedule:
    """Learning rate of step 0, 1, ...

    Rises linearly from `peak / warmup_steps`, so that no step is wasted at rate zero,
    to the peak at step `warmup_steps`, and falls on a cosine to `final_fraction` of it
    at step `steps`, the first that is not taken.
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / max(warmup_steps, 1),
        peak_value=peak,
        warmup_steps=warmup_steps,
        decay_steps=steps,
        end_value=peak * final_fraction,
    )


def warmup_linear(*, peak: float, warmup_steps: int, steps: int) -> optax.Schedule:
    """Learning rate of step 0, 1, ...

    Rises linearly from zero at step 0 to the peak at step `warmup_steps`, and falls
    linearly to zero at step `steps`, the first that is not taken: the default of
    `transformers` and of BERT's own fine-tuning.
    """
    rise = optax.linear_schedule(0.0, peak, warmup_steps)
    fall = optax.linear_schedule(peak, 0.0, steps - warmup_steps)
    return optax.join_schedules([rise, fall], [warmup_steps])


def decays(params: PyTree[Array]) -> PyTree[bool]:
    """Marks what weight decay applies to: matrices, embeddings among them."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def make_optimizer(
    schedule: optax.Schedule,
    *,
    weight_decay: float,
    clip: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    mask: Callable[[PyTree[Array]], PyTree[bool]] = decays,
) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW.

    Args:
      schedule: Learning rate of every step.
      weight_decay: Decoupled; multiplied by the learning rate.
      clip: Largest global norm of the gradient.
      beta1: Decay of the mean gradient.
      beta2: Decay of the mean squared gradient.
      mask: Marks the parameters that weight decay applies to.

    Returns:
      The optimizer.

    References:
      Loshchilov and Hutter, "Decoupled weight decay regularization" (2019).
    """
    adamw = optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(schedule, b1=beta1, b2=beta2, weight_decay=weight_decay, mask=mask),
    )

    def update(
        grads: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        # Optax raises floats to integer powers, which strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            return adamw.update(grads, state, params)

    return optax.GradientTransformation(adamw.init, update)
