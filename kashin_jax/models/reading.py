"""Filling the variables of a model from the files of a checkpoint, tensor by tensor."""

import collections
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kashin_jax.errors import CheckpointError, NonFiniteError, UsageError
from kashin_jax.io import TensorFile
from kashin_jax.models.names import StoredName

__all__ = [
    "LoadedVariables",
    "ParamPath",
    "abstract_state",
    "check_dtype",
    "load_variables",
    "present",
]

_DTYPES = ("float32", "bfloat16", "float16")

ParamPath = tuple[Any, ...]
# Reads a stored name; None for tensors that are left alone.
ParseName = Callable[[str], StoredName | None]


class LoadedVariables(NamedTuple):
    """What was found.

    Attributes:
      variables: By path.
      stored_dtype: NumPy name of the precision most of the values have on disk.
    """

    variables: dict[ParamPath, nnx.Variable]
    stored_dtype: str


class _Tensor(NamedTuple):
    label: str
    name: str
    is_transposed: bool
    value: np.ndarray


def abstract_state(
    model: Callable[..., nnx.Module], config: Any, dtype: np.dtype
) -> tuple[Any, Any]:
    """Structure of a model, and its variables with shapes for values.

    Drawing random weights would cost more than reading the real ones.

    Args:
      model: Class of the model; made of a configuration, `rngs` and two dtypes.
      config: Its architecture.
      dtype: Of parameters and activations.
    """
    graphdef, state = _abstract_state(model, config, dtype)
    # Variables of the caller's own: the values of some are set later.
    return graphdef, jax.tree.map(lambda shape: shape, state)


@functools.lru_cache(maxsize=8)
def _abstract_state(
    model: Callable[..., nnx.Module], config: Any, dtype: np.dtype
) -> tuple[Any, Any]:
    """Kept, since tracing a model takes longer than reading a small one."""
    return nnx.split(
        nnx.eval_shape(
            lambda: model(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)
        )
    )


def check_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype, if a model can be loaded in it; raises UsageError if not."""
    if (dtype := jnp.dtype(dtype)).name not in _DTYPES:
        raise UsageError(f"`dtype` must be one of {_DTYPES}. Got {dtype.name}.")
    return dtype


def present(parse: ParseName, absent: Collection[str]) -> ParseName:
    """A reader of names that leaves alone what is stored as NAME.LEAF for absent names.

    Args:
      parse: For all other names.
      absent: Stored names.
    """
    left = frozenset(absent)

    def parse_present(stored: str) -> StoredName | None:
        return None if stored.rpartition(".")[0] in left else parse(stored)

    return parse_present


def load_variables(
    files: Collection[TensorFile],
    targets: Mapping[str, tuple[ParamPath, nnx.Variable]],
    parse: ParseName,
    dtype: np.dtype,
) -> LoadedVariables:
    """Reads files into variables of the shapes that the model asks for.

    Args:
      files: The weight files of one checkpoint.
      targets: Path and abstract variable by name, in the spelling of `parse`.
      parse: Reads stored names.
      dtype: Of the variables made.

    Returns:
      The variables found; which of them are missing is for the caller to say.

    Raises:
      CheckpointError: If a file is damaged or empty, or a tensor is not part of the
        model, stored twice, or of another shape or kind.
      NonFiniteError: If a weight is NaN or infinite, or overflows `dtype`.
    """
    loaded: dict[ParamPath, nnx.Variable] = {}
    sizes: collections.Counter[str] = collections.Counter()
    for tensor in _read(files, parse):
        if tensor.name not in targets:
            raise CheckpointError(
                f"{tensor.label} is not part of the model that config.json describes; "
                "use the two files that were published together."
            )
        path, variable = targets[tensor.name]
        if path in loaded:
            raise CheckpointError(f"{tensor.label} is stored twice; remove one copy.")
        array = _converted(tensor, path[-1] == "kernel", variable.shape, dtype)
        loaded[path] = variable.replace(array)
        sizes[tensor.value.dtype.name] += tensor.value.size
    if not sizes:
        raise CheckpointError(
            f"{', '.join(str(file.path) for file in files)}: nothing to load is in "
            "there; get new files."
        )
    return LoadedVariables(loaded, sizes.most_common(1)[0][0])


def _read(files: Iterable[TensorFile], parse: ParseName) -> Iterator[_Tensor]:
    for file in files:
        for stored in file.specs:
            if (parsed := parse(stored)) is not None:
                label = f"{file.path}: `{stored}`"
                yield _Tensor(label, *parsed, file.read(stored))


def _converted(
    tensor: _Tensor, is_kernel: bool, shape: tuple[int, ...], dtype: np.dtype
) -> Float[Array, "..."]:
    value = tensor.value
    if value.dtype.name not in _DTYPES:
        raise CheckpointError(
            f"{tensor.label} is stored as {value.dtype.name}; only {_DTYPES} can be "
            "loaded."
        )
    flip = is_kernel and tensor.is_transposed
    _check_shape(tensor, shape[::-1] if flip else shape)
    with np.errstate(over="ignore"):
        cast = (value.T if flip else value).astype(dtype)
    if not np.isfinite(cast).all():
        raise NonFiniteError(
            f"{tensor.label} overflows {dtype.name}; load it in a wider dtype."
            if np.isfinite(value).all()
            else f"{tensor.label} has NaN or infinite values; download it again."
        )
    return jnp.asarray(cast)


def _check_shape(tensor: _Tensor, expected: tuple[int, ...]) -> None:
    if tensor.value.shape != expected:
        raise CheckpointError(
            f"{tensor.label} has shape {tensor.value.shape}, but config.json asks for "
            f"{expected}; use the two files that were published together."
        )
