"""Quantizing a checkpoint that may be larger than memory, and undoing it."""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.io import (
    MAX_SHARD_BYTES,
    Checkpoint,
    PlannedTensor,
    TensorSpec,
    TensorWriter,
    open_checkpoint,
    open_shard,
    plan_packed,
    plan_plain,
    plan_shards,
    quantization_config,
    record_file,
    shard_names,
    write_config,
    write_index,
    write_stored,
)
from kashin_jax.methods import distinct_values
from kashin_jax.models.registry import layer_names, tied_copy
from kashin_jax.pipeline.coverage import Coverage
from kashin_jax.pipeline.other_files import copy_other_files
from kashin_jax.pipeline.plan import (
    Candidate,
    Choice,
    LayerPlan,
    Plan,
    choose_methods,
    make_plan,
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
    kept_tensor,
    release_directory,
    remove_parts,
    write_part,
)
from kashin_jax.pipeline.rules import Rules, rules_to_json
from kashin_jax.pipeline.run import LayerQuantizer
from kashin_jax.pipeline.sharing import find_groups
from kashin_jax.progress import progress_bar
from kashin_jax.tensors import dequantize

__all__ = [
    "StreamResult",
    "dequantize_checkpoint",
    "plan_checkpoint",
    "quantize_checkpoint",
    "refuse_foreign",
]

_FLOATS = frozenset({"float32", "bfloat16", "float16"})
# Of a table that is compared with another one.
_ROWS = 4096

WriteTensor = Callable[[TensorWriter, PlannedTensor], LayerReport | None]


class StreamResult(NamedTuple):
    """What was written.

    Attributes:
      directory: Of the new checkpoint.
      reports: By name of the tensor, as `quantization_report.jsonl` holds them.
      resumed: Shards that an earlier run had finished.
      coverage: How much was quantized, and what was not.
      is_old: Whether an earlier run had finished all of it.
    """

    directory: Path
    reports: dict[str, LayerReport]
    resumed: int
    coverage: Coverage
    is_old: bool = False


def plan_checkpoint(source: Checkpoint, rules: Rules | None = None) -> Plan:
    """Applies rules to every matrix of a checkpoint; quantizes nothing.

    Of a matrix it reads as many rows as show that its values are many, usually one.

    Matrices are the floating-point tensors of two axes named `weight`, `kernel` or
    `embedding`; other arrays of two axes and more stay, and the plan says why. A head
    that is stored beside the embedding it is tied to is left out: rules that name
    either are about the embedding.

    Raises:
      UsageError: If the checkpoint is quantized already, a rule matches nothing, a
        method cannot code a matrix of that shape, or nothing is to be quantized.
      CheckpointError: If `config.json` is not what its architecture needs.
    """
    refuse_foreign(source)
    if source.descriptions:
        raise UsageError(
            f"{source.directory}: is quantized already; name the original checkpoint, "
            "or undo it with `kashin dequantize`."
        )
    rules = Rules() if rules is None else rules
    candidates = _candidates(source, rules)
    what = f"matrices of {source.directory}"
    choices = choose_methods(candidates, None, rules, None, what=what)
    matrices = {each.stored_name for each in candidates}
    stored = _without_copy(source)
    others = [source.spec(name) for name in stored if name not in matrices]
    plan = make_plan(
        choices,
        sum(spec.size for spec in others),
        sum(math.prod(spec.shape) for spec in others if is_float(spec.dtype)),
        _has_few_values(source, find_groups(choices, rules)),
    )
    packed = {layer.choice.name: layer for layer in plan.quantized}
    tensors = (_stored(source, name, packed.get(name)) for name in stored)
    return plan._replace(tensors=tuple(tensors))


def refuse_foreign(checkpoint: Checkpoint) -> None:
    """Raises UsageError if another library quantized a checkpoint."""
    method = (checkpoint.quantization or {}).get("quant_method", "kashin")
    if method != "kashin":
        raise UsageError(
            f"{checkpoint.directory}: is quantized by the method {str(method)[:40]!r} "
            "of another library; name the original checkpoint."
        )


def _without_copy(source: Checkpoint) -> list[str]:
    """Names of all tensors but a tied head, which the embedding stands for."""
    copy = tied_copy(source.names(), source.config)
    return [name for name in source.names() if copy is None or name != copy.head]


def _candidates(source: Checkpoint, rules: Rules) -> list[Candidate]:
    found = []
    copy = tied_copy(source.names(), source.config)
    layers = layer_names(source.names(), source.config)
    for name in _without_copy(source):
        spec = source.spec(name)
        if len(spec.shape) < 2 or 0 in spec.shape or not is_float(spec.dtype):
            continue
        stays = _why_left(spec, is_named=name in layers)
        path, is_transposed = layers.get(name) or (name.replace(".", "/"), False)
        swaps = is_transposed and len(spec.shape) == 2
        paths: tuple[str, ...] = (path,)
        if copy is not None and name == copy.embedding:
            paths = _named((path, layers[copy.head].path), rules) or paths
        found.append(
            Candidate(
                paths=paths,
                shape=spec.shape[::-1] if swaps else spec.shape,
                dtype=spec.dtype,
                left=stays,
                stored_name=name,
                is_transposed=is_transposed,
            )
        )
    return found


def _named(paths: tuple[str, ...], rules: Rules) -> tuple[str, ...]:
    """The paths that a rule or a pattern to skip is about."""

    def is_named(path: str) -> bool:
        skipped = any(re.search(pattern, path) for pattern in rules.skip)
        return skipped or rules.names(path)

    return tuple(filter(is_named, paths))


def _has_few_values(
    source: Checkpoint, groups: Collection[str]
) -> Callable[[Choice], bool]:
    """Whether matrices that share no scale have no more values than codes."""

    def few(choice: Choice) -> bool:
        config, name = choice.config, choice.name
        if config is None or choice.path in groups or not config.most_values:
            return False
        count = source.spec(name).shape[0]
        starts = (0, *range(1, count, _ROWS))
        ends = (1, *(min(start + _ROWS, count) for start in starts[1:]))
        file = source.file_of(name)
        parts = (file.read_rows(name, *ends) for ends in zip(starts, ends, strict=True))
        return distinct_values(parts, config.most_values) is not None

    return few


def _check_copy(source: Checkpoint) -> None:
    """Raises CheckpointError if a head to be left out is not the tied embedding."""
    if (copy := tied_copy(source.names(), source.config)) is None:
        return
    head, embedding = source.spec(copy.head).shape, source.spec(copy.embedding).shape
    if copy.head.endswith("kernel"):
        is_same = head == embedding[::-1] and np.array_equal(
            np.asarray(source.load(copy.head)).T,
            np.asarray(source.load(copy.embedding)),
        )
    else:
        is_same = head == embedding and all(
            np.array_equal(
                _rows(source, copy.head, start), _rows(source, copy.embedding, start)
            )
            for start in range(0, head[0], _ROWS)
        )
    if not is_same:
        raise CheckpointError(
            f"{source.directory}: `{copy.head}` differs from the token embedding that "
            "config.json ties it to; set `tie_word_embeddings` to false there."
        )


def _rows(source: Checkpoint, name: str, start: int) -> Shaped[np.ndarray, "..."]:
    file = source.file_of(name)
    return file.read_rows(name, start, min(start + _ROWS, file.spec(name).shape[0]))


def is_float(dtype: str) -> bool:
    """Whether NumPy's name of a type is that of a floating-point one."""
    return dtype.startswith(("float", "bfloat"))


def _why_left(spec: TensorSpec, *, is_named: bool) -> str | None:
    if spec.dtype not in _FLOATS:
        return f"its type is {spec.dtype}; {', '.join(sorted(_FLOATS))} are quantized"
    if len(spec.shape) != 2:
        return f"has {len(spec.shape)} axes"
    if not is_named:
        return "is not called weight, kernel or embedding"
    return None


def _stored(source: Checkpoint, name: str, plan: LayerPlan | None) -> PlannedTensor:
    if plan is None:
        spec = source.spec(name)
        return plan_plain(name, spec.dtype, spec.shape)
    is_transposed = plan.choice.candidate.is_transposed
    return plan_packed(name, plan.packed, is_transposed=is_transposed)


def quantize_checkpoint(
    source: str | Path,
    target: str | Path,
    rules: Rules | None = None,
    *,
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    exist_ok: bool = False,
    replace: Literal["finished", "unfinished"] | None = None,
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
      seed: Of everything random.
      max_shard_bytes: Of the data of a shard.
      exist_ok: Whether `target` may also hold what the same call finished, which is
        then returned without any work. For this a hidden file stays in it: a digest of
        what it was made from (the source, as its headers and times of change show it,
        rules, seed, shards and versions) and the seconds that layers took.
      replace: What to remove from `target` first, whatever call it is of: a checkpoint
        that was `finished`, with all files in the directory, or an `unfinished` one.

    Raises:
      UsageError: If the rules do not suit the checkpoint, or `target` is taken.
      CheckpointError: If a file is missing, damaged, or cannot be written.
      NonFiniteError: If a matrix holds NaN or infinity; names it.
    """
    rules = Rules() if rules is None else rules
    checkpoint = open_checkpoint(source)
    plan = plan_checkpoint(checkpoint, rules)
    _check_copy(checkpoint)
    target = _separate(checkpoint.directory, Path(target))
    if replace and checkpoint.directory.resolve().is_relative_to(target.resolve()):
        raise UsageError(f"{target}: holds the source; name another directory.")
    run = fingerprint(checkpoint, rules, seed, max_shard_bytes, plan.tensors)
    may_be_done = exist_ok and replace != "finished"
    if may_be_done and (found := finished_run(target, run)) is not None:
        count = len(open_checkpoint(target).files)
        return StreamResult(target, found, count, plan.coverage, is_old=True)
    with claimed_directory(target, run, replace):
        reports, resumed = _quantize(
            checkpoint, target, plan, rules, seed, max_shard_bytes
        )
        if exist_ok:
            keep_directory(target, run, reports)
        else:
            release_directory(target)
    plan.coverage.warn()
    warn_of_outliers(reports)
    return StreamResult(target, reports, resumed, plan.coverage)


def _quantize(
    checkpoint: Checkpoint,
    target: Path,
    plan: Plan,
    rules: Rules,
    seed: int,
    max_shard_bytes: int,
) -> tuple[dict[str, LayerReport], int]:
    """Writes all files of a quantized checkpoint; reports and finished shards."""
    choices = {layer.choice.name: layer.choice for layer in plan.quantized}
    quantizer = LayerQuantizer(
        list(choices.values()),
        rules,
        jax.random.key(seed),
        lambda choice: _kernel(checkpoint, choice),
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
    shards, resumed = _write_shards(target, plan.tensors, max_shard_bytes, write, work)
    reports = join_parts(target, shards)
    copy_other_files(checkpoint.directory, target)
    described = quantization_config(rules_to_json(rules), seed, plan.tensors)
    write_config(target, checkpoint.config, described)
    return reports, resumed


def _separate(source: Path, target: Path) -> Path:
    if target.resolve() == source.resolve():
        raise UsageError(f"{target}: is the source; name another directory.")
    return target


def _kernel(source: Checkpoint, choice: Choice) -> Array:
    stored = source.load(choice.name)
    assert isinstance(stored, np.ndarray)
    return jnp.asarray(stored.T if choice.candidate.is_transposed else stored)


def _write_shards(
    target: Path,
    tensors: Sequence[PlannedTensor],
    max_shard_bytes: int,
    write: WriteTensor,
    work: Mapping[str, int],
) -> tuple[list[str], int]:
    """Writes what is missing, then the index; names, and how many were there.

    Args:
      target: The directory.
      tensors: All, in order.
      max_shard_bytes: Of the data of a shard.
      write: Writes one of them.
      work: Weights to code or decode, by tensor: copies take next to no time.
    """
    shards = plan_shards(tensors, max_shard_bytes)
    names = shard_names(len(shards))
    finished = {name for name in names if (target / name).exists()}
    sizes = [sum(work.get(tensor.name, 0) for tensor in shard) for shard in shards]
    # Not part of the rate, which would otherwise promise the rest in no time.
    done = sum(n for name, n in zip(names, sizes, strict=True) if name in finished)
    records = []
    with progress_bar(sum(sizes), "weights", initial=done) as progress:
        for name, shard in zip(names, shards, strict=True):
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
    return names, len(finished)


def dequantize_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Decodes every packed matrix: the original layout and types, as others load it.

    Args:
      source: From `quantize_checkpoint`.
      target: Must not exist, or be empty.
      max_shard_bytes: Of the data of a shard.

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
    planned = [_stored(checkpoint, name, None) for name in checkpoint.names()]
    run = fingerprint(checkpoint, Rules(), 0, max_shard_bytes, planned)

    def write(writer: TensorWriter, planned: PlannedTensor) -> None:
        name = planned.name
        if not checkpoint.is_packed(name):
            checkpoint.copy(name, writer.sink(name))
            return
        tensor: Any = checkpoint.load(name)
        matrix = np.asarray(dequantize(tensor))
        is_transposed = checkpoint.described(name).is_transposed
        writer.write(name, matrix.T if is_transposed else matrix)

    with claimed_directory(target, run):
        packed = checkpoint.descriptions
        work = {name: math.prod(checkpoint.spec(name).shape) for name in packed}
        shards, _ = _write_shards(target, planned, max_shard_bytes, write, work)
        remove_parts(target, shards)
        copy_other_files(checkpoint.directory, target)
        write_config(target, checkpoint.config)
        release_directory(target)
    return target
