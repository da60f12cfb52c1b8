"""Matrices to quantize without a model: random ones, or all of a safetensors file."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from kashin_jax.errors import CheckpointError, DataError
from kashin_jax.io import open_safetensors
from kashin_jax.methods.quantize import require_finite

__all__ = ["MIN_SIDE", "ROWS", "SYNTHETIC", "WeightSource", "load_source"]

MIN_SIDE = 64
"""Both sides of a matrix from a file are at least this long."""

ROWS = 1024
"""Inputs of a synthetic matrix."""

_OUTLIER_SHARE = 256
_OUTLIER_FACTOR = 30.0


class WeightSource(NamedTuple):
    """Matrices in Flax's order `[in, out]`, by name, and how to call them all.

    Attributes:
      name: Of all of them.
      matrices: By name.
      sha256: Of the file; None where there is none.
    """

    name: str
    matrices: Mapping[str, Float[np.ndarray, "_ _"]]
    sha256: str | None = None

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(matrix.size for matrix in self.matrices.values())


def load_source(source: str, *, size: int, seed: int) -> WeightSource:
    """The matrices that a source stands for, in float32.

    Args:
      source: A name of `SYNTHETIC`, one matrix whose entries have variance 1, or the
        path of a safetensors file in torch's order `[out, in]`.
      size: Entries of a synthetic matrix, a multiple of `ROWS`.
      seed: Of a synthetic matrix.

    Raises:
      CheckpointError: If the file is missing or damaged.
      DataError: If it has no floating matrix with sides of at least `MIN_SIDE`, or
        nothing but zeros in them.
      NonFiniteError: If one of them holds NaN or infinity; names it.
    """
    if source not in SYNTHETIC:
        return _read(Path(source))
    shape = (ROWS, size // ROWS)
    matrix = SYNTHETIC[source](np.random.default_rng(seed), shape)
    return WeightSource(source, {source: matrix.astype(np.float32)})


def _gaussian(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.standard_normal(shape)


def _student_t3(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    # Three degrees of freedom have variance 3.
    return rng.standard_t(3, shape) / np.sqrt(3)


def _outlier_columns(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """One output in 256, at least one, is 30 times as strong as the others."""
    gain = np.ones(shape[1])
    count = max(1, shape[1] // _OUTLIER_SHARE)
    gain[rng.choice(shape[1], count, replace=False)] = _OUTLIER_FACTOR
    return rng.standard_normal(shape) * gain / np.sqrt(np.mean(gain**2))


_Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]

SYNTHETIC: Mapping[str, _Draw] = {
    "gaussian": _gaussian,
    "student_t3": _student_t3,
    "outlier_columns": _outlier_columns,
}
"""Sources that need no file."""


def _read(path: Path) -> WeightSource:
    if not path.is_file():
        raise CheckpointError(f"{path}: is no file; give `--source` another path.")
    stored = open_safetensors(path)
    tensors = ((name, stored.read(name)) for name in sorted(stored.specs))
    matrices = {name: _kernel(value) for name, value in tensors if _is_usable(value)}
    if not matrices:
        raise DataError(
            f"{path}: has no floating 2-D tensor with sides of at least {MIN_SIDE}; "
            "choose another file."
        )
    for name, matrix in matrices.items():
        require_finite(jnp.asarray(matrix), name)
    if not any(matrix.any() for matrix in matrices.values()):
        raise DataError(f"{path}: its matrices are all zero; choose another file.")
    # The file's own name alone is nearly always `model.safetensors`.
    name = f"{path.resolve().parent.name}/{path.name}"
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return WeightSource(name, matrices, digest)


def _is_usable(value: np.ndarray) -> bool:
    # NumPy itself does not count bfloat16 as floating.
    is_floating = jnp.issubdtype(value.dtype, jnp.floating)
    return is_floating and value.ndim == 2 and min(value.shape) >= MIN_SIDE


def _kernel(value: np.ndarray) -> Float[np.ndarray, "_ _"]:
    # What float32 cannot hold becomes infinite, and is reported as that.
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(value.T, np.float32)
