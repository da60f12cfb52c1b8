"""Sizes of quantized checkpoints: what is on the disk beside what stored bits claim.

    python -m experiments.sizes
    python -m experiments.sizes --model=facebook/opt-125m --bits=2,2.5,3 --methods=all

Runs what `kashin quantize` runs, into a directory that is removed afterwards, and
counts the bytes of every file that a reader needs: tensors, index and `config.json`.
They must be within 2 % of the stored bits claimed, else it is an error. It adds
to sizes.jsonl in `--out` and writes sizes.md; the same command goes on where an
interrupted one stopped.

Exit code 0: done; 1: a file or its content is unusable, or a size not as claimed; 2:
wrong flag; 130: Ctrl-C.
"""

import dataclasses
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.common.checkpoints import EMBEDDED, checkpoint_sha256, dense_directory
from experiments.common.flags import (
    COUNT,
    GIVEN,
    check_flags,
    command_line,
    flag,
    parse_widths,
    run_program,
    short_model_name,
)
from experiments.common.methods import (
    JOINT,
    METHODS,
    Width,
    choose_methods,
    joint_config,
)
from experiments.common.results import (
    environment_fields,
    prepare_output,
    remove_work,
    start_work,
    write_results,
)
from experiments.common.resumable import FinishedRecords
from experiments.common.tables import Column, Record, aligned_table, fixed
from kashin_jax import BasisSpec, Rules
from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.io import open_safetensors
from kashin_jax.methods import Method, config_to_json
from kashin_jax.methods.joint.coder import EFFORTS
from kashin_jax.pipeline import StreamResult, quantize_checkpoint

__all__ = ["COLUMNS", "SizesConfig", "main", "measure", "run"]

_ALLOWED = 0.02
_FILES = ("*.safetensors", "model.safetensors.index.json", "config.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizesConfig:
    """What is measured; meanings are in the flags.

    Raises:
      UsageError: If a value cannot work; the message names the flag.
    """

    model: tuple[str, ...] = flag(
        tuple(EMBEDDED),
        f"A list of: {', '.join(EMBEDDED)}, directories, hub ids; safetensors only.",
        GIVEN,
    )
    bits: tuple[str, ...] = flag(("2", "3", "4"), "Code widths, as a list.", GIVEN)
    methods: tuple[str, ...] = flag(
        (JOINT, "rtn-g128", "nf4-g64"),
        f"all, or a list of: {', '.join(METHODS)}. Widths that one lacks are left out.",
        GIVEN,
    )
    effort: str = flag(
        "fast",
        f"Effort of kashin-joint: {', '.join(EFFORTS)}. No size depends on it.",
        (EFFORTS.__contains__, f"one of {', '.join(EFFORTS)}"),
    )
    seed: int = flag(0, "Seed of all that is random. No size depends on it.", COUNT)
    out: str = flag("runs", "Directory of the results.", GIVEN)

    def __post_init__(self) -> None:
        check_flags(self)
        parse_widths("bits", self.bits, 1, 8)
        choose_methods(self.methods)


class _Source(NamedTuple):
    name: str
    directory: Path
    sha256: str


def run(config: SizesConfig) -> int:
    """Measures, prints and writes; returns the exit code.

    Raises:
      UsageError: If a flag does not fit a model or the output cannot be written.
      CheckpointError: If a model cannot be used, or a size is not as claimed.
    """
    out = prepare_output(config.out)
    sources = [_source(model) for model in config.model]
    work = start_work(out, config)
    records = measure(config, sources, work)
    _present(config, records, out)
    remove_work(work)
    return 0


def _source(model: str) -> _Source:
    path = EMBEDDED.get(model, model)
    directory = dense_directory(path, instead="`kashin inspect` shows its size.")
    return _Source(short_model_name(str(path)), directory, checkpoint_sha256(directory))


def measure(
    config: SizesConfig, sources: Sequence[_Source], work: Path
) -> list[dict[str, Any]]:
    """A record for every model, width and method that has the width.

    Args:
      config: What is measured.
      sources: The models.
      work: Keeps finished records and the checkpoint at hand; it must exist.

    Raises:
      CheckpointError: If a model cannot be used, or a size is not as claimed.
      UsageError: If no method has any of the widths.
    """
    finished = FinishedRecords(work / "finished.jsonl")
    records = []
    for source in sources:
        for bits in parse_widths("bits", config.bits, 1, 8):
            for name in choose_methods(config.methods):
                quantizer = _quantizer(name, bits, config.effort)
                if quantizer is None:
                    continue
                row = _row(config, source, name, bits, quantizer)
                known = finished.find(row)
                if not known:
                    known = [row | _measured(source, quantizer, config.seed, work)]
                    finished.add(known[0])
                records.append(known[0] | {"note": METHODS[name].note})
    if not records:
        raise UsageError(
            f"None of `--methods`={','.join(config.methods)} exists at "
            f"`--bits`={','.join(config.bits)}; change one of them."
        )
    return records


def _quantizer(name: str, bits: Width, effort: str) -> Method | None:
    """The method; None where it does not exist at this width."""
    basis = BasisSpec.parse("hadamard")
    try:
        if name == JOINT:
            return dataclasses.replace(joint_config(bits, basis), effort=effort)
        return METHODS[name].make(bits, basis, 1e-6, 6000)
    except ValueError:
        return None


def _row(
    config: SizesConfig,
    source: _Source,
    name: str,
    bits: Width,
    quantizer: Method,
) -> dict[str, Any]:
    return {
        "model": source.name,
        "method": name,
        "bits": bits,
        "config": config_to_json(quantizer),
        "seed": config.seed,
        "weights_sha256": source.sha256,
        **environment_fields(),
    }


def _measured(
    source: _Source, quantizer: Method, seed: int, work: Path
) -> dict[str, Any]:
    target = work / "checkpoint"
    # What another row was interrupted in is no start for this one.
    shutil.rmtree(target, ignore_errors=True)
    rules = Rules(config=quantizer)
    result = quantize_checkpoint(source.directory, target, rules, seed=seed)
    fields = _size_fields(source.directory, result)
    shutil.rmtree(target)
    return fields


def _size_fields(source: Path, result: StreamResult) -> dict[str, Any]:
    """Sizes by what the quantizer said and by what the file system says.

    The claim owes nothing to the files of the result: it is the stored bits of the
    packed tensors, as reported, and the size of all others in the source.
    """
    weights, plain = _source_sizes(source)
    packed = {name: math.prod(r.shape) for name, r in result.reports.items()}
    packed_bits = sum(report.stored_bits for report in result.reports.values())
    rest = sum(size for name, size in plain.items() if name not in packed)
    claimed = packed_bits / 8 + rest
    size, before = _bytes_of(result.directory), _bytes_of(source)
    if not abs(size - claimed) <= _ALLOWED * claimed:
        raise CheckpointError(
            f"{result.directory}: has {size:,} bytes, but claims {claimed:,.0f}; this "
            "is a defect of the format, report it."
        )
    return {
        "stored_bits_per_weight": packed_bits / sum(packed.values()),
        "model_bits_per_weight": 8 * claimed / weights,
        "bytes": size,
        "claimed_bytes": claimed,
        "overhead": size / claimed - 1,
        "source_bytes": before,
        "ratio": before / size,
        "packed_weights": sum(packed.values()),
        "weights": weights,
    }


def _source_sizes(directory: Path) -> tuple[int, dict[str, int]]:
    """Weights of all tensors, and the bytes of each by name."""
    weights, sizes = 0, {}
    for path in sorted(directory.glob("*.safetensors")):
        for name, spec in open_safetensors(path).specs.items():
            weights += math.prod(spec.shape)
            sizes[name] = spec.size
    return weights, sizes


def _bytes_of(directory: Path) -> int:
    return sum(p.stat().st_size for pattern in _FILES for p in directory.glob(pattern))


COLUMNS = (
    Column("method", "method"),
    Column("model", "model"),
    Column("bits", "bits"),
    Column("stored_bits_per_weight", "bits/weight", fixed(3)),
    Column("model_bits_per_weight", "whole model", fixed(3)),
    Column("bytes", "bytes on disk", "{:,}".format),
    Column("overhead", "over claim", "{:.2%}".format),
    Column("source_bytes", "source bytes", "{:,}".format),
    Column("ratio", "ratio", fixed(2)),
)


def _present(config: SizesConfig, records: Sequence[Record], out: Path) -> None:
    first = records[0]
    facts = [
        "Bytes on disk: every file of tensors, the index and `config.json`; of the "
        "source the same files.",
        "bits/weight: stored bits of the quantized matrices; whole model: of all "
        "weights, embeddings and heads in the type of the source among them. Over "
        "claim: what headers, descriptions, index and `config.json` add to these bits; "
        f"more than {_ALLOWED:.0%} would be an error.",
        f"kashin-joint at effort {config.effort}, seed {config.seed}; sizes depend on "
        "neither.",
        f"{first['device']}, jax {first['jax_version']}, kashin_jax "
        f"{first['kashin_jax_version']}.",
    ]
    print("\n".join(facts) + "\n\n" + aligned_table(records, COLUMNS))
    written = write_results(
        out, "sizes", records, COLUMNS, title="Sizes of quantized checkpoints",
        facts=facts, command=command_line("sizes", config, always=()),
    )  # fmt: skip
    print(f"\nWritten: {written.jsonl}, {written.markdown}")


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_program("sizes", __doc__, SizesConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
