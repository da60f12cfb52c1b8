"""Widths that differ from layer to layer, under a total budget of stored bits."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from experiments.common.methods import Width, joint_config
from kashin_jax import BasisSpec, JointKashin
from kashin_jax.methods import encode
from kashin_jax.pipeline.allocate import JOINT_ERRORS, allocate_widths
from kashin_jax.tensors import stored_bits

__all__ = ["MIXED_NOTE", "mixed_widths", "probe"]

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
