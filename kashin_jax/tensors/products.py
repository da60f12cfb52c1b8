"""`x @ W` for a packed W: which kernel multiplies, by kind of tensor and platform.

A kernel is a function `(rows, tensor, bases, options) -> [r, n]`, registered once.
Those of a platform are chosen when a program is lowered for that platform, so that a
program traced on one machine may be compiled for another.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from kashin_jax.tensors.partitioning import OUTPUTS, Axes, cut_product

__all__ = [
    "MANY_ROWS",
    "MAX_TILE",
    "Kernel",
    "ProductOptions",
    "dot",
    "kernels_of",
    "matmul",
    "register_kernel",
    "transposed_matmul",
]

# Most weights decoded at a time: 4 MiB as float32, which a CPU core's cache holds.
MAX_TILE = 2**20

MANY_ROWS = 320
"""Rows of x from which on parts of W are decoded whole.

For joint codes of 4 bits, 4096 x 4096, two CPU cores take 2.7 times as long as for the
dense product with 256 rows by planes and 2.9 times by parts of W, with 384 rows 2.6 and
2.4, with 512 2.7 and 2.2.
"""


class ProductOptions(NamedTuple):
    """How a product is computed: sizes of tiles, and precision.

    Attributes:
      max_tile: Most weights decoded at a time.
      precision: Precision of the products, as for `jnp.matmul`.
      many_rows: Rows of x from which on parts of W are decoded whole.
      is_local: Whether no compiler will divide the product among devices, after it was
        traced: kernels that are calls of compiled code cannot be divided.
    """

    max_tile: int = MAX_TILE
    precision: str | None = None
    many_rows: int = MANY_ROWS
    is_local: bool = True


Kernel = Callable[[Array, Any, Any, ProductOptions], Array]

_Registry = dict[type, dict[str | None, Kernel]]
# By kind of tensor, then by platform; None stands for all others.
_KERNELS: _Registry = {}
_TRANSPOSED: _Registry = {}


def register_kernel(
    kind: type,
    kernel: Kernel,
    platform: str | None = None,
    *,
    is_transposed: bool = False,
) -> None:
    """Says how matrices of a kind are multiplied.

    Args:
      kind: Class of the packed matrix; its subclasses inherit.
      kernel: Takes rows of x, the matrix, its bases and `ProductOptions`.
      platform: As JAX calls it when lowering: `cpu`, `cuda`, `rocm` or `tpu`; None for
        all that have no kernel of their own.
      is_transposed: Whether its product is `x @ W.T`, that of a tied head, in place of
        `x @ W`.
    """
    registry = _TRANSPOSED if is_transposed else _KERNELS
    registry.setdefault(kind, {})[platform] = kernel


def kernels_of(
    kind: type, *, is_transposed: bool = False
) -> tuple[tuple[str | None, Kernel], ...]:
    """The kernels of a kind of matrix by platform, that for all others first."""
    default = _decoded_transposed if is_transposed else _decoded_product
    found: dict[str | None, Kernel] = {None: default}
    for cls in reversed(kind.__mro__):
        found |= (_TRANSPOSED if is_transposed else _KERNELS).get(cls, {})
    return tuple(found.items())


def matmul(
    x: Float[Array | np.ndarray, "*b m"],
    tensor: Any,
    *,
    max_tile: int = MAX_TILE,
    precision: str | None = None,
    many_rows: int | None = None,
) -> Float[Array, "*b n"]:
    """`x @ W` in the type of `x`, accumulated in float32; `x @ tensor` is the same.

    For a `KashinTensor` this is x U + ((x Q1) V) Q2^T: the transforms act on the
    activations, and U and V are decoded a bounded part at a time; for many rows of x
    parts of W are, where blocks are smaller than a part. Grids and codebooks are
    decoded in parts too, and those that were rotated rotate activations. Matrices of
    kinds without a kernel are decoded whole.

    Args:
      x: Activations, any batch axes.
      tensor: The matrix; `prepare(tensor)` where its bases are used again.
      max_tile: Most weights decoded at a time.
      precision: Precision of the products, as for `jnp.matmul`.
      many_rows: Rows of x from which on parts of W are decoded whole; None takes
        `MANY_ROWS`.

    Raises:
      TypeError: If `x` is not floating point.
      ValueError: If the last axis of `x` does not match the matrix.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`x` has type {x.dtype}; cast it to float first.")
    if x.shape[-1:] != tensor.shape[:1]:
        raise ValueError(
            f"`x` has {x.shape[-1] if x.ndim else 'no'} features, but the quantized "
            f"matrix has shape {tensor.shape} [in, out]."
        )
    prepared = tensor.prepare()
    many = MANY_ROWS if many_rows is None else many_rows
    options = ProductOptions(max_tile, precision, many)
    kernels = kernels_of(type(prepared.tensor))
    return _product(x, prepared.tensor.fitted(), prepared.bases, kernels, options)


def transposed_matmul(
    x: Float[Array, "r n"], tensor: Any, bases: Any
) -> Float[Array, "r m"]:
    """`x @ W.T` in the type of `x`, accumulated in float32, by the kernel for it.

    Args:
      x: Rows.
      tensor: The matrix.
      bases: From `derive_bases`.
    """
    kernels = kernels_of(type(tensor), is_transposed=True)
    return _transposed(x, tensor, bases, kernels=kernels)


@partial(jax.jit, static_argnames="kernels", inline=True)
def _transposed(
    x: Float[Array, "r n"],
    tensor: Any,
    bases: Any,
    *,
    kernels: tuple[tuple[str | None, Kernel], ...],
) -> Float[Array, "r m"]:
    # Over explicit axes, too, whatever multiplies is XLA's.
    options = ProductOptions(is_local=_is_local())
    return _whole_product(x, tensor, bases, kernels=kernels, options=options)


# `inline`: one program where it is called as it is, and no trace of it in those of
# others. Kernels are part of the key, so that one registered later is not missed.
@partial(jax.jit, static_argnames=("kernels", "options"), inline=True)
def _product(
    x: Float[Array, "*b m"],
    tensor: Any,
    bases: Any,
    kernels: tuple[tuple[str | None, Kernel], ...],
    options: ProductOptions,
) -> Float[Array, "*b n"]:
    codes = jax.typeof(tensor.packed_codes).sharding
    explicit = [
        each
        for each in (jax.typeof(x).sharding, codes)
        if any(axis is not None for axis in each.spec)
    ]
    if explicit:
        # Over explicit axes kernels would have to say how each reshape is laid out.
        # What they make of rows is left to XLA; the batch axes stay as they are, and
        # outputs lie as those of the matrix do.
        batch = (*jax.typeof(x).sharding.spec,)[: x.ndim - 1]
        lies = zip(tensor.leaf_axes().get("packed_codes", ()), codes.spec, strict=False)
        outputs = dict(lies).get(OUTPUTS)
        spec = PartitionSpec(*batch, None if outputs in batch else outputs)
        free = jax.sharding.auto_axes(
            partial(_product_of_rows, kernels=kernels, options=options),
            out_sharding=NamedSharding(explicit[0].mesh, spec),
        )
        y: Array = free(x, tensor, bases)
        return y
    return _product_of_rows(x, tensor, bases, kernels=kernels, options=options)


def _product_of_rows(
    x: Float[Array, "*b m"],
    tensor: Any,
    bases: Any,
    *,
    kernels: tuple[tuple[str | None, Kernel], ...],
    options: ProductOptions,
) -> Float[Array, "*b n"]:
    rows = x.reshape(-1, x.shape[-1])
    is_local = _is_local()
    run = partial(_whole_product, kernels=kernels, options=options)
    whole = partial(run, options=options._replace(is_local=is_local))
    if is_local or max(tensor.cuts()) == 1:
        y = whole(rows, tensor, bases)
    else:
        # What is divided here are its arguments: products of parts are local.
        y = _cut_product(run, whole, rows, tensor, bases)
    return y.reshape(*x.shape[:-1], tensor.shape[1])


def _is_local() -> bool:
    """Whether nobody will divide among devices what is traced now."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.axis_names and set(mesh.manual_axes) == set(mesh.axis_names):
        return True
    return max(jax.device_count(), jax.device_count("cpu")) == 1


def _cut_product(
    run: Callable[..., Array],
    whole: Callable[..., Array],
    rows: Float[Array, "r m"],
    tensor: Any,
    bases: Any,
) -> Float[Array, "r n"]:
    """A product whose parts are multiplied where they lie."""
    axes, (leaves, treedef) = tensor.leaf_axes(), jax.tree.flatten((tensor, bases))
    known = [axes[name] for name, leaf in tensor.leaves().items() if leaf is not None]
    # Bases are those of one block: each device has them.
    others: list[Axes] = [(None,) * leaf.ndim for leaf in leaves[len(known) :]]

    def of_leaves(product: Callable[..., Array], rows: Array, *leaves: Array) -> Array:
        own, bases = jax.tree.unflatten(treedef, leaves)
        return product(rows, own.fitted(), bases)

    part, undivided = partial(of_leaves, run), partial(of_leaves, whole)
    cuts = tensor.cuts()
    return cut_product(part, undivided, rows, leaves, [*known, *others], cuts)


def _whole_product(
    rows: Float[Array, "r m"],
    tensor: Any,
    bases: Any,
    *,
    kernels: tuple[tuple[str | None, Kernel], ...],
    options: ProductOptions,
) -> Float[Array, "r n"]:
    (_, default), *own = kernels
    if not own:
        return default(rows, tensor, bases, options).astype(rows.dtype)
    y: Array = jax.lax.platform_dependent(
        rows, tensor, bases,
        default=partial(_called, default, options),
        **{str(name): partial(_called, kernel, options) for name, kernel in own},
    )  # fmt: skip
    return y


def _called(
    kernel: Kernel, options: ProductOptions, rows: Array, tensor: Any, bases: Any
) -> Array:
    return kernel(rows, tensor, bases, options).astype(rows.dtype)


def _decoded_product(
    rows: Array, tensor: Any, bases: Any, options: ProductOptions
) -> Array:
    """Decodes the whole matrix: the product of kinds that have no kernel."""
    return dot(rows, tensor.decode(bases), options.precision)


def _decoded_transposed(
    rows: Array, tensor: Any, bases: Any, options: ProductOptions
) -> Array:
    return dot(rows, tensor.decode(bases).T, options.precision)


def dot(
    x: Float[Array, "r s"], w: Float[Array, "s p"], precision: str | None
) -> Float[Array, "r p"]:
    """`x @ w` in the type of x, accumulated in float32."""
    return jnp.matmul(
        x,
        w.astype(x.dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
