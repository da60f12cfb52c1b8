"""A matrix as a grid of equal blocks, and back."""

from jaxtyping import Array, Shaped

__all__ = ["from_blocks", "resolve_block_shape", "to_blocks"]


def resolve_block_shape(
    shape: tuple[int, ...], block_shape: tuple[int, int] | None
) -> tuple[int, int]:
    """The block shape to use; `None` means the whole matrix is one block.

    Raises:
      ValueError: If `shape` is not that of a non-empty matrix, or does not divide
        into blocks.
    """
    if len(shape) != 2 or 0 in shape:
        raise ValueError(
            f"Only non-empty matrices can be quantized. Got shape {shape}; reshape the "
            "array or leave it out."
        )
    if block_shape is None:
        return shape[0], shape[1]
    m, n = block_shape
    if m < 1 or n < 1 or shape[0] % m or shape[1] % n:
        raise ValueError(
            f"A matrix of shape {shape} does not divide into blocks of {block_shape}. "
            "Choose divisors as `block_shape`, or None for one block."
        )
    return block_shape


def to_blocks(
    x: Shaped[Array, "m n"], block_shape: tuple[int, int]
) -> Shaped[Array, "r c bm bn"]:
    """The grid of blocks, row-major."""
    bm, bn = block_shape
    grid = x.reshape(x.shape[0] // bm, bm, x.shape[1] // bn, bn)
    return grid.transpose(0, 2, 1, 3)


def from_blocks(blocks: Shaped[Array, "r c bm bn"]) -> Shaped[Array, "m n"]:
    """Inverse of `to_blocks`."""
    rows, columns, bm, bn = blocks.shape
    return blocks.transpose(0, 2, 1, 3).reshape(rows * bm, columns * bn)
