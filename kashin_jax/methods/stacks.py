"""To be removed: names that `pipeline` still imports from here."""

from typing import Any

from kashin_jax.methods.quantize import quantize_stack as quantize_stack


def full_shape(tensor: Any) -> tuple[int, ...]:
    return tuple(tensor.full_shape)
