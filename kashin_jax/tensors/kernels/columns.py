"""`x @ W` for many rows of x where columns of W can be decoded apart."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kashin_jax.bases import Basis
from kashin_jax.tensors.kashin import KashinLayout, KashinTensor
from kashin_jax.tensors.kernels.planes import plane_count, unpacked
from kashin_jax.tensors.levels import factor_codes, factor_levels, select_levels
from kashin_jax.tensors.products import dot

__all__ = ["columns_product", "most_columns"]


def most_columns(layout: KashinLayout, most: int) -> int | None:
    """Columns of W to decode at a time; None if its codes do not suit this way.

    Whole planes that divide W, in blocks or with whole blocks in them.

    Args:
      layout: Of W.
      most: Weights to decode at a time.
    """
    (m, n), width = layout.shape, layout.block_shape[1]
    if layout.coarse_bits is not None:
        return None
    planes = plane_count(layout.fine_bits)
    fitting = (
        count
        for count in range(planes, min(n, most // m) + 1, planes)
        if n % count == 0 and (width % count == 0 or count % width == 0)
    )
    return max(fitting, default=None)


def columns_product(
    x: Float[Array, "r m"],
    tensor: KashinTensor,
    left: Basis,
    columns: int,
    precision: str | None,
) -> Float[Array, "r n"]:
    """`x @ (U + Q1 V)` in float32, with one product for each weight.

    Args:
      x: Activations.
      tensor: Of a basis on the side of the inputs alone.
      left: Q1.
      columns: From `most_columns`.
      precision: Of the products.
    """
    layout = tensor.layout
    (m, n), (height, width), bits = layout.shape, layout.block_shape, layout.fine_bits
    levels = factor_levels(tensor.centroids, layout.v_bits)

    def product(part: tuple[Array, Array]) -> Float[Array, "r c"]:
        packed, scale = part
        found = []
        for first, codes in enumerate(unpacked(packed, bits)):
            factors = map(select_levels, levels, factor_codes(codes, layout.v_bits))
            u, v = (each.reshape(m // height, height, -1) for each in factors)
            own = scale[:, None, first :: plane_count(bits)]
            w = (u + left.synthesis(v, axis=1)) * own
            found.append(dot(x, w.reshape(m, -1), precision))
        return jnp.stack(found, axis=2).reshape(x.shape[0], columns)

    def by_columns(rows: Array) -> Array:
        return jnp.moveaxis(rows.reshape(rows.shape[0], n // columns, -1), 1, 0)

    scale = jnp.repeat(tensor.scale, width, axis=1)
    parts = by_columns(tensor.packed_codes.reshape(m, -1)), by_columns(scale)
    return jnp.moveaxis(jax.lax.map(product, parts), 0, 1).reshape(x.shape[0], n)
