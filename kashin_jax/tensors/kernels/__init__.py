"""Ways to multiply by packed matrices, registered for the kinds of the library.

`matmul` comes from here, so that whoever has it has them.
"""

from kashin_jax.tensors.grouped import GroupedTensor
from kashin_jax.tensors.kashin import KashinTensor, transposed_by_bands
from kashin_jax.tensors.kashin_vectors import KashinVectorTensor
from kashin_jax.tensors.kernels.cpu import (
    cpu_grouped_product,
    cpu_kashin_product,
    cpu_kashin_transposed,
    cpu_vectors_product,
)
from kashin_jax.tensors.kernels.grouped import grouped_product
from kashin_jax.tensors.kernels.kashin import kashin_product
from kashin_jax.tensors.kernels.kashin_vectors import vectors_product
from kashin_jax.tensors.kernels.library import KernelReport, report
from kashin_jax.tensors.products import matmul, register_kernel

__all__ = [
    "KernelReport",
    "grouped_product",
    "kashin_product",
    "matmul",
    "report",
    "vectors_product",
]

register_kernel(KashinTensor, kashin_product)
register_kernel(GroupedTensor, grouped_product)
register_kernel(KashinVectorTensor, vectors_product)
register_kernel(KashinTensor, cpu_kashin_product, platform="cpu")
register_kernel(GroupedTensor, cpu_grouped_product, platform="cpu")
register_kernel(KashinVectorTensor, cpu_vectors_product, platform="cpu")
register_kernel(KashinTensor, transposed_by_bands, is_transposed=True)
register_kernel(KashinTensor, cpu_kashin_transposed, platform="cpu", is_transposed=True)
