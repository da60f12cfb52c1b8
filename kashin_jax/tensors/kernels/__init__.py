"""Ways to multiply by packed matrices, registered for the kinds of the library.

`matmul` comes from here, so that whoever has it has them.
"""

from kashin_jax.tensors.grouped import GroupedTensor
from kashin_jax.tensors.kashin import KashinTensor
from kashin_jax.tensors.kernels.grouped import grouped_product
from kashin_jax.tensors.kernels.kashin import kashin_product
from kashin_jax.tensors.products import matmul, register_kernel

__all__ = ["grouped_product", "kashin_product", "matmul"]

register_kernel(KashinTensor, kashin_product)
register_kernel(GroupedTensor, grouped_product)
