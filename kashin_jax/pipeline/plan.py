"""What quantizing a model would do and what it would take: computed, not tried."""

import math
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kashin_jax.errors import UsageError
from kashin_jax.methods import Method, config_to_json, encode
from kashin_jax.pipeline.policy import Candidate, Choice
from kashin_jax.pipeline.table import aligned

__all__ = ["LayerPlan", "Plan", "make_plan", "method_name"]


class LayerPlan(NamedTuple):
    """What happens to one matrix, and what it will take.

    Attributes:
      choice: The matrix and its method.
      stored_bits: That it will take; in full precision, those of its type.
    """

    choice: Choice
    stored_bits: int

    @property
    def bytes_before(self) -> int:
        return _dense_bits(self.choice.candidate) // 8

    @property
    def bytes_after(self) -> int:
        return self.stored_bits // 8

    @property
    def bits_per_weight(self) -> float:
        return self.stored_bits / max(math.prod(self.choice.candidate.shape), 1)


class Plan(NamedTuple):
    """What happens to a model; printed, it is a table.

    Attributes:
      layers: Every matrix that could be quantized, or might be expected to.
      other_bytes: Of all other parameters: norms, biases.
    """

    layers: tuple[LayerPlan, ...]
    other_bytes: int

    @property
    def quantized(self) -> tuple[LayerPlan, ...]:
        """The matrices that will be packed."""
        return tuple(each for each in self.layers if each.choice.config is not None)

    @property
    def bits_per_weight(self) -> float:
        """Stored, over all matrices that will be packed."""
        weights = sum(math.prod(e.choice.candidate.shape) for e in self.quantized)
        return sum(each.stored_bits for each in self.quantized) / max(weights, 1)

    @property
    def bytes_before(self) -> int:
        """Of all parameters now."""
        return self.other_bytes + sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Of all parameters then, as stored."""
        return self.other_bytes + sum(layer.bytes_after for layer in self.layers)

    def __str__(self) -> str:
        header = ("layer", "shape", "method", "bits/weight", "bytes before", "after")
        rows = [_row(layer) for layer in self.layers]
        rest = f"{self.other_bytes:,}"
        rows.append(("other parameters", "", "", "", rest, rest))
        totals = f"{self.bytes_before:,}", f"{self.bytes_after:,}"
        packed = f"total, {len(self.quantized)} packed"
        rows.append((packed, "", "", f"{self.bits_per_weight:.3f}", *totals))
        return aligned([header, *rows], left=3)


def make_plan(choices: Iterable[Choice], other_bytes: int) -> Plan:
    """Adds sizes, those of the arrays that the coder would return: nothing is coded.

    Args:
      choices: In the order of the table.
      other_bytes: Of all other parameters.

    Raises:
      UsageError: If a method cannot code a matrix; names its path.
    """
    sizes: dict[tuple[tuple[int, ...], str, Method], int] = {}

    def planned(choice: Choice) -> LayerPlan:
        candidate, config = choice.candidate, choice.config
        if config is None:
            return LayerPlan(choice, _dense_bits(candidate))
        *stack, m, n = candidate.shape
        kind = ((m, n), candidate.dtype, config)
        if kind not in sizes:
            sizes[kind] = _coded_bits(*kind, choice.path)
        return LayerPlan(choice, math.prod(stack) * sizes[kind])

    return Plan(tuple(map(planned, choices)), other_bytes)


def method_name(config: Method) -> str:
    """`kashin-joint 4`: the method and its width."""
    return f"{config_to_json(config)['method']} {config.bits}"


def _dense_bits(each: Candidate) -> int:
    return 8 * math.prod(each.shape) * jnp.dtype(each.dtype).itemsize


def _coded_bits(shape: tuple[int, ...], dtype: str, config: Method, path: str) -> int:
    # NumPy's float64 becomes float32 on its way into JAX.
    weight = jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(dtype))
    try:
        tensor, _ = jax.eval_shape(
            partial(encode, config=config), weight, jax.random.key(0)
        )
    except ValueError as error:
        raise UsageError(f"`{path}`: {str(error).splitlines()[0]}") from None
    return sum(8 * leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tensor))


def _row(layer: LayerPlan) -> Iterable[str]:
    candidate, config, reason = layer.choice
    return (
        " = ".join(candidate.paths),
        " x ".join(map(str, candidate.shape)),
        f"stays: {reason}" if config is None else method_name(config),
        f"{layer.bits_per_weight:.3f}",
        f"{layer.bytes_before:,}",
        f"{layer.bytes_after:,}",
    )
