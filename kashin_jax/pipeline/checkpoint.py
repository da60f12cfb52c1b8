"""Quantizing a checkpoint that may be larger than memory, and undoing it."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.io import (
    MAX_SHARD_BYTES,
    Checkpoint,
    PlannedTensor,
    TensorWriter,
    open_checkpoint,
    open_shard,
    plan_shards,
    quantization_config,
    record_file,
    shard_names,
    write_config,
    write_index,
    write_stored,
)
from kashin_jax.pipeline.calibrated_checkpoint import (
    calibrate_checkpoint,
    check_calibration,
)
from kashin_jax.pipeline.calibration import Calibration, calibration_rules
from kashin_jax.pipeline.checkpoint_plan import (
    check_copy,
    plan_checkpoint,
    refuse_foreign,
    stored_kernel,
    stored_tensor,
)
from kashin_jax.pipeline.coverage import Coverage
from kashin_jax.pipeline.mixed_widths import Widths, mixed_checkpoint_rules
from kashin_jax.pipeline.original_shards import keep_shards, original_shards
from kashin_jax.pipeline.other_files import copy_other_files
from kashin_jax.pipeline.plan import (
    Plan,
)
from kashin_jax.pipeline.report import LayerReport, warn_of_outliers
from kashin_jax.pipeline.resume import (
    claimed_directory,
    fingerprint,
    finished_run,
    forget_tensors,
    join_parts,
    keep_directory,
    keep_tensor,
    kept_numbers,
    kept_tensor,
    release_directory,
    remove_parts,
    write_part,
)
from kashin_jax.pipeline.rules import Rules, rules_to_json
from kashin_jax.pipeline.run import LayerQuantizer
from kashin_jax.progress import progress_bar
from kashin_jax.tensors import dequantize

__all__ = [
    "StreamResult",
    "dequantize_checkpoint",
    "quantize_checkpoint",
    "write_shards",
]

WriteTensor = Callable[[TensorWriter, PlannedTensor], LayerReport | None]


class StreamResult(NamedTuple):
    """A quantized checkpoint that was written: where, and what was lost.

    Attributes:
      directory: Where the new checkpoint is.
      reports: By name of the tensor, as `quantization_report.jsonl` holds them.
      resumed: Shards that an earlier run had finished.
      coverage: How much was quantized, and what was not.
      is_old: Whether an earlier run had finished all of it.
      widths: Who got which width of a budget; None without one, and where `is_old`.
    """

    directory: Path
    reports: dict[str, LayerReport]
    resumed: int
    coverage: Coverage
    is_old: bool = False
    widths: Widths | None = None


def quantize_checkpoint(
    source: str | Path,
    target: str | Path,
    rules: Rules | None = None,
    *,
    seed: int = 0,
    budget: int | float | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    exist_ok: bool = False,
    replace: Literal["finished", "unfinished"] | None = None,
    announce: Callable[[Checkpoint], None] | None = None,
    calibration: Calibration | None = None,
) -> StreamResult:
    """Quantizes a checkpoint into a directory of safetensors files, tensor by tensor.

    Memory is bounded by the largest matrix to quantize; other tensors are copied in
    slices. Every shard appears whole; an interrupted run goes on after the last matrix
    that was quantized and gives the same bytes as one that was not interrupted: those
    of an unfinished shard are kept in hidden files until it is whole. The codes are
    those that `quantize_model` finds for the loaded model with `jax.random.key(seed)`.

    Args:
      source: A checkpoint in Hugging Face's layout, or its hub id: safetensors, or else
        Flax's msgpack files, which give the same result. Those are read whole, one at
        a time, so that the largest of them bounds the memory, too.
      target: Must not exist, be empty, or hold an unfinished run of the same call.
      rules: Which matrices, and how; None takes `Rules()`.
      seed: Seeds everything random.
      budget: Stored bits per weight of all layers that no rule names, which have to be
        coded jointly: each gets a width of its own, see `mixed_checkpoint_rules`. None
        takes the widths of the rules.
      max_shard_bytes: Most bytes of data in a file.
      exist_ok: Whether `target` may also hold what the same call finished, which is
        then returned without any work. For this a hidden file stays in it: a digest of
        what it was made from (the source, as its headers and times of change show it,
        rules, seed, shards and versions) and the seconds that layers took.
      replace: What to remove from `target` first, whatever call it is of: a checkpoint
        that was `finished`, with all files in the directory, or an `unfinished` one.
      announce: Called with the source before the work begins, which may take hours,
        and once nothing was found wrong; not where there is none to do.
      calibration: A text that decides what is lost, see `quantize_calibrated`, for
        models that run here. The model is then held in memory, in float32.

    Raises:
      UsageError: If the rules do not suit the checkpoint, or `target` is taken.
      CheckpointError: If a file is missing, damaged, or cannot be written.
      NonFiniteError: If a matrix holds NaN or infinity; names it.
    """
    rules = Rules() if rules is None else rules
    checkpoint = open_checkpoint(source)
    if calibration is not None:
        rules = calibration_rules(rules, calibration.weighting)
        check_calibration(checkpoint, calibration)
    plan = plan_checkpoint(checkpoint, rules)
    check_copy(checkpoint)
    target = _separate(checkpoint.directory, Path(target))
    if replace and checkpoint.directory.resolve().is_relative_to(target.resolve()):
        raise UsageError(f"{target}: holds the source; name another directory.")
    run = fingerprint(
        checkpoint, rules, seed, max_shard_bytes, plan.tensors, budget,
        None if calibration is None else {"calibration": calibration.digest},
    )  # fmt: skip
    may_be_done = exist_ok and replace != "finished"
    if may_be_done and (found := finished_run(target, run)) is not None:
        count = len(open_checkpoint(target).files)
        return StreamResult(target, found, count, plan.coverage, is_old=True)
    widths = None
    with claimed_directory(target, run, replace):
        if announce is not None:
            announce(checkpoint)
        if budget is not None:
            kept = kept_numbers(target)
            rules, widths = mixed_checkpoint_rules(
                checkpoint, rules, budget, seed, kept
            )
            plan = plan_checkpoint(checkpoint, rules)
        shards = _cut(plan.tensors, max_shard_bytes)
        if calibration is not None:
            root, names = jax.random.key(seed), [name for name, _ in shards]
            calibrate_checkpoint(checkpoint, target, plan, calibration, root, names)
        reports, resumed = _quantize(checkpoint, target, plan, rules, seed, shards)
        kept_numbers(target).forget()
        if exist_ok:
            keep_directory(target, run, reports)
        else:
            release_directory(target)
    plan.coverage.warn()
    warn_of_outliers(reports)
    return StreamResult(target, reports, resumed, plan.coverage, widths=widths)


def _quantize(
    checkpoint: Checkpoint,
    target: Path,
    plan: Plan,
    rules: Rules,
    seed: int,
    shards: Sequence[tuple[str, Sequence[PlannedTensor]]],
) -> tuple[dict[str, LayerReport], int]:
    """Writes all files of a quantized checkpoint; reports and finished shards."""
    choices = {layer.choice.name: layer.choice for layer in plan.quantized}
    quantizer = LayerQuantizer(
        list(choices.values()),
        rules,
        jax.random.key(seed),
        lambda choice: stored_kernel(checkpoint, choice),
    )

    def write(writer: TensorWriter, planned: PlannedTensor) -> LayerReport | None:
        name = planned.name
        if name not in choices:
            checkpoint.copy(name, writer.sink(name))
            return None
        if (kept := kept_tensor(target, planned)) is not None:
            file, report = kept
            for leaf in planned.specs:
                file.copy(leaf, writer.sink(leaf))
            return report
        tensor, report = quantizer(choices[name])
        # Held until the shard is whole: no arrays.
        report = report.summary()
        keep_tensor(target, planned, tensor, report)
        write_stored(writer, name, tensor)
        return report

    work = {name: math.prod(each.candidate.shape) for name, each in choices.items()}
    resumed = write_shards(target, shards, write, work)
    reports = join_parts(target, [name for name, _ in shards])
    copy_other_files(checkpoint.directory, target)
    keep_shards(checkpoint, target)
    described = quantization_config(rules_to_json(rules), seed, plan.tensors)
    write_config(target, checkpoint.config, described)
    return reports, resumed


def _separate(source: Path, target: Path) -> Path:
    if target.resolve() == source.resolve():
        raise UsageError(f"{target}: is the source; name another directory.")
    return target


def _cut(
    tensors: Sequence[PlannedTensor], max_shard_bytes: int
) -> list[tuple[str, list[PlannedTensor]]]:
    """Tensors by the file that they go into."""
    shards = plan_shards(tensors, max_shard_bytes)
    return list(zip(shard_names(len(shards)), shards, strict=True))


def write_shards(
    target: Path,
    shards: Sequence[tuple[str, Sequence[PlannedTensor]]],
    write: WriteTensor,
    work: Mapping[str, int],
) -> int:
    """Writes what is missing, then the index; returns how many files were there.

    Args:
      target: The directory.
      shards: Names of files, and what goes into them.
      write: Writes one tensor.
      work: Weights to code or decode, by tensor: copies take next to no time.
    """
    finished = {name for name, _ in shards if (target / name).exists()}
    sizes = {name: sum(work.get(t.name, 0) for t in shard) for name, shard in shards}
    # Not part of the rate, which would otherwise promise the rest in no time.
    done = sum(sizes[name] for name in finished)
    records = []
    with progress_bar(sum(sizes.values()), "weights", initial=done) as progress:
        for name, shard in shards:
            path = target / name
            if name not in finished:
                with open_shard(path, shard) as writer:
                    reports = {}
                    for tensor in shard:
                        # Behind rate and remaining time, which a long name in
                        # front of them pushes off a terminal of 80 columns.
                        progress.set_postfix_str(tensor.name)
                        if (report := write(writer, tensor)) is not None:
                            reports[tensor.name] = report
                        progress.update(work.get(tensor.name, 0))
                    # Before the shard appears: a shard without its report is none.
                    write_part(target, name, reports)
            forget_tensors(target, shard)
            records.append(record_file(path))
    write_index(target, records)
    return len(finished)


def dequantize_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    max_shard_bytes: int | None = None,
) -> Path:
    """Decodes every packed matrix: the original layout and types, as others load it.

    Args:
      source: From `quantize_checkpoint`.
      target: Must not exist, or be empty.
      max_shard_bytes: Most bytes of data in a file; None takes the files that the
        original had, where the quantized checkpoint knows them.

    Raises:
      UsageError: If `source` holds nothing packed, or `target` is taken.
      CheckpointError: If a file is missing, damaged, or cannot be written.
    """
    checkpoint = open_checkpoint(source)
    refuse_foreign(checkpoint)
    if not checkpoint.descriptions:
        raise UsageError(f"{source}: holds no packed tensors; it can be used as it is.")
    if checkpoint.sha256 and (damaged := checkpoint.verify()):
        raise CheckpointError(
            f"{source}: {', '.join(damaged)} changed since they were written; copy or "
            "download them again."
        )
    target = _separate(checkpoint.directory, Path(target))
    planned = [stored_tensor(checkpoint, name, None) for name in checkpoint.names()]
    shards = None if max_shard_bytes else original_shards(checkpoint, planned)
    if shards is None:
        shards = _cut(planned, max_shard_bytes or MAX_SHARD_BYTES)
    run = fingerprint(checkpoint, Rules(), 0, max_shard_bytes or 0, planned)

    def write(writer: TensorWriter, planned: PlannedTensor) -> None:
        name = planned.name
        if not checkpoint.is_packed(name):
            checkpoint.copy(name, writer.sink(name))
            return
        tensor: Any = checkpoint.load(name)
        matrix = np.asarray(dequantize(tensor))
        is_transposed = checkpoint.described(name).is_transposed
        writer.write(name, matrix.swapaxes(-1, -2) if is_transposed else matrix)

    with claimed_directory(target, run):
        packed = checkpoint.descriptions
        work = {name: math.prod(checkpoint.spec(name).shape) for name in packed}
        write_shards(target, shards, write, work)
        remove_parts(target, [name for name, _ in shards])
        copy_other_files(checkpoint.directory, target)
        write_config(target, checkpoint.config)
        release_directory(target)
    return target
