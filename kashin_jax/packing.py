"""Codes of 1 to 8 bits to bytes and back: the storage format.

Code `i` occupies bits `[i * bits, (i + 1) * bits)` of the stream, byte `j` holds bits
`[8 * j, 8 * j + 8)`, least significant bit first; the last byte is filled with zeros.
At 4 bits that is the low nibble first. Changing it needs a new format version. Codes of
a matrix are its rows, one after the other; in memory they have an axis of rows where
these end between bytes, see `rows_of_bytes`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt8

__all__ = [
    "check_bits",
    "pack_codes",
    "pack_matrix",
    "packed_size",
    "rows_of_bytes",
    "unpack_codes",
    "unpack_matrix",
]


def check_bits(bits: int) -> None:
    """Raises ValueError unless `bits` is a code width in 1..8."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"`bits` must be a whole number in [1, 8]. Got bits={bits!r}.")


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes take."""
    check_bits(bits)
    return -(-count * bits // 8)


@partial(jax.jit, static_argnames="bits")
def pack_codes(codes: UInt8[Array, " p"], *, bits: int) -> UInt8[Array, " q"]:
    """Packs codes below `2**bits`; higher bits are dropped, which is not checked.

    Raises:
      ValueError: If `bits` is not in 1..8.
    """
    size = packed_size(codes.shape[0], bits)
    groups = -(-codes.shape[0] // 8)
    padded = jnp.pad(codes, (0, 8 * groups - codes.shape[0])).reshape(groups, 8)
    # Eight codes fill `bits` whole bytes; 16-bit words hold a code that straddles two.
    words = (padded & jnp.uint8(2**bits - 1)).astype(jnp.uint16)
    columns = [jnp.zeros((groups,), jnp.uint16) for _ in range(bits)]
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        shifted = words[:, i] << shift
        columns[byte] |= shifted & 0xFF
        if shift + bits > 8:
            columns[byte + 1] |= shifted >> 8
    stream = jnp.stack(columns, axis=1).astype(jnp.uint8).reshape(-1)
    return stream[:size]


def unpack_codes(
    packed: UInt8[Array, " q"], *, bits: int, count: int
) -> UInt8[Array, " p"]:
    """The first `count` codes of a packed stream; inverts `pack_codes` exactly.

    Raises:
      ValueError: If `bits` is not in 1..8, or the stream is not as long as `count`
        codes need.
    """
    if packed.shape[0] != packed_size(count, bits):
        raise ValueError(
            f"`packed` holds {packed.shape[0]} bytes, but {count} codes of {bits} bits "
            f"take {packed_size(count, bits)}. The array is truncated or mislabelled."
        )
    groups = -(-count // 8)
    padded = jnp.pad(packed, (0, groups * bits - packed.shape[0]))
    columns = padded.reshape(groups, bits).astype(jnp.uint16)
    codes = []
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        word = columns[:, byte] >> shift
        if shift + bits > 8:
            word |= columns[:, byte + 1] << (8 - shift)
        codes.append(word & (2**bits - 1))
    return jnp.stack(codes, axis=1).astype(jnp.uint8).reshape(-1)[:count]


def rows_of_bytes(
    packed: UInt8[Array, "*stack q"], rows: int, row_bits: int
) -> UInt8[Array, "*stack q"] | UInt8[Array, "*stack rows row_bytes"]:
    """Packed codes with an axis of rows, where rows end between bytes.

    So they can be cut over inputs and over outputs. Where rows end within bytes codes
    stay one stream.

    Args:
      packed: Of a matrix, or of a stack of them.
      rows: Of the matrix.
      row_bits: Bits of the codes of a row.
    """
    if row_bits % 8:
        return packed
    return packed.reshape(*packed.shape[:-1], rows, row_bits // 8)


def pack_matrix(codes: UInt8[Array, "m n"], bits: int) -> UInt8[Array, "..."]:
    """Packs a matrix of codes row by row, see `pack_codes` and `rows_of_bytes`."""
    m, n = codes.shape
    return rows_of_bytes(pack_codes(codes.reshape(-1), bits=bits), m, n * bits)


def unpack_matrix(
    packed: UInt8[Array, "..."], bits: int, shape: tuple[int, int]
) -> UInt8[Array, "m n"]:
    """Inverts `pack_matrix`; takes codes without an axis of rows, too."""
    m, n = shape
    return unpack_codes(packed.reshape(-1), bits=bits, count=m * n).reshape(m, n)
