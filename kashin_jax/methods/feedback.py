"""Error feedback: inputs coded one after another, what is lost carried on to the rest.

The loss of a layer y = x W, coded as W - E, is tr(E^T H E) with H = E[x x^T]. With the
factors H = F D F^T of `triangular_factors`, F unit block triangular and D block
diagonal, it is the sum of tr(R_j^T D_j R_j) over groups j of inputs, where

    R_j = E_j + sum_i F_ij^T E_i,

the sum over the groups on one side of j. So if groups are coded in an order in which
those come first, each at the target

    T_j = W_j + sum_i F_ij^T E_i,

R_j is no more than what the coder loses of its own target. With groups of one input,
the first input first, that is GPTQ; the last first, LDLQ.

References:
  Frantar et al., "GPTQ: accurate post-training quantization for generative pre-trained
  transformers" (2022), arXiv:2210.17323. Chee et al., "QuIP: 2-bit quantization of
  large language models with guarantees" (2023), arXiv:2307.13304.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from kashin_jax.tensors import QuantizedTensor

__all__ = [
    "CHUNK",
    "CodedRows",
    "RowCode",
    "Triangular",
    "code_rows",
    "damped",
    "damped_in_place",
    "output_loss",
    "triangular_factors",
]

CHUNK = 128
"""Rows whose targets are made of all others at once; within them one by one."""


class Triangular(NamedTuple):
    """`H = F D F^T` in blocks of `size` inputs.

    Attributes:
      factor: F, unit block triangular: below the diagonal for `last_first`, else above.
      metric: The blocks of D.
    """

    factor: Float[Array, "m m"]
    metric: Float[Array, "g size size"]


def _damped(
    moments: Float[Array, "m m"], damping: float | Float[Array, ""]
) -> Float[Array, "m m"]:
    """Second moments with a share of their mean added to every one of the diagonal."""
    extra = damping * jnp.mean(jnp.diagonal(moments))
    return moments + extra * jnp.eye(moments.shape[0], dtype=moments.dtype)


damped = jax.jit(_damped)
# The moments given are no more, as others of that size are to come.
damped_in_place = jax.jit(_damped, donate_argnums=0)


@partial(jax.jit, static_argnames=("size", "last_first"))
def triangular_factors(
    moments: Float[Array, "m m"],
    size: int,
    *,
    last_first: bool,
    order: Int[Array, " m"] | None = None,
) -> Triangular:
    """Factors second moments for groups of `size` inputs, which divides them.

    Args:
      moments: Symmetric and positive definite; where they are not, all is NaN.
      size: Inputs of a group.
      last_first: Whether the last group is to be coded first.
      order: In which inputs are taken; None for that of the moments.
    """
    m = moments.shape[0]
    # Unit diagonal first: inputs may differ by 1e4, and float32 has seven digits.
    root = jnp.sqrt(jnp.diagonal(moments))
    if order is not None:
        # The diagonal is read before: behind a gather, XLA holds a third matrix.
        root, moments = root[order], moments[order][:, order]
    scaled = moments / root[:, None] / root[None, :]
    if not last_first:
        scaled = scaled[::-1, ::-1]
    lower = jnp.linalg.cholesky(scaled)
    if not last_first:
        lower = lower[::-1, ::-1]
    lower = root[:, None] * lower
    grid = lower.reshape(m // size, size, m // size, size)
    blocks = jnp.moveaxis(jnp.diagonal(grid, axis1=0, axis2=2), -1, 0)
    # F = C B^-1, B the diagonal blocks of C, which are triangular themselves.
    columns = grid.reshape(m, m // size, size).transpose(1, 2, 0)
    factor = jax.scipy.linalg.solve_triangular(
        blocks, columns, trans="T", lower=last_first
    )
    metric = jnp.einsum("gij,gkj->gik", blocks, blocks, precision="highest")
    return Triangular(factor.transpose(2, 0, 1).reshape(m, m), metric)


@jax.jit
def output_loss(
    weight: Float[Array, "m n"],
    moments: Float[Array, "k k"],
    tensor: QuantizedTensor | None = None,
    unit: float | Float[Array, ""] = 1.0,
    out_moments: Float[Array, "n n"] | None = None,
) -> Float[Array, ""]:
    """tr(E^T H E): the mean square of what is lost of x W, summed over outputs.

    Args:
      weight: The matrix.
      moments: H, the second moments of x; or those of (x, d), `k = 2 m`, where
        (x + d) W is what x is to give, as in `asymmetric_target`.
      tensor: What the matrix became, E being the difference; None for nothing at all,
        so that E is the matrix.
      unit: What E is measured in: squares of 1e30 leave float32.
      out_moments: G of tr(G E^T H E), in which outputs matter as G has it; None for
        the identity.
    """
    w = weight.astype(jnp.float32)
    error = w if tensor is None else w - tensor.decode()
    if moments.shape[0] > w.shape[0]:
        error = jnp.concatenate([error, w])
    error = error / unit
    lost = jnp.einsum("ij,jn->in", moments, error, precision="highest")
    if out_moments is not None:
        lost = jnp.einsum("in,nk->ik", lost, out_moments, precision="highest")
    return jnp.sum(error * lost)


class RowCode(NamedTuple):
    """What a code makes of a row.

    Attributes:
      codes: Of every weight.
      values: What they stand for.
      stored: What else is stored of the row, such as levels of its own.
    """

    codes: UInt8[Array, " n"]
    values: Float[Array, " n"]
    stored: Any = None


class CodedRows(NamedTuple):
    """What became of all rows.

    Attributes:
      codes: Of every weight.
      prepared: What `prepare` gave of every group, stacked.
      stored: What `code` stored of every row, stacked.
    """

    codes: UInt8[Array, "m n"]
    prepared: Any
    stored: Any


def code_rows(
    weight: Float[Array, "m n"],
    moments: Float[Array, "m m"],
    prepare: Callable[[Float[Array, "size n"], Int[Array, ""]], Any],
    code: Callable[[Any, Float[Array, " n"], Int[Array, ""]], RowCode],
    *,
    group_size: int | None = None,
) -> CodedRows:
    """Codes input after input, the first one first, with error feedback.

    Args:
      weight: The matrix, `[in, out]`.
      moments: Damped second moments of the inputs.
      prepare: Called with the rows of a group as the errors of those before it have
        changed them, and its index; what it gives, its scales say, is handed to `code`
        for each row.
      code: Codes a row; the last argument is its place within the group.
      group_size: Rows of a group; None if groups do not matter.
    """
    m, n = weight.shape
    size = group_size or min(CHUNK, m)
    count = -(-m // size)
    rest = count * size - m
    # Rows that fill the last group have nothing to do with the others.
    w = jnp.pad(weight, ((0, rest), (0, 0))).reshape(count, size, n)
    factor = triangular_factors(moments, 1, last_first=False).factor
    factor = jnp.pad(factor, ((0, rest), (0, rest)))
    factor = factor.at[jnp.arange(m, m + rest), jnp.arange(m, m + rest)].set(1.0)

    def of_group(
        error: Float[Array, "k n"], index: Int[Array, ""]
    ) -> tuple[Array, tuple[Array, Any, Any]]:
        columns = jax.lax.dynamic_slice_in_dim(factor, index * size, size, axis=1)
        within = jax.lax.dynamic_slice_in_dim(columns, index * size, size, axis=0)
        own = w[index]
        fed = jnp.einsum("ij,in->jn", columns, error, precision="highest")
        # What the rows would be if none of the group lost anything of its target.
        prepared = prepare(
            own + jax.scipy.linalg.solve_triangular(within, fed, trans="T"), index
        )
        within = jnp.triu(within, 1)

        def of_row(
            lost: Float[Array, "size n"], k: Int[Array, ""]
        ) -> tuple[Array, tuple[Array, Any]]:
            more = jnp.einsum("i,in->n", within[:, k], lost, precision="highest")
            found = code(prepared, own[k] + fed[k] + more, k)
            lost = lost.at[k].set(own[k] - found.values)
            return lost, (found.codes, found.stored)

        lost, rows = jax.lax.scan(of_row, jnp.zeros_like(own), jnp.arange(size))
        start = (index * size, 0)
        return jax.lax.dynamic_update_slice(error, lost, start), (*rows, prepared)

    error = jnp.zeros((count * size, n), jnp.float32)
    _, (codes, stored, prepared) = jax.lax.scan(of_group, error, jnp.arange(count))

    def joined(leaf: Array) -> Array:
        return leaf.reshape(count * size, *leaf.shape[2:])[:m]

    return CodedRows(joined(codes), prepared, jax.tree.map(joined, stored))
