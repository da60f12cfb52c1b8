"""`quantize`: one matrix to packed codes by any method, with a report."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Num, UInt32

from kashin_jax.bases import BasisSpec, key_from_seed, make_pair, seed_from_key
from kashin_jax.coding.affine import group_rows, minmax_code, rtn_code, ungroup_rows
from kashin_jax.coding.blocks import resolve_block_shape
from kashin_jax.coding.joint import JointConfig, joint_block_shape, joint_code
from kashin_jax.coding.kashin import KashinCode, KashinConfig, kashin_code
from kashin_jax.coding.scalar import kmeans_code, nf4_code
from kashin_jax.errors import NonFiniteError
from kashin_jax.packing import pack_codes
from kashin_jax.quantized.configs import (
    KMeansConfig,
    NF4Config,
    QuantizerConfig,
    RotatedKMeansConfig,
    RTNConfig,
    UniformConfig,
)
from kashin_jax.quantized.controls import AffineTensor, CodebookTensor, GroupLayout
from kashin_jax.quantized.layout import Quantized
from kashin_jax.quantized.tensor import KashinLayout, QuantizedTensor, make_rotation

__all__ = ["QuantizationReport", "encode", "quantize", "require_finite"]


class QuantizationReport(NamedTuple):
    """What quantizing one matrix lost.

    Attributes:
      relative_squared_error: `|W - W_q|^2 / |W|^2` in Frobenius norms, with W_q decoded
        from what is stored; 0 for a zero matrix.
      decomposition: Residuals, steps and verdicts of the Kashin coder (its codes and
        centroids left out); None for the controls.
    """

    relative_squared_error: Float[Array, ""]
    decomposition: dict[str, Array] | None


def quantize(
    weight: Num[Array | np.ndarray, "m n"],
    config: QuantizerConfig,
    key: Key[Array, ""],
    *,
    path: str = "weight",
) -> tuple[Any, QuantizationReport]:
    """Quantizes one matrix: checks it on the host, then runs `encode`.

    Compiles once per shape, type and config. The matrix is never returned
    unquantized: whoever wants to skip hard layers reads the report and decides.

    Args:
      weight: Kernel in Flax order `[in, out]`, of a floating type.
      config: The method and its static choices.
      key: Seeds the bases and the codebook.
      path: Name of the matrix in error messages.

    Returns:
      The packed matrix (a `QuantizedTensor` for a `KashinConfig`) and the report.

    Raises:
      TypeError: If `weight` is not floating point.
      ValueError: If its shape does not suit the method.
      NonFiniteError: If it holds NaN or infinity, or is too large to be stored.
    """
    weight = jnp.asarray(weight)  # NumPy's float64 too: the layout records the type
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise TypeError(f"`{path}` has type {weight.dtype}; cast it to float first.")
    try:
        resolve_block_shape(weight.shape, _block_shape(weight.shape, config))
    except ValueError as error:
        raise ValueError(f"`{path}`: {error}") from None
    require_finite(weight, path)
    tensor, report = encode(weight, key, config)
    if not jnp.isfinite(report.relative_squared_error):
        is_kashin = isinstance(config, KashinConfig | JointConfig)
        raise NonFiniteError(
            f"`{path}` reaches {float(jnp.max(jnp.abs(weight))):.3g}, too large for "
            f"what {type(config).__name__} stores. Rescale it"
            + ("." if is_kashin else ", or use KashinConfig, whose scales are float32.")
        )
    return tensor, report


def require_finite(weight: Num[Array, "*shape"], path: str) -> None:
    """Raises NonFiniteError, naming `path`, if `weight` holds NaN or infinity."""
    bad = int(jnp.sum(~jnp.isfinite(weight)))
    if bad:
        raise NonFiniteError(
            f"`{path}` holds {bad} NaN or infinite entries of {weight.size}. Repair "
            "the checkpoint, or leave this parameter out."
        )


def encode(
    weight: Float[Array, "m n"], key: Key[Array, ""], config: QuantizerConfig
) -> tuple[Any, QuantizationReport]:
    """The pure core of `quantize`: no checks of values, works under `jit` and `vmap`.

    Its stages are compiled one by one, so that each has the memory to itself.
    """
    seed_key, codebook_key = jax.random.split(key)
    x = weight.astype(jnp.float32)
    dtype = weight.dtype.name
    decomposition = None
    tensor: Quantized
    match config:
        case KashinConfig():
            tensor, code = _encode_kashin(weight, seed_key, codebook_key, config)
            decomposition = code._asdict()
            del decomposition["codes"], decomposition["centroids"]
        case JointConfig():
            tensor = _encode_joint(weight, seed_key, config)
        case RTNConfig() | UniformConfig():
            tensor = _encode_affine(x, config, dtype)
        case NF4Config():
            tensor = _encode_nf4(x, config, dtype)
        case KMeansConfig():
            tensor = _encode_kmeans(x, seed_key, codebook_key, config, dtype)
        case _:
            raise TypeError(f"`config` is no quantizer's: {type(config).__name__}.")
    error = _relative_squared_error(weight, tensor)
    return tensor, QuantizationReport(error, decomposition)


def _encode_kashin(
    weight: Float[Array, "m n"],
    seed_key: Key[Array, ""],
    codebook_key: Key[Array, ""],
    config: KashinConfig,
) -> tuple[QuantizedTensor, KashinCode]:
    block_shape = resolve_block_shape(weight.shape, config.block_shape)
    seed = seed_from_key(seed_key)
    basis = make_pair(config.basis, key_from_seed(seed), block_shape)
    code = kashin_code(weight, basis, codebook_key, config, block_shape)
    layout = KashinLayout(
        shape=_shape(weight),
        block_shape=block_shape,
        bits=config.bits,
        basis=config.basis,
        dtype=weight.dtype.name,
    )
    packed = pack_codes(code.codes.reshape(-1), bits=config.bits)
    return QuantizedTensor(packed, code.centroids, code.scale, seed, layout), code


def _encode_joint(
    weight: Float[Array, "m n"], seed_key: Key[Array, ""], config: JointConfig
) -> QuantizedTensor:
    shape = _shape(weight)
    block_shape = resolve_block_shape(shape, joint_block_shape(shape, config))
    seed = seed_from_key(seed_key)
    basis = make_pair(config.basis, key_from_seed(seed), block_shape)
    spec = config.basis if config.rotation else None
    rotation = None if spec is None else make_rotation(spec, seed, block_shape)
    code = joint_code(weight, basis, rotation, config, block_shape)
    layout = KashinLayout(
        shape=shape,
        block_shape=block_shape,
        bits=config.bits,
        basis=config.basis,
        dtype=weight.dtype.name,
        rotation=spec,
    )
    return QuantizedTensor(
        pack_codes(code.codes.reshape(-1), bits=config.bits),
        code.centroids,
        code.scale,
        seed,
        layout,
        code.in_scale,
        code.out_scale,
    )


def _block_shape(
    shape: tuple[int, ...], config: QuantizerConfig
) -> tuple[int, int] | None:
    if isinstance(config, JointConfig) and len(shape) == 2:
        return joint_block_shape((shape[0], shape[1]), config)
    return config.block_shape if isinstance(config, KashinConfig) else None


def _encode_affine(
    x: Float[Array, "m n"], config: RTNConfig | UniformConfig, dtype: str
) -> AffineTensor:
    size = (config.group_size or x.shape[0]) if isinstance(config, RTNConfig) else None
    layout = GroupLayout(
        shape=_shape(x), group_size=size, bits=config.bits, dtype=dtype
    )
    groups = group_rows(x, size or x.shape[0])
    if isinstance(config, RTNConfig):
        code = rtn_code(groups, config.bits)
        zero = pack_codes(code.zero.astype(jnp.uint8).reshape(-1), bits=config.bits)
        scale = code.scale.astype(jnp.float16)
    else:
        code = minmax_code(groups, config.bits)
        scale, zero = code.scale, code.zero
    packed = _pack_groups(code.codes, x.shape[0], config.bits)
    return AffineTensor(packed, scale, zero, layout)


def _encode_nf4(
    x: Float[Array, "m n"], config: NF4Config, dtype: str
) -> CodebookTensor:
    code = nf4_code(group_rows(x, config.group_size))
    layout = GroupLayout(
        shape=_shape(x), group_size=config.group_size, bits=4, dtype=dtype
    )
    packed = _pack_groups(code.codes, x.shape[0], 4)
    return CodebookTensor(packed, None, code.scale.astype(jnp.float16), None, layout)


def _encode_kmeans(
    x: Float[Array, "m n"],
    seed_key: Key[Array, ""],
    codebook_key: Key[Array, ""],
    config: KMeansConfig,
    dtype: str,
) -> CodebookTensor:
    seed, basis = None, None
    if isinstance(config, RotatedKMeansConfig):
        seed, basis = seed_from_key(seed_key), config.basis
        x = _rotate(x, seed, basis)
    code = kmeans_code(
        x, codebook_key, bits=config.bits, num_restarts=config.num_restarts
    )
    layout = GroupLayout(
        shape=_shape(x), group_size=None, bits=config.bits, basis=basis, dtype=dtype
    )
    packed = pack_codes(code.codes.reshape(-1), bits=config.bits)
    return CodebookTensor(packed, code.levels, code.scale, seed, layout)


def _shape(x: Float[Array, "m n"]) -> tuple[int, int]:
    return x.shape[0], x.shape[1]


def _pack_groups(codes: Array, rows: int, bits: int) -> Array:
    return pack_codes(ungroup_rows(codes, rows).reshape(-1), bits=bits)


@partial(jax.jit, static_argnames="basis")
def _rotate(
    x: Float[Array, "m n"], seed: UInt32[Array, "2"], basis: BasisSpec
) -> Float[Array, "m n"]:
    return make_pair(basis, key_from_seed(seed), _shape(x)).analysis(x)


@jax.jit
def _relative_squared_error(
    weight: Float[Array, "m n"], tensor: Quantized
) -> Float[Array, ""]:
    # In units of the largest entry: squares of 1e30 leave float32.
    x = weight.astype(jnp.float32)
    peak = jnp.max(jnp.abs(x))
    unit = jnp.where(peak > 0, peak, 1.0)
    total = jnp.sum(jnp.square(x / unit))
    lost = jnp.sum(jnp.square((x - tensor.decode()) / unit))
    return lost / jnp.where(total > 0, total, 1.0)
