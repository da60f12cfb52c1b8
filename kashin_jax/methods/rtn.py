"""Round-to-nearest on uniform grids, per output channel or in groups.

Groups run along the input axis of a Flax kernel `[in, out]`, each output channel on
its own, as everybody's groups do (torch weights are `[out, in]`).
"""

import dataclasses
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8

from kashin_jax.methods.base import Encoded, Method, register
from kashin_jax.methods.feedback import CHUNK, RowCode, code_rows
from kashin_jax.packing import pack_matrix
from kashin_jax.tensors import AffineTensor, QuantizedTensor
from kashin_jax.tensors.grouped import GroupLayout, group_rows

__all__ = ["RTN", "AffineCode", "rtn_code"]


@register("rtn")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RTN(Method):
    """Asymmetric round-to-nearest, fp16 step and whole zero point per group.

    Attributes:
      bits: Code width, of the zero points too.
      group_size: Weights of one output channel that share a step; None for the whole
        channel.
      act_order: Whether error feedback codes inputs of large second moments first
        ("act-order" of GPTQ), each with the step that its group has without data, so
        that nothing more is stored. Without it inputs are coded in their order, and
        steps are of what a group has become by then. Coding without data is the same.
    """

    bits: int = 4
    group_size: int | None = 128
    act_order: bool = False

    takes_feedback: ClassVar[bool] = True
    later_fields: ClassVar[frozenset[str]] = frozenset({"act_order"})

    def encode(self, weight: Float[Array, "m n"], key: Key[Array, ""]) -> Encoded:
        """Encodes without any randomness."""
        size = self.group_size or weight.shape[0]
        layout = GroupLayout.of(weight, size, self.bits)
        return Encoded(_encode(weight.astype(jnp.float32), layout))

    def with_feedback(
        self,
        weight: Float[Array, "m n"],
        free: QuantizedTensor,
        moments: Float[Array, "m m"],
    ) -> AffineTensor:
        """GPTQ: inputs in their order, or that of `act_order`."""
        assert isinstance(free, AffineTensor), "a tensor of this method"
        fed = _fed_by_moments if self.act_order else _fed
        return fed(weight.astype(jnp.float32), free, moments)


@partial(jax.jit, static_argnames="layout")
def _encode(x: Float[Array, "m n"], layout: GroupLayout) -> AffineTensor:
    code = rtn_code(group_rows(x, layout.group_size or x.shape[0]), layout.bits)
    zero = pack_matrix(code.zero.astype(jnp.uint8)[:, 0], layout.bits)
    scale = code.scale.astype(jnp.float16)
    return AffineTensor(layout.pack(code.codes), scale, zero, layout)


@jax.jit
def _fed(
    x: Float[Array, "m n"], free: AffineTensor, moments: Float[Array, "m m"]
) -> AffineTensor:
    """Steps of a group are of what it has become when its first input is coded."""
    layout = free.layout
    bits = layout.bits

    def code(grid: _Grid, row: Float[Array, " n"], _: Int[Array, ""]) -> RowCode:
        return _on_grid(row, grid.scale[0], grid.zero[0], bits)

    codes, grids, _ = code_rows(
        x, moments, lambda rows, _: _grid(rows, bits, 0), code,
        group_size=layout.group_size,
    )  # fmt: skip
    return free.replace(
        packed_codes=layout.pack(codes),
        scale=grids.scale.astype(jnp.float16),
        zero=pack_matrix(grids.zero.astype(jnp.uint8)[:, 0], bits),
    )


@jax.jit
def _fed_by_moments(
    x: Float[Array, "m n"], free: AffineTensor, moments: Float[Array, "m m"]
) -> AffineTensor:
    """Large moments first; every input keeps the step that its group has in `free`."""
    layout, m = free.layout, x.shape[0]
    order = jnp.argsort(-jnp.diagonal(moments), stable=True)
    scale, zero = free.scale[:, 0].astype(jnp.float32), free.float_zero()[:, 0]
    group = order // (layout.group_size or m)
    size = min(CHUNK, m)

    def code(
        groups: Int[Array, " size"], row: Float[Array, " n"], k: Int[Array, ""]
    ) -> RowCode:
        return _on_grid(row, scale[groups[k]], zero[groups[k]], layout.bits)

    padded = jnp.pad(group, (0, -m % size))
    codes = code_rows(
        x[order], moments[order][:, order],
        lambda rows, index: jax.lax.dynamic_slice_in_dim(padded, index * size, size),
        code, group_size=size,
    ).codes  # fmt: skip
    return free.replace(packed_codes=layout.pack(codes[jnp.argsort(order)]))


class _Grid(NamedTuple):
    """Step and zero point of groups: half precision and whole numbers, as floats."""

    scale: Float[Array, "*g 1 n"]
    zero: Float[Array, "*g 1 n"]


class AffineCode(NamedTuple):
    """Codes with `w = scale * (code - zero)` in every group.

    Attributes:
      codes: `[groups, size, out]`, rows of the last group padded.
      scale: Step of every group.
      zero: Code that stands for 0; whole for `rtn_code` only.
    """

    codes: UInt8[Array, "g s n"]
    scale: Float[Array, "g 1 n"]
    zero: Float[Array, "g 1 n"]


@partial(jax.jit, static_argnames="bits")
def rtn_code(groups: Float[Array, "g s n"], bits: int) -> AffineCode:
    """Asymmetric round-to-nearest: fp16 step, whole zero point of `bits` bits.

    The range always contains 0, which is then coded exactly: the definition behind
    published "RTN" rows (GPTQ, OmniQuant). A group of zeros has step 0.

    An overflowing fp16 step shows as infinity.
    """
    scale, zero = _grid(groups, bits, 1)
    return AffineCode(_nearest(groups, scale, zero, bits), scale, zero)


def _grid(rows: Float[Array, "*g s n"], bits: int, axis: int) -> _Grid:
    levels = 2**bits - 1
    low = jnp.minimum(jnp.min(rows, axis=axis, keepdims=True), 0.0)
    high = jnp.maximum(jnp.max(rows, axis=axis, keepdims=True), 0.0)
    # Rounded to its stored type first, so that the codes fit the step they decode by.
    scale = ((high - low) / levels).astype(jnp.float16).astype(jnp.float32)
    zero = jnp.clip(jnp.round(-low / jnp.where(scale > 0, scale, 1.0)), 0, levels)
    return _Grid(scale, zero)


def _on_grid(
    row: Float[Array, " n"],
    scale: Float[Array, " n"],
    zero: Float[Array, " n"],
    bits: int,
) -> RowCode:
    codes = _nearest(row, scale, zero, bits)
    return RowCode(codes, scale * (codes.astype(jnp.float32) - zero))


def _nearest(
    x: Float[Array, "*s n"],
    scale: Float[Array, "*g n"],
    zero: Float[Array, "*g n"],
    bits: int,
) -> UInt8[Array, "*s n"]:
    safe = jnp.where(scale > 0, scale, 1.0)
    return jnp.clip(jnp.round(x / safe) + zero, 0, 2**bits - 1).astype(jnp.uint8)
