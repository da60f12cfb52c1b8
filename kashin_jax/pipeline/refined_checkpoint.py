"""Refining a quantized checkpoint: new scales, levels, biases and norms; old codes."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int32, Shaped

from kashin_jax.errors import NonFiniteError, UsageError
from kashin_jax.io import (
    Checkpoint,
    PlannedTensor,
    TensorWriter,
    open_checkpoint,
    open_safetensors,
    write_config,
    write_stored,
    write_tensors,
)
from kashin_jax.methods import weight_error
from kashin_jax.models.loading import load_model
from kashin_jax.models.registry import names_of
from kashin_jax.models.saving import stored_array
from kashin_jax.models.tensor_roles import tensor_roles
from kashin_jax.pipeline.calibrated_checkpoint import check_runs, check_tokens
from kashin_jax.pipeline.checkpoint import write_shards
from kashin_jax.pipeline.checkpoint_plan import (
    is_float,
    stored_matrix,
    stored_tensor,
)
from kashin_jax.pipeline.hidden_states import HELD_BYTES
from kashin_jax.pipeline.loading import load_quantized, packed_tensors
from kashin_jax.pipeline.original_shards import copy_shards
from kashin_jax.pipeline.other_files import copy_other_files
from kashin_jax.pipeline.paths import join
from kashin_jax.pipeline.refine import (
    Refinement,
    RefinementReport,
    Store,
    refine_model,
)
from kashin_jax.pipeline.report import REPORT_NAME, LayerReport, read_report
from kashin_jax.pipeline.resume import (
    claimed_directory,
    fingerprint,
    finished_run,
    join_parts,
    keep_directory,
    release_directory,
)
from kashin_jax.pipeline.rules import Rules
from kashin_jax.tensors import QuantizedTensor

__all__ = ["RefinedCheckpoint", "refine_checkpoint"]


class RefinedCheckpoint(NamedTuple):
    """A refined checkpoint that was written.

    Attributes:
      directory: Where it is.
      gains: What learning brought on held-out windows; None where an earlier run had
        finished all of it.
      reports: Of the packed tensors, with the errors that they have now.
    """

    directory: Path
    gains: RefinementReport | None
    reports: dict[str, LayerReport]


def refine_checkpoint(
    quantized: str | Path,
    target: str | Path,
    original: str | Path,
    windows: Int32[np.ndarray, "w t"],
    refinement: Refinement | None = None,
    *,
    exist_ok: bool = False,
    replace: Literal["finished", "unfinished"] | None = None,
    held_bytes: int = HELD_BYTES,
) -> RefinedCheckpoint:
    """Writes a quantized checkpoint anew, its scales, levels, biases and norms learned.

    Codes, layout and stored bits are those of `quantized`; see `refine_model`. Both
    models are held in memory, in float32. An interrupted run goes on, a block or some
    steps behind, and gives the same bytes.

    Args:
      quantized: Of a language model that runs here, from `quantize_checkpoint`.
      target: Must not exist, be empty, or hold an unfinished run of the same call.
      original: What `quantized` was made of.
      windows: Token ids to learn from, see `calibration_windows`.
      refinement: How long and how fast; None takes `Refinement()`.
      exist_ok: Whether `target` may also hold what the same call finished.
      replace: What to remove from `target` first, as for `quantize_checkpoint`.
      held_bytes: Most bytes of hidden states in memory, see `refine_model`.

    Raises:
      UsageError: If one is not the quantized form of the other, the model does not run
        here, or `target` is taken.
      CheckpointError: If a file is missing, damaged, or cannot be written.
      NonFiniteError: If a loss, or what was learned, is not finite.
    """
    refinement = Refinement() if refinement is None else refinement
    source, theirs = open_checkpoint(quantized), open_checkpoint(original)
    target = Path(target)
    _check(source, theirs, target)
    refinement.check(windows)
    check_tokens(theirs, windows)
    planned = [_planned(source, name) for name in source.names()]
    run = fingerprint(source, Rules(), 0, 0, planned, learned={
        "text or refinement": refinement.digest(windows),
        "original": fingerprint(theirs, Rules(), 0, 0, ()).digest,
    })  # fmt: skip
    may_be_done = exist_ok and replace != "finished"
    if may_be_done and (found := finished_run(target, run)) is not None:
        return RefinedCheckpoint(target, None, found)
    before = source.directory / REPORT_NAME
    known = read_report(before) if before.exists() else {}
    with claimed_directory(target, run, replace):
        store, model = _Files(target), load_quantized(quantized).model
        model, gains = refine_model(
            model, load_model(theirs).model, windows, refinement, store=store,
            stored=_Learned.of(model, source).vector_types(), held_bytes=held_bytes,
        )  # fmt: skip
        reports = _write(source, theirs, target, model, planned, known)
        store.forget()
        if exist_ok:
            keep_directory(target, run, reports)
        else:
            release_directory(target)
    return RefinedCheckpoint(target, gains, reports)


def _check(source: Checkpoint, original: Checkpoint, target: Path) -> None:
    if not source.descriptions:
        raise UsageError(
            f"{source.directory}: holds nothing packed; quantize it first."
        )
    if original.descriptions:
        raise UsageError(
            f"{original.directory}: is quantized itself; name what "
            f"{source.directory} was made of."
        )
    for each in (source, original):
        if each.directory.resolve().is_relative_to(target.resolve()):
            raise UsageError(f"{target}: is read from; name another directory.")
    check_runs(original)
    for name in source.names():
        if name not in original.places or source.spec(name).shape != (
            shape := original.spec(name).shape
        ):
            has = "has none" if name not in original.places else f"has {shape}"
            raise UsageError(
                f"{source.directory}: `{name}` has shape {source.spec(name).shape}, "
                f"and {original.directory} {has}; name what it was made of."
            )


def _planned(source: Checkpoint, name: str) -> PlannedTensor:
    if not source.is_packed(name):
        return stored_tensor(source, name, None)
    specs = source.described(name).specs
    return PlannedTensor(
        name,
        {f"{name}.{leaf}": spec for leaf, spec in specs.items()},
        source.descriptions[name],
    )


@dataclasses.dataclass(frozen=True)
class _Files(Store):
    """Arrays of unfinished work, in hidden files of a directory."""

    directory: Path

    def load(self, name: str) -> list[np.ndarray] | None:
        path = self._path(name)
        if not path.exists():
            return None
        file = open_safetensors(path)
        return [np.asarray(file.read(f"{i:06}")) for i in range(len(file.specs))]

    def keep(self, name: str, arrays: Sequence[Array | np.ndarray]) -> None:
        named = {f"{i:06}": np.asarray(array) for i, array in enumerate(arrays)}
        write_tensors(self._path(name), named)

    def forget(self) -> None:
        """Removes all of them."""
        for path in list(self.directory.glob(".refined-*")):
            path.unlink()

    def _path(self, name: str) -> Path:
        return self.directory / f".refined-{name.replace('/', '-')}"


def _write(
    source: Checkpoint,
    original: Checkpoint,
    target: Path,
    model: nnx.Module,
    planned: Sequence[PlannedTensor],
    before: Mapping[str, LayerReport],
) -> dict[str, LayerReport]:
    """Writes all files; returns the reports of packed tensors.

    Args:
      source: The quantized checkpoint.
      original: What it was made of.
      target: Where to.
      model: The refined model.
      planned: All tensors.
      before: Reports of the packed ones, of which there may be none.
    """
    learned = _Learned.of(model, source)

    def write(writer: TensorWriter, tensor: PlannedTensor) -> LayerReport | None:
        name = tensor.name
        if not source.is_packed(name):
            vector = learned.vector(name)
            if vector is None:
                source.copy(name, writer.sink(name))
            else:
                writer.write(name, vector)
            return None
        packed = learned.packed(name)
        write_stored(writer, name, packed)
        if name not in before:
            return None
        is_transposed = source.described(name).is_transposed
        matrix = stored_matrix(original, name, is_transposed)
        errors = jax.vmap(weight_error) if matrix.ndim > 2 else weight_error
        error = errors(matrix, packed)
        # What outputs lost was measured before.
        return before[name]._replace(
            relative_squared_error=float(jnp.mean(error)), calibration=None
        )

    shards: dict[str, list[PlannedTensor]] = {}
    for tensor in planned:
        shards.setdefault(source.places[tensor.name], []).append(tensor)
    write_shards(target, list(shards.items()), write, {})
    reports = join_parts(target, list(shards))
    copy_other_files(source.directory, target)
    copy_shards(source, target)
    # Rules and seed alone would promise the levels that they began with.
    described = {**(source.quantization or {}), "refined": True}
    write_config(target, source.config, described)
    return reports


class _Learned(NamedTuple):
    """What a refined model has for the tensors of its checkpoint.

    Attributes:
      source: The checkpoint.
      tensors: Packed matrices, by path of the layer.
      vectors: Parameters of one axis, by published name without its prefix.
    """

    source: Checkpoint
    tensors: Mapping[str, QuantizedTensor]
    vectors: Mapping[str, tuple[tuple[Any, ...], np.ndarray]]

    @classmethod
    def of(cls, model: nnx.Module, source: Checkpoint) -> "_Learned":
        names = names_of(str(source.config.get("model_type")))
        flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
        return cls(
            source,
            packed_tensors(model),
            {
                names.stem(path): (path, np.asarray(variable.get_value()))
                for path, variable in flat
                if variable.get_value().ndim == 1
            },
        )

    def vector(self, name: str) -> Shaped[np.ndarray, " n"] | None:
        """What a tensor that is not packed became; None if it stays as it is."""
        if (found := self._found(name)) is None:
            return None
        path, value = found
        return stored_array(name, path, value, jnp.dtype(self.source.spec(name).dtype))

    def vector_types(self) -> dict[str, str]:
        """Types on disk of what `vector` gives, by path of the model."""
        found = ((name, self._found(name)) for name in self.source.names())
        return {
            join(vector[0]): jnp.dtype(self.source.spec(name).dtype).name
            for name, vector in found
            if vector is not None
        }

    def _found(self, name: str) -> tuple[tuple[Any, ...], np.ndarray] | None:
        if self.source.is_packed(name):
            return None
        spec = self.source.spec(name)
        parsed = names_of(str(self.source.config.get("model_type"))).parse(name)
        if parsed is None or len(spec.shape) != 1 or not is_float(spec.dtype):
            return None
        return self.vectors.get(parsed.name)

    def packed(self, name: str) -> QuantizedTensor:
        """A packed tensor, with the layout that it has on disk."""
        stored = self.source.load(name)
        assert isinstance(stored, QuantizedTensor)
        path = tensor_roles(self.source.config).of(name, stored.full_shape).path
        learned = self.tensors.get(path)
        if learned is None:
            return stored
        for leaf, value in learned.leaves().items():
            if value is not None and not np.isfinite(np.asarray(value)).all():
                raise NonFiniteError(
                    f"`{name}.{leaf}` is not finite after learning; use a lower rate."
                )
        return learned.replace(layout=stored.layout)
