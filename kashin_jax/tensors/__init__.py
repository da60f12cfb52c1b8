"""Packed matrices: what is stored, how it is decoded and multiplied by."""

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kashin_jax.tensors.affine import AffineTensor as AffineTensor
from kashin_jax.tensors.affine import CodebookTensor as CodebookTensor
from kashin_jax.tensors.base import QuantizedTensor as QuantizedTensor
from kashin_jax.tensors.base import bits_per_weight as bits_per_weight
from kashin_jax.tensors.base import stored_bits as stored_bits
from kashin_jax.tensors.kashin import KashinTensor as KashinTensor
from kashin_jax.tensors.kashin import derive_basis as derive_basis
from kashin_jax.tensors.kashin import derive_rotation as derive_rotation
from kashin_jax.tensors.kernels.product import matmul as matmul

__all__ = [
    "AffineTensor",
    "CodebookTensor",
    "KashinTensor",
    "QuantizedTensor",
    "bits_per_weight",
    "dequantize",
    "derive_basis",
    "derive_rotation",
    "matmul",
    "stored_bits",
]


def dequantize(
    tensor: QuantizedTensor, dtype: DTypeLike | None = None
) -> Float[Array, "m n"]:
    """The whole matrix, in `dtype` or else the type that it had."""
    return tensor.decode().astype(tensor.dtype if dtype is None else dtype)
