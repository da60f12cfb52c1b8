"""From a matrix to the packed tensor of a control."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt32

from kashin_jax.bases import KroneckerBasis, key_from_seed, make_pair
from kashin_jax.methods.affine import minmax_code, rtn_code
from kashin_jax.methods.configs import (
    HQQ,
    NF4,
    RTN,
    ChannelKMeans,
    KMeans,
    Method,
    RotatedKMeansConfig,
    RotatedRTNConfig,
    Uniform,
)
from kashin_jax.methods.hqq import hqq_code
from kashin_jax.methods.kmeans import channel_kmeans_code, kmeans_code, nf4_code
from kashin_jax.packing import pack_codes
from kashin_jax.tensors.affine import (
    AffineTensor,
    CodebookTensor,
    GroupLayout,
    group_rows,
    ungroup_rows,
)

__all__ = ["encode_control"]


def encode_control(
    x: Float[Array, "m n"],
    seed: UInt32[Array, "2"],
    codebook_key: Key[Array, ""],
    config: Method,
    dtype: str,
) -> AffineTensor | CodebookTensor:
    """Codes a float32 matrix that had type `dtype`; `seed` gives the rotation.

    Raises:
      TypeError: If `config` is no control's.
    """
    basis, stored = None, None
    if isinstance(config, RotatedRTNConfig | RotatedKMeansConfig):
        basis, stored = config.basis, seed
        shape = x.shape[0], x.shape[1]
        x = _rotate(x, make_pair(basis, key_from_seed(seed), shape))
    match config:
        case RTN():
            size: int | None = config.group_size or x.shape[0]
        case HQQ() | NF4():
            size = config.group_size
        case Uniform() | KMeans() | ChannelKMeans():
            size = None
        case _:
            raise TypeError(f"`config` is no quantizer's: {type(config).__name__}.")
    layout = GroupLayout(
        shape=(x.shape[0], x.shape[1]),
        group_size=size,
        bits=config.bits,
        basis=basis,
        dtype=dtype,
    )
    if isinstance(config, RTN | HQQ | Uniform):
        return _encode_affine(x, stored, config, layout)
    if isinstance(config, NF4):
        return _encode_nf4(x, layout)
    return _encode_kmeans(x, stored, codebook_key, config, layout)


@partial(jax.jit, static_argnames=("config", "layout"))
def _encode_affine(
    x: Float[Array, "m n"],
    seed: UInt32[Array, "2"] | None,
    config: RTN | HQQ | Uniform,
    layout: GroupLayout,
) -> AffineTensor:
    bits = config.bits
    groups = group_rows(x, layout.group_size or x.shape[0])
    match config:
        case RTN():
            code = rtn_code(groups, bits)
            zero = pack_codes(code.zero.astype(jnp.uint8).reshape(-1), bits=bits)
            scale = code.scale.astype(jnp.float16)
        case HQQ():
            code = hqq_code(x, bits=bits, group_size=config.group_size)
            scale, zero = (part.astype(jnp.float16) for part in (code.scale, code.zero))
        case Uniform():
            code = minmax_code(groups, bits)
            scale, zero = code.scale, code.zero
    return AffineTensor(_pack(code.codes, layout), scale, zero, layout, seed)


@partial(jax.jit, static_argnames="layout")
def _encode_nf4(x: Float[Array, "m n"], layout: GroupLayout) -> CodebookTensor:
    code = nf4_code(group_rows(x, layout.group_size or x.shape[0]))
    scale = code.scale.astype(jnp.float16)
    return CodebookTensor(_pack(code.codes, layout), None, scale, None, layout)


def _encode_kmeans(
    x: Float[Array, "m n"],
    seed: UInt32[Array, "2"] | None,
    key: Key[Array, ""],
    config: KMeans | ChannelKMeans,
    layout: GroupLayout,
) -> CodebookTensor:
    match config:
        case KMeans():
            code = kmeans_code(
                x, key, bits=config.bits, num_restarts=config.num_restarts
            )
            levels = code.levels
        case ChannelKMeans():
            code = channel_kmeans_code(
                x, key, bits=config.bits, num_restarts=config.num_restarts
            )
            levels = code.levels.astype(jnp.float16)
    return CodebookTensor(_pack(code.codes, layout), levels, code.scale, seed, layout)


@partial(jax.jit, static_argnames="layout")
def _pack(codes: Array, layout: GroupLayout) -> Array:
    rows = ungroup_rows(codes, layout.shape[0])
    return pack_codes(rows.reshape(-1), bits=layout.bits)


@jax.jit
def _rotate(x: Float[Array, "m n"], pair: KroneckerBasis) -> Float[Array, "m n"]:
    return pair.analysis(x)
