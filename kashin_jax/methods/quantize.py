"""`quantize`: one matrix to packed codes by any method, with a report."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Key, Num, UInt32

from kashin_jax.bases import (
    KroneckerBasis,
    key_from_seed,
    make_pair,
    seed_from_key,
)
from kashin_jax.errors import NonFiniteError
from kashin_jax.methods.checks import (
    checked_importance,
    checked_in_scale,
    require_finite,
)
from kashin_jax.methods.configs import DEFAULT_CONFIG, Method
from kashin_jax.methods.encode_controls import encode_control
from kashin_jax.methods.joint.coder import JointKashin, joint_block_shape, joint_code
from kashin_jax.methods.kashin import GreedyKashin, KashinCode, kashin_code
from kashin_jax.tensors.affine import (
    AffineTensor,
    CodebookTensor,
    decode_control,
)
from kashin_jax.tensors.blocks import resolve_block_shape
from kashin_jax.tensors.kashin import (
    KashinLayout,
    KashinTensor,
    band_count,
    cut_rows,
    decode_with,
    make_rotation,
    pack_rows,
)
from kashin_jax.tensors.kernels.product import derive_bases

__all__ = ["QuantizationReport", "encode", "quantize", "require_finite"]

# Weights decoded at a time to measure what was lost, 64 MiB as float32.
_BAND = 2**24


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
    config: Method = DEFAULT_CONFIG,
    key: Key[Array, ""] | None = None,
    *,
    path: str = "weight",
    importance: Num[Array | np.ndarray, " k"] | None = None,
    in_scale: Num[Array | np.ndarray, " k"] | None = None,
) -> tuple[Any, QuantizationReport]:
    """Quantizes one matrix: checks it on the host, then runs `encode`.

    Compiles once per shape, type and config. The matrix is never returned
    unquantized: whoever wants to skip hard layers reads the report and decides.

    Args:
      weight: Kernel in Flax order `[in, out]`, of a floating type.
      config: The method and its static choices.
      key: Seeds the bases and the codebook; `jax.random.key(0)` when None.
      path: Name of the matrix in error messages.
      importance: Weight of every input in the error that a `JointKashin` lowers, say
        the mean square of what the input takes; None takes no side.
      in_scale: Of a `JointKashin`: stored as the scale of inputs, in place of what its
        `balance` gives, for matrices that share one (`common_input_scale`).

    Returns:
      The packed matrix (a `KashinTensor` for a `GreedyKashin`) and the report.

    Raises:
      TypeError: If `weight` is not floating point, or the method has no use for
        `importance` or `in_scale`.
      ValueError: If its shape does not suit the method, `importance` or `in_scale` does
        not suit the matrix, or both are given.
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
    weights = checked_importance(importance, weight.shape[0], config, path)
    if importance is not None and in_scale is not None:
        raise ValueError(f"`{path}`: give `importance` or `in_scale`, not both.")
    scale = checked_in_scale(in_scale, weight.shape[0], config, path)
    key = jax.random.key(0) if key is None else key
    tensor, report = encode(weight, key, config, weights, scale)
    if not math.isfinite(report.relative_squared_error):
        is_kashin = isinstance(config, GreedyKashin | JointKashin)
        raise NonFiniteError(
            f"`{path}` reaches {float(jnp.max(jnp.abs(weight))):.3g}, too large for "
            f"what {type(config).__name__} stores. Rescale it"
            + ("." if is_kashin else ", or use GreedyKashin, whose scales are float32.")
        )
    return tensor, report


def encode(
    weight: Float[Array, "m n"],
    key: Key[Array, ""],
    config: Method,
    importance: Float[Array, " m"] | None = None,
    in_scale: Float16[Array, " m"] | None = None,
) -> tuple[Any, QuantizationReport]:
    """The pure core of `quantize`: no checks of values, works under `jit` and `vmap`.

    Its stages are compiled one by one, so that each has the memory to itself.
    """
    decomposition = None
    tensor: KashinTensor | AffineTensor | CodebookTensor
    match config:
        case GreedyKashin():
            tensor, code = _encode_kashin(weight, key, config)
            decomposition = code._asdict()
            del decomposition["codes"], decomposition["centroids"]
        case JointKashin():
            tensor = _encode_joint(weight, key, config, importance, in_scale)
        case _:
            x = weight.astype(jnp.float32)
            seed, codebook_key = _split(key)
            dtype = weight.dtype.name
            tensor = encode_control(x, seed, codebook_key, config, dtype)
    error = _relative_squared_error(weight, tensor, *derive_bases(tensor))
    return tensor, QuantizationReport(error, decomposition)


def _encode_kashin(
    weight: Float[Array, "m n"], key: Key[Array, ""], config: GreedyKashin
) -> tuple[KashinTensor, KashinCode]:
    block_shape = resolve_block_shape(weight.shape, config.block_shape)
    seed, codebook_key = _split(key)
    basis = make_pair(config.basis, key_from_seed(seed), block_shape)
    code = kashin_code(weight, basis, codebook_key, config, block_shape)
    layout = KashinLayout(
        shape=_shape(weight),
        block_shape=block_shape,
        bits=config.bits,
        basis=config.basis,
        dtype=weight.dtype.name,
    )
    packed, _ = pack_rows(code.codes, layout)
    return KashinTensor(packed, code.centroids, code.scale, seed, layout), code


def _encode_joint(
    weight: Float[Array, "m n"],
    key: Key[Array, ""],
    config: JointKashin,
    importance: Float[Array, " m"] | None,
    in_scale: Float16[Array, " m"] | None,
) -> KashinTensor:
    shape = _shape(weight)
    block_shape = resolve_block_shape(shape, joint_block_shape(shape, config))
    seed, _ = _split(key)
    basis = make_pair(config.basis, key_from_seed(seed), block_shape)
    spec = config.basis if config.rotation else None
    rotation = None if spec is None else make_rotation(spec, seed, block_shape)
    code = joint_code(
        weight, basis, rotation, config, block_shape, importance, in_scale
    )
    layout = KashinLayout(
        shape=shape,
        block_shape=block_shape,
        bits=config.bits,
        basis=config.basis,
        dtype=weight.dtype.name,
        rotation=spec,
        v_bits=config.split.v,
    )
    packed, coarse = pack_rows(code.codes, layout)
    return KashinTensor(
        packed, code.centroids, code.scale, seed, layout,
        code.in_scale, code.out_scale, coarse,
    )  # fmt: skip


@jax.jit
def _split(key: Key[Array, ""]) -> tuple[UInt32[Array, "2"], Key[Array, ""]]:
    """The stored seed, and the key of the codebook."""
    seed_key, codebook_key = jax.random.split(key)
    return seed_from_key(seed_key), codebook_key


def _block_shape(shape: tuple[int, ...], config: Method) -> tuple[int, int] | None:
    if isinstance(config, JointKashin) and len(shape) == 2:
        return joint_block_shape((shape[0], shape[1]), config)
    return config.block_shape if isinstance(config, GreedyKashin) else None


def _shape(x: Float[Array, "m n"]) -> tuple[int, int]:
    return x.shape[0], x.shape[1]


@jax.jit
def _relative_squared_error(
    weight: Float[Array, "m n"],
    tensor: KashinTensor | AffineTensor | CodebookTensor,
    basis: KroneckerBasis | None,
    rotation: KroneckerBasis | None,
) -> Float[Array, ""]:
    # In units of the largest entry: squares of 1e30 leave float32.
    peak = jnp.max(jnp.abs(weight)).astype(jnp.float32)
    unit = jnp.where(peak > 0, peak, 1.0)

    def sums(part: tuple[Array, Array]) -> tuple[Array, Array]:
        x, decoded = part[0].astype(jnp.float32), part[1]
        return jnp.sum(jnp.square(x / unit)), jnp.sum(jnp.square((x - decoded) / unit))

    def stacked(x: Array, count: int) -> Array:
        return x.reshape(count, -1, x.shape[1])

    def decoded(part: KashinTensor | AffineTensor | CodebookTensor) -> Array:
        if not isinstance(part, KashinTensor):
            return decode_control(part, basis)
        assert basis is not None, "derived by the caller"
        return decode_with(part, basis, rotation)

    bands = None
    if isinstance(tensor, KashinTensor):
        bands = band_count(tensor.layout, _BAND)
    if bands is None or bands == 1 or not isinstance(tensor, KashinTensor):
        # XLA copies what is reduced, here a slice at a time: 3.5 times the float32 size
        # of a matrix that is one block, 7 times without.
        count = math.gcd(weight.shape[0], 16)
        parts = jax.lax.map(
            sums, (stacked(weight, count), stacked(decoded(tensor), count))
        )
    else:
        parts = jax.lax.map(
            lambda part: sums((part[0], decoded(part[1]))),
            (stacked(weight, bands), cut_rows(tensor, bands)),
        )
    total, lost = jax.tree.map(jnp.sum, parts)
    return lost / jnp.where(total > 0, total, 1.0)
