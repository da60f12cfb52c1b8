"""`quantize`: one matrix to packed codes by any method, with a report."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float16, Int, Key, Num

from kashin_jax.errors import NonFiniteError, UsageError
from kashin_jax.methods.base import Encoded, Method, is_traced, require_method
from kashin_jax.methods.joint.coder import JointKashin
from kashin_jax.tensors import Prepared, QuantizedTensor, prepare

__all__ = [
    "DEFAULT_CONFIG",
    "QuantizationReport",
    "distinct_values",
    "encode",
    "encode_few_values",
    "quantize",
    "quantize_stack",
    "require_finite",
    "weight_error",
]

DEFAULT_CONFIG = JointKashin()
"""Joint coding at 4 bits; the 2024 paper's method is `GreedyKashin`."""

# Integers as wide as the types of weights, in bytes.
_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}

# Weights decoded at a time to measure what was lost, 64 MiB as float32.
_BAND = 2**24


class QuantizationReport(NamedTuple):
    """How much of one matrix was lost by quantizing it.

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
    config: Method | None = None,
    key: Key[Array, ""] | None = None,
    *,
    path: str = "weight",
    importance: Num[Array | np.ndarray, " k"] | None = None,
    in_scale: Num[Array | np.ndarray, " k"] | None = None,
    few_values: bool = True,
) -> tuple[QuantizedTensor, QuantizationReport]:
    """Quantizes one matrix: checks it on the host, then runs `encode`.

    Compiles once per shape, type and config. The matrix is never returned
    unquantized, however much is lost; the report says how much. Inside
    `jit` and `eval_shape`, where nothing is known of values, none is checked.

    Args:
      weight: Kernel in Flax order `[in, out]`, of a floating type.
      config: The method and its static choices; None is joint coding at 4 bits.
      key: Seeds the bases and the codebook; `jax.random.key(0)` when None.
      path: Name of the matrix in error messages.
      importance: Weight of every input in the error that a `JointKashin` lowers, say
        the mean square of what the input takes; None takes no side.
      in_scale: For a `JointKashin`: stored as the scale of inputs, in place of what its
        `balance` gives, for matrices that share one (`common_input_scale`).
      few_values: Whether a matrix of no more values than a `JointKashin` has codes,
        such as signs, is coded without loss, where it has no `in_scale`. What is
        returned then has fewer leaves.

    Returns:
      The packed matrix (a `KashinTensor` for a `GreedyKashin`) and the report.

    Raises:
      TypeError: If `weight` is not floating point, or the method has no use for
        `importance` or `in_scale`.
      ValueError: If its shape does not suit the method, `importance` or `in_scale` does
        not suit the matrix, or both are given.
      NonFiniteError: If it holds NaN or infinity, or is too large to be stored.
    """
    config = DEFAULT_CONFIG if config is None else config
    require_method(config)
    # NumPy's float64 too: the layout records the type.
    weight = jnp.asarray(weight)
    is_known = not is_traced(weight)
    weight, target = _on_one_device(weight) if is_known else (weight, None)
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise TypeError(f"`{path}` has type {weight.dtype}; cast it to float first.")
    try:
        config.check(weight.shape)
    except ValueError as error:
        raise ValueError(f"`{path}`: {error}") from None
    key = jax.random.key(0) if key is None else key
    if not is_known:
        # Values are for whoever runs the program to look at.
        heard = None if importance is None else jnp.asarray(importance, jnp.float32)
        scale = None if in_scale is None else jnp.asarray(in_scale, jnp.float16)
        return encode(weight, key, config, heard, scale)
    require_finite(weight, path)
    weights = _checked_importance(importance, weight.shape[0], config, path)
    if importance is not None and in_scale is not None:
        raise ValueError(f"`{path}`: give `importance` or `in_scale`, not both.")
    scale = _checked_in_scale(in_scale, weight.shape[0], config, path)
    values = None
    if few_values and scale is None:
        # The first row alone tells of almost every matrix that its values are many.
        parts = (np.asarray(part) for part in (weight[0], weight))
        values = distinct_values(parts, config.most_values)
    if values is None:
        tensor, report = encode(weight, key, config, weights, scale)
    else:
        tensor, report = encode_few_values(weight, jnp.asarray(values), key, config)
    if not math.isfinite(report.relative_squared_error):
        remedy = ", or use GreedyKashin, whose scales are float32."
        raise NonFiniteError(
            f"`{path}` reaches {float(jnp.max(jnp.abs(weight))):.3g}, too large for "
            f"what {type(config).__name__} stores. Rescale it"
            + (remedy if config.has_half_scales else ".")
        )
    if report.relative_squared_error > 0.5 and config.has_half_scales:
        _refuse_underflow(weight, config, path)
    return (
        (tensor, report) if target is None else jax.device_put((tensor, report), target)
    )


def _on_one_device(
    weight: Num[Array, "*shape"],
) -> tuple[Num[Array, "*shape"], NamedSharding | None]:
    """The matrix on one device, and where its codes go: to all that it was cut over.

    Blocks lie across the cuts, sums over parts round otherwise than sums over the
    whole, and codes are to be those of the matrix, wherever it lies.
    """
    sharding = weight.sharding
    if len(sharding.device_set) == 1 or not sharding.is_fully_addressable:
        return weight, None
    mesh = getattr(sharding, "mesh", None)
    target = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    # By way of the host: what lay on a mesh would say so in the types of programs.
    return jnp.asarray(np.asarray(weight)), target


def _refuse_underflow(weight: Float[Array, "m n"], config: Method, path: str) -> None:
    peak = float(jnp.max(jnp.abs(weight)))
    # Steps below this have less than six bits in half precision.
    if 0 < peak / 2**config.bits < 2.0**-18:
        raise UsageError(
            f"`{path}` reaches {peak:.3g} only, too little for the half-precision "
            f"scales of {type(config).__name__}. Rescale it, or use GreedyKashin, with "
            "scales in float32."
        )


def quantize_stack(
    weight: Float[Array, "*stack m n"],
    config: Method,
    key: Key[Array, ""],
    *,
    path: str,
    in_scale: Float16[Array, "*stack m"] | None = None,
    few_values: bool = True,
) -> tuple[QuantizedTensor, QuantizationReport]:
    """Quantizes every matrix of a stack alone, as `quantize` does.

    Each has a key folded from its index, and nothing in common with the others. Leaves
    of the results are stacked. Errors are those of `quantize` and name `path[index]`.
    """
    if weight.ndim == 2:
        return quantize(
            weight, config, key, path=path, in_scale=in_scale, few_values=few_values
        )

    def part(i: int, few: bool) -> tuple[QuantizedTensor, QuantizationReport]:
        return quantize_stack(
            weight[i],
            config,
            jax.random.fold_in(key, i),
            path=f"{path}[{i}]",
            in_scale=None if in_scale is None else in_scale[i],
            few_values=few,
        )

    parts = [part(i, few_values) for i in range(weight.shape[0])]
    leaves = [len(jax.tree.leaves(each)) for each in parts]
    if len(set(leaves)) > 1:
        # All or none have few values: a stack has one structure.
        parts = [
            each if own == max(leaves) else part(i, False)
            for i, (each, own) in enumerate(zip(parts, leaves, strict=True))
        ]
    stacked: tuple[QuantizedTensor, QuantizationReport] = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *parts
    )
    return stacked


def encode(
    weight: Float[Array, "m n"],
    key: Key[Array, ""],
    config: Method,
    importance: Float[Array, " m"] | None = None,
    in_scale: Float16[Array, " m"] | None = None,
) -> tuple[QuantizedTensor, QuantizationReport]:
    """The pure core of `quantize`: no checks of values, works under `jit` and `vmap`.

    Its stages are compiled one by one, so that each has the memory to itself.
    """
    inputs = (importance, in_scale) if config.takes_inputs else ()
    return _reported(weight, Encoded(*config.encode(weight, key, *inputs)))


def encode_few_values(
    weight: Float[Array, "m n"],
    values: Float[Array, " k"],
    key: Key[Array, ""],
    config: Method,
) -> tuple[QuantizedTensor, QuantizationReport]:
    """As `encode`, of a matrix that holds no other than these values."""
    return _reported(weight, config.encode_few_values(weight, values, key))


def weight_error(
    weight: Float[Array, "m n"], tensor: QuantizedTensor
) -> Float[Array, ""]:
    """The relative squared error of a report, of any tensor."""
    return _relative_squared_error(weight, prepare(tensor))


def distinct_values(
    parts: Iterable[Num[np.ndarray, "..."]], most: int
) -> Float[np.ndarray, " k"] | None:
    """The values of a matrix in ascending order; None if they are more, or all zero.

    Args:
      parts: Of the matrix, as many as it takes to find more.
      most: How many values are few; 0 reads nothing.
    """
    values = np.zeros(0, np.float32)
    for part in parts if most else ():
        values = np.union1d(values, part.astype(np.float32))
        if len(values) > most:
            return None
    return values if values.any() else None


def _reported(
    weight: Float[Array, "m n"], coded: Encoded
) -> tuple[QuantizedTensor, QuantizationReport]:
    error = weight_error(weight, coded.tensor)
    return coded.tensor, QuantizationReport(error, coded.decomposition)


@jax.jit
def _relative_squared_error(
    weight: Float[Array, "m n"], prepared: Prepared
) -> Float[Array, ""]:
    # In units of the largest entry: squares of 1e30 leave float32.
    peak = jnp.max(jnp.abs(weight)).astype(jnp.float32)
    unit = jnp.where(peak > 0, peak, 1.0)

    def sums(part: tuple[Array, Array]) -> tuple[Array, Array]:
        x, decoded = part[0].astype(jnp.float32), part[1]
        return jnp.sum(jnp.square(x / unit)), jnp.sum(jnp.square((x - decoded) / unit))

    def stacked(x: Array, count: int) -> Array:
        return x.reshape(count, -1, x.shape[1])

    cut = prepared.tensor.in_bands(_BAND)
    if cut is None or cut[0] == 1:
        # XLA copies what is reduced, here a slice at a time: 3.5 times the float32 size
        # of a matrix that is one block, 7 times without.
        count = math.gcd(weight.shape[0], 16)
        decoded = prepared.decode()
        parts = jax.lax.map(sums, (stacked(weight, count), stacked(decoded, count)))
    else:
        bands, tensors = cut
        parts = jax.lax.map(
            lambda part: sums((part[0], part[1].decode(prepared.bases))),
            (stacked(weight, bands), tensors),
        )
    total, lost = jax.tree.map(jnp.sum, parts)
    # Numbers so small that XLA takes them for zeros are not: all of them is lost.
    kind = _UNSIGNED[weight.dtype.itemsize]
    # All bits but the sign, which zeros may have.
    magnitude = jax.lax.bitcast_convert_type(weight, kind) << 1
    is_lost = jnp.any(magnitude != 0).astype(jnp.float32)
    return jnp.where(total > 0, lost / jnp.where(total > 0, total, 1.0), is_lost)


def require_finite(weight: Num[Array, "*shape"], path: str) -> None:
    """Raises NonFiniteError, naming `path`, if `weight` holds NaN or infinity."""
    if is_traced(weight):
        return
    bad = int(_count_bad(weight))
    if bad:
        raise NonFiniteError(
            f"`{path}` holds {bad} NaN or infinite entries of {weight.size}. Repair "
            "the checkpoint, or leave this parameter out."
        )


@jax.jit
def _count_bad(weight: Num[Array, "*shape"]) -> Int[Array, ""]:
    return jnp.sum(~jnp.isfinite(weight))


def _check_per_input(
    name: str,
    numbers: Num[Array | np.ndarray, " k"],
    inputs: int,
    config: Method,
    path: str,
) -> None:
    if not config.takes_inputs:
        raise TypeError(
            f"`{path}`: {type(config).__name__} has no use for `{name}`; leave it "
            "out, or take JointKashin."
        )
    if numbers.shape != (inputs,):
        raise ValueError(
            f"`{path}`: `{name}` has shape {numbers.shape}, but the matrix has "
            f"{inputs} inputs; give one number for each."
        )


def _checked_in_scale(
    in_scale: Num[Array | np.ndarray, " k"] | None,
    inputs: int,
    config: Method,
    path: str,
) -> Float16[Array, " m"] | None:
    if in_scale is None:
        return None
    _check_per_input("in_scale", in_scale, inputs, config, path)
    # Checked by NumPy, which compiles nothing.
    with np.errstate(over="ignore"):
        scale = np.asarray(jnp.asarray(in_scale)).astype(np.float16)
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise ValueError(
            f"`{path}`: `in_scale` must be finite and positive in half precision."
        )
    return jnp.asarray(scale)


def _checked_importance(
    importance: Num[Array | np.ndarray, " k"] | None,
    inputs: int,
    config: Method,
    path: str,
) -> Float[Array, " m"] | None:
    if importance is None:
        return None
    _check_per_input("importance", importance, inputs, config, path)
    weights = np.asarray(jnp.asarray(importance, jnp.float32))
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise ValueError(
            f"`{path}`: `importance` holds NaN, infinite or negative numbers."
        )
    if not weights.any():
        raise ValueError(f"`{path}`: `importance` is zero for every input.")
    return jnp.asarray(weights)
