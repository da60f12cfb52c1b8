"""What `quantize` looks at before it codes: on the host, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Int, Num

from kashin_jax.errors import NonFiniteError
from kashin_jax.methods.configs import Method
from kashin_jax.methods.joint.coder import JointKashin

__all__ = ["checked_importance", "checked_in_scale", "require_finite"]


def require_finite(weight: Num[Array, "*shape"], path: str) -> None:
    """Raises NonFiniteError, naming `path`, if `weight` holds NaN or infinity."""
    bad = int(_count_bad(weight))
    if bad:
        raise NonFiniteError(
            f"`{path}` holds {bad} NaN or infinite entries of {weight.size}. Repair "
            "the checkpoint, or leave this parameter out."
        )


@jax.jit
def _count_bad(weight: Num[Array, "*shape"]) -> Int[Array, ""]:
    return jnp.sum(~jnp.isfinite(weight))


def _check_per_input(
    name: str,
    numbers: Num[Array | np.ndarray, " k"],
    inputs: int,
    config: Method,
    path: str,
) -> None:
    if not isinstance(config, JointKashin):
        raise TypeError(
            f"`{path}`: {type(config).__name__} has no use for `{name}`; leave it "
            "out, or take JointKashin."
        )
    if numbers.shape != (inputs,):
        raise ValueError(
            f"`{path}`: `{name}` has shape {numbers.shape}, but the matrix has "
            f"{inputs} inputs; give one number for each."
        )


def checked_in_scale(
    in_scale: Num[Array | np.ndarray, " k"] | None,
    inputs: int,
    config: Method,
    path: str,
) -> Float16[Array, " m"] | None:
    if in_scale is None:
        return None
    _check_per_input("in_scale", in_scale, inputs, config, path)
    # Checked by NumPy, which compiles nothing.
    with np.errstate(over="ignore"):
        scale = np.asarray(jnp.asarray(in_scale)).astype(np.float16)
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise ValueError(
            f"`{path}`: `in_scale` must be finite and positive in half precision."
        )
    return jnp.asarray(scale)


def checked_importance(
    importance: Num[Array | np.ndarray, " k"] | None,
    inputs: int,
    config: Method,
    path: str,
) -> Float[Array, " m"] | None:
    if importance is None:
        return None
    _check_per_input("importance", importance, inputs, config, path)
    weights = np.asarray(jnp.asarray(importance, jnp.float32))
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise ValueError(
            f"`{path}`: `importance` holds NaN, infinite or negative numbers."
        )
    if not weights.any():
        raise ValueError(f"`{path}`: `importance` is zero for every input.")
    return jnp.asarray(weights)
