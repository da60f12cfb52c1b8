"""What is in a checkpoint: tensors, stored bits, errors, and whether it is intact."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from kashin_jax.io import Checkpoint, open_checkpoint
from kashin_jax.models.tensor_roles import is_bias, tensor_roles
from kashin_jax.pipeline.checkpoint_plan import is_float
from kashin_jax.pipeline.coverage import Coverage, Part, cover
from kashin_jax.pipeline.report import REPORT_NAME, read_report
from kashin_jax.pipeline.role_counts import RoleCounts, count_roles

__all__ = ["Inspection", "TensorRow", "inspect_checkpoint"]


class TensorRow(NamedTuple):
    """One tensor.

    Attributes:
      name: As in the original checkpoint.
      shape: Shape in the original.
      form: Its type, such as `float16`, or the type of the packed tensor.
      bits_per_weight: Stored.
      relative_squared_error: As measured when it was quantized; None for tensors that
        were not, or where the report is missing.
    """

    name: str
    shape: tuple[int, ...]
    form: str
    bits_per_weight: float
    relative_squared_error: float | None


class Inspection(NamedTuple):
    """A checkpoint at a glance.

    Attributes:
      tensors: All of them.
      packed_weights: Weights of the packed tensors.
      packed_bits: Stored bits of those.
      weights: Number of weights of all tensors.
      disk_bytes: Size of the weight files, headers included.
      damaged: Shards whose bytes have changed since they were written; None if the
        checkpoint records no hashes.
      coverage: How much is quantized, and what is not.
      roles: How many tensors are linears, heads, norms and so on.
    """

    tensors: tuple[TensorRow, ...]
    packed_weights: int
    packed_bits: int
    weights: int
    disk_bytes: int
    damaged: tuple[str, ...] | None
    coverage: Coverage
    roles: RoleCounts

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits over weights of the packed tensors; None if there are none."""
        return self.packed_bits / self.packed_weights if self.packed_weights else None

    @property
    def model_bits_per_weight(self) -> float:
        """Bits on disk over all weights; 0 if there are none."""
        return 8 * self.disk_bytes / self.weights if self.weights else 0.0


def inspect_checkpoint(directory: str | Path, *, verify: bool = True) -> Inspection:
    """Reads headers and report, and with `verify` hashes the files.

    Raises:
      CheckpointError: If a file is missing or malformed.
    """
    checkpoint = open_checkpoint(directory)
    errors = _errors(checkpoint.directory / REPORT_NAME)
    rows = tuple(_rows(checkpoint, errors))
    packed = [row for row in rows if checkpoint.is_packed(row.name)]
    hashed = verify and checkpoint.sha256
    return Inspection(
        tensors=rows,
        packed_weights=sum(math.prod(row.shape) for row in packed),
        packed_bits=sum(_stored_bits(checkpoint, row.name) for row in packed),
        weights=sum(math.prod(row.shape) for row in rows),
        disk_bytes=sum(f.path.stat().st_size for f in checkpoint.files.values()),
        damaged=tuple(checkpoint.verify()) if hashed else None,
        coverage=_coverage(checkpoint),
        roles=count_roles(checkpoint),
    )


def _coverage(checkpoint: Checkpoint) -> Coverage:
    parts, others = [], []
    roles = tensor_roles(checkpoint.config)
    for name in checkpoint.names():
        spec = checkpoint.spec(name)
        if not is_float(spec.dtype):
            continue
        if len(spec.shape) < 2 or is_bias(name):
            others.append(spec)
            continue
        reason = None if checkpoint.is_packed(name) else f"stored as {spec.dtype}"
        outer = roles.of(name, spec.shape).is_outer
        parts.append(Part(name, spec.shape, spec.size, reason, outer))
    weights = sum(math.prod(spec.shape) for spec in others)
    return cover(parts, weights, sum(spec.size for spec in others))


def _rows(checkpoint: Checkpoint, errors: dict[str, float]) -> Iterator[TensorRow]:
    for name in checkpoint.names():
        spec = checkpoint.spec(name)
        is_packed = checkpoint.is_packed(name)
        form = checkpoint.described(name).type if is_packed else spec.dtype
        weights = max(1, math.prod(spec.shape))
        bits = _stored_bits(checkpoint, name) / weights
        yield TensorRow(name, spec.shape, form, bits, errors.get(name))


def _stored_bits(checkpoint: Checkpoint, name: str) -> int:
    if not checkpoint.is_packed(name):
        return 8 * checkpoint.spec(name).size
    return 8 * sum(spec.size for spec in checkpoint.described(name).specs.values())


def _errors(report: Path) -> dict[str, float]:
    if not report.exists():
        return {}
    return {
        name: float(found.relative_squared_error)
        for name, found in read_report(report).items()
    }
