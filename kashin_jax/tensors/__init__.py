"""Packed matrices: what is stored, how it is decoded and multiplied by."""

from kashin_jax.tensors.affine import AffineTensor as AffineTensor
from kashin_jax.tensors.axes import KernelAxes as KernelAxes
from kashin_jax.tensors.axes import PackedArray as PackedArray
from kashin_jax.tensors.base import Bases as Bases
from kashin_jax.tensors.base import Prepared as Prepared
from kashin_jax.tensors.base import QuantizedTensor as QuantizedTensor
from kashin_jax.tensors.base import bits_per_weight as bits_per_weight
from kashin_jax.tensors.base import dequantize as dequantize
from kashin_jax.tensors.base import prepare as prepare
from kashin_jax.tensors.base import stored_bits as stored_bits
from kashin_jax.tensors.codebook import CodebookTensor as CodebookTensor
from kashin_jax.tensors.kashin import KashinTensor as KashinTensor
from kashin_jax.tensors.kashin_vectors import KashinVectorTensor as KashinVectorTensor
from kashin_jax.tensors.kernels import matmul as matmul
from kashin_jax.tensors.products import ProductOptions as ProductOptions
from kashin_jax.tensors.products import register_kernel as register_kernel

__all__ = [
    "AffineTensor",
    "Bases",
    "CodebookTensor",
    "KashinTensor",
    "KashinVectorTensor",
    "KernelAxes",
    "PackedArray",
    "Prepared",
    "ProductOptions",
    "QuantizedTensor",
    "bits_per_weight",
    "dequantize",
    "matmul",
    "prepare",
    "register_kernel",
    "stored_bits",
]
