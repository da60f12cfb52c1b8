"""Perplexity of a quantized language model: the 2024 paper's table, with its controls.

    python -m experiments.opt_ppl --bits=4
    python -m experiments.opt_ppl --bits=2,3,4 --max_tokens=all --seed=0,1,2
    python -m experiments.opt_ppl --bits=2 --calibration=default \
        --methods=kashin-joint-calibrated,gptq-g128
    python -m experiments.opt_ppl --model=facebook/opt-125m --dataset=lambada \
        --basis=haar --bits=4,5,6 --max_tokens=all

Without flags it takes the embedded checkpoint opt-wiki-18m and the first 8,192 tokens
of the embedded text wiki_vital, one basis and one seed; the other data sets come from
`--data_dir` or the hub. All linear matrices of the blocks are quantized; embeddings,
norms, biases and the output head are not. It prints one row per method, adds the rows
to table2_opt.jsonl in `--out`, and writes table2_opt.md and table2_opt.png; with
`--calibration` these are called calibrated_opt. The same command goes on where an
interrupted one stopped. Rows that the file has, of the same model, text, choices,
versions and device, are taken from there unless `--fresh`.

Exit code 0: done; 1: a file or its content is unusable; 2: wrong flag; 130: Ctrl-C.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax

from experiments.common.calibration import NamedCalibration, load_calibration
from experiments.common.checkpoints import checkpoint_sha256, dense_directory
from experiments.common.flags import (
    GIVEN,
    POSITIVE_COUNT,
    check_flags,
    command_line,
    flag,
    parse_bases,
    parse_numbers,
    parse_widths,
    run_program,
    short_model_name,
)
from experiments.common.methods import (
    CALIBRATED_METHODS,
    METHODS,
    choose_methods,
    table_grid,
)
from experiments.common.perplexity import (
    Bench,
    full_precision_row,
    quantized_row,
    refined_control_row,
)
from experiments.common.perplexity_table import (
    COMPARISON_TITLE,
    comparison_tables,
    plot_perplexity,
)
from experiments.common.published import published_perplexity
from experiments.common.results import (
    earlier_records,
    environment_fields,
    prepare_output,
    remove_work,
    start_work,
    write_results,
)
from experiments.common.resumable import FinishedRecords
from experiments.common.tables import PERPLEXITY_COLUMNS, Column, aligned_table, fixed
from experiments.common.text import (
    ASSETS,
    DATASETS,
    EvaluationText,
    default_context,
    load_text,
    parse_max_tokens,
)
from kashin_jax.bases import FAMILIES
from kashin_jax.errors import UsageError
from kashin_jax.io import open_checkpoint, quantized_before, read_json
from kashin_jax.models.context import own_context
from kashin_jax.models.loading import LoadedModel, load_language_model
from kashin_jax.models.tokenizer import AUTO, check_vocabulary, load_tokenizer

__all__ = ["OptPplConfig", "main", "run"]

ARTIFACT, CALIBRATED_ARTIFACT = "table2_opt", "calibrated_opt"
EMBEDDED = ASSETS / "opt-wiki-18m"
_INSTEAD = "`kashin eval` scores it."
_DATASET = (lambda x: x in DATASETS, f"one of {', '.join(DATASETS)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptPplConfig:
    """A table; meanings are in the flags.

    Raises:
      UsageError: If a value cannot work; the message names the flag.
    """

    bits: tuple[str, ...] = flag(
        ("4",), "Code widths, 1 to 8, as a list; 2.7, say, is a total budget.", GIVEN
    )
    model: str = flag(
        str(EMBEDDED), "Language model: directory, GGUF file or hub id.", GIVEN
    )
    dataset: str = flag("wiki_vital", f"One of {', '.join(DATASETS)}.", _DATASET)
    data_dir: str = flag(
        "",
        "Folder with wikitext2/wiki.test.raw, lambada/lambada_test.jsonl, "
        "ptb/ptb.test.txt or c4/c4-validation.00000-of-00008.json.gz; what it lacks is "
        "downloaded from the Hugging Face hub.",
    )
    text_file: str = flag("", "Score this UTF-8 text instead of a data set.")
    context: int = flag(
        0, "Window in tokens; 0: the length the model was trained at.",
        (lambda x: x == 0 or x >= 2, "0 or at least 2"),
    )  # fmt: skip
    bos: str = flag(
        AUTO,
        "What the text begins with: auto (as the tokenizer's files say), none, or a "
        "token.",
        GIVEN,
    )
    max_tokens: str = flag("8192", "Tokens scored, from the first on; or `all`.")
    methods: tuple[str, ...] = flag(
        ("all",),
        f"all, or a list of: {', '.join((*METHODS, *CALIBRATED_METHODS))}; the last "
        f"{len(CALIBRATED_METHODS)} need --calibration.",
    )
    calibration: str = flag(
        "",
        "UTF-8 text that calibrated methods learn from; `default`: the split of "
        "wiki_vital for it, less what the model was trained on; wikitext2 or c4: the "
        "training text of either.",
    )
    calibration_tokens: int = flag(
        131_072, "Tokens of it, in whole windows.", POSITIVE_COUNT
    )
    basis: tuple[str, ...] = flag(
        ("hadamard",),
        f"List of families ({', '.join(FAMILIES)}); `left:right` for unequal sides.",
        GIVEN,
    )
    seed: tuple[str, ...] = flag(
        ("0",), "Seeds, as a list; each is a row of the random methods.", GIVEN
    )
    rtol: float = flag(
        1e-6, "Relative residual at which the decomposition has converged.",
        (lambda x: 0 < x < 1, "in (0, 1)"),
    )  # fmt: skip
    max_steps: int = flag(200, "Greedy steps allowed per matrix.", POSITIVE_COUNT)
    batch_size: int = flag(4, "Windows per forward pass.", POSITIVE_COUNT)
    fresh: bool = flag(
        False, "Compute rows again that the results in --out have already."
    )
    out: str = flag("runs", "Directory of the results.", GIVEN)

    def __post_init__(self) -> None:
        check_flags(self)
        choose_methods(
            self.methods, calibrated=CALIBRATED_METHODS if self.calibration else None
        )
        parse_max_tokens(self.max_tokens)
        parse_widths("bits", self.bits, 1, 8)
        parse_numbers("seed", self.seed, 0, 2**31 - 1)
        parse_bases(self.basis)


def run(config: OptPplConfig) -> int:
    """Makes, prints and writes the table; returns the exit code.

    Raises:
      UsageError: If a flag does not fit the model or the output cannot be written.
      CheckpointError: If the model cannot be loaded.
      DataError: If the text cannot be used.
    """
    out = prepare_output(config.out)
    # TF32 would put the products of a float32 model at three digits on a GPU.
    with jax.default_matmul_precision("highest"):
        loaded = load_language_model(dense_directory(config.model, instead=_INSTEAD))
        text = _load_text(config, loaded)
        name = short_model_name(config.model)
        work = start_work(out, config, leaving=("batch_size", "fresh"))
        # Methods without calibration are the same in both files.
        names = (_artifact(config), ARTIFACT)
        earlier = [] if config.fresh else earlier_records(out, names)
        calibration = _load_calibration(config, loaded)
        if calibration and calibration.text_sha256 == text.text_sha256:
            raise UsageError(
                f"`--calibration={config.calibration}` is the text that is scored; "
                "name another."
            )
        bench = Bench(
            loaded=loaded,
            text=text,
            work=work,
            identity=_identity(config, name, text, loaded),
            weights_sha256=checkpoint_sha256(loaded.directory),
            batch_size=config.batch_size,
            finished=FinishedRecords(work / "rows.jsonl", earlier),
            calibration=calibration,
        )
        records = _rows(config, bench)
    _present(config, records, text, out)
    remove_work(work)
    return 0


def _artifact(config: OptPplConfig) -> str:
    """The name of the files: tables with calibrated rows are other ones."""
    return CALIBRATED_ARTIFACT if config.calibration else ARTIFACT


def _identity(
    config: OptPplConfig, name: str, text: EvaluationText, loaded: LoadedModel
) -> dict[str, Any]:
    """The fields of every row: what is scored, how much of it, and by what."""
    limit = parse_max_tokens(config.max_tokens)
    before = quantized_before(read_json(loaded.directory / "config.json"))
    return {
        "model": name,
        **({} if before is None else {"quantized_before": before}),
        **text.record_fields(),
        "max_tokens": "all" if limit is None else limit,
        **environment_fields(),
    }


def _load_text(config: OptPplConfig, loaded: LoadedModel) -> EvaluationText:
    tokenizer = load_tokenizer(loaded.directory, bos=config.bos)
    check_vocabulary(tokenizer, loaded.config.vocab_size)
    limit = loaded.config.context_length
    if config.context > limit:
        raise UsageError(
            f"`--context`={config.context} exceeds the {limit} positions of the model; "
            "lower it."
        )
    return load_text(
        config.dataset,
        tokenizer,
        context=config.context or default_context(config.dataset, own_context(loaded)),
        text_file=config.text_file or None,
        max_tokens=parse_max_tokens(config.max_tokens),
        data_dir=Path(config.data_dir) if config.data_dir else None,
        names_bos=config.bos != AUTO,
    )


def _load_calibration(
    config: OptPplConfig, loaded: LoadedModel
) -> NamedCalibration | None:
    if not config.calibration:
        return None
    source = open_checkpoint(loaded.directory)
    return load_calibration(
        config.calibration, source, config.calibration_tokens,
        Path(config.data_dir) if config.data_dir else None,
    )  # fmt: skip


def _rows(config: OptPplConfig, bench: Bench) -> list[dict[str, Any]]:
    full = full_precision_row(bench)
    records = [full]
    _announce(full)
    chosen = choose_methods(
        config.methods, calibrated=CALIBRATED_METHODS if config.calibration else None
    )
    seeds = parse_numbers("seed", config.seed, 0, 2**31 - 1)
    grid = table_grid(
        parse_widths("bits", config.bits, 1, 8), chosen, parse_bases(config.basis),
        seeds,
    )  # fmt: skip
    refinements = dict.fromkeys(m.refinement for m in chosen.values() if m.refinement)
    for refinement in refinements:
        for seed in seeds if refinement.text_weight else ():
            row = refined_control_row(bench, refinement, seed)
            records.append(_with_increase(row, full))
            _announce(row)
    for one in grid:
        row = quantized_row(
            bench, one.name, one.method, bits=one.bits, basis=one.basis, seed=one.seed,
            rtol=config.rtol, max_steps=config.max_steps,
        )  # fmt: skip
        records.append(_with_increase(row, full))
        _announce(row)
    return [_with_published(config, record) for record in records]


def _with_increase(row: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    if row["perplexity"] is not None:
        row["increase"] = row["perplexity"] - full["perplexity"]
    return row


def _announce(row: dict[str, Any]) -> None:
    value = "-" if row["perplexity"] is None else f"{row['perplexity']:.3f}"
    print(f"{row['method']}, {row['bits']} bits: {value}", file=sys.stderr)


def _with_published(config: OptPplConfig, record: dict[str, Any]) -> dict[str, Any]:
    value = published_perplexity(
        record["model"],
        record["dataset"],
        record["context"],
        parse_max_tokens(config.max_tokens) is not None,
        record["method"],
        record["bits"],
    )
    return record if value is None else {**record, "published": value}


def _present(
    config: OptPplConfig,
    records: list[dict[str, Any]],
    text: EvaluationText,
    out: Path,
) -> None:
    columns = _columns(config, records)
    first, limit = records[0], parse_max_tokens(config.max_tokens)
    before = first.get("quantized_before")
    facts = [
        f"Model {first['model']}; {first['tokens']} predictions scored, which stand "
        f"for {first['bytes']} bytes; the text begins with "
        f"{first['bos_token'] or 'no token of its own'}."
        + (_LIMITED if text.tokens.size == limit else ""),
        *([] if before is None else [_AGAIN.format(types=before)]),
        f"{text.name}: {text.protocol}.",
        *text.notes,
        "Kashin coding runs through packed layers, the other methods decoded. "
        "Sizes are stored bits: codes, centroids, scales, zero points, seeds. "
        "`seconds` is quantization time on this device, compilation included.",
        f"{first['device']}, jax {first['jax_version']}, "
        f"kashin_jax {first['kashin_jax_version']}.",
    ]
    print("\n".join(facts) + "\n\n" + aligned_table(records, columns))
    compared, compared_markdown = comparison_tables(records)
    appendix = ""
    if compared:
        print(f"\n{COMPARISON_TITLE}:\n{compared}")
        appendix = f"## {COMPARISON_TITLE}\n\n{compared_markdown}"
    title = f"{first['model']}: perplexity on {text.name}"
    written = write_results(
        out,
        _artifact(config),
        records,
        columns,
        title=title,
        command=command_line(
            "opt_ppl", dataclasses.replace(config, fresh=False), always=("bits",)
        ),
        facts=facts,
        appendix=appendix,
    )
    picture = out / f"{_artifact(config)}.png"
    plot_perplexity(records, picture, title=title)
    print(f"\nWritten: {written.jsonl}, {written.markdown}, {picture}")


_LIMITED = " This is the beginning of the text; `--max_tokens=all` scores all of it."


_AGAIN = (
    "This quantizes again what was quantized once: the GGUF file holds {types}. Its "
    "decoded weights stand for full precision, and grids like theirs look better than "
    "they are."
)


def _columns(config: OptPplConfig, records: list[dict[str, Any]]) -> tuple[Column, ...]:
    columns = list(PERPLEXITY_COLUMNS)
    place = 1 + [column.key for column in columns].index("perplexity")
    columns.insert(place, Column("bits_per_byte", "bits/byte", fixed(4)))
    if len(config.seed) > 1:
        columns.insert(1, Column("seed", "seed"))
    if len(config.basis) > 1:
        columns.insert(1, Column("basis", "basis"))
    if any("output_error" in record for record in records):
        columns.insert(-1, Column("output_error", "outputs", fixed(4)))
    if any("published" in record for record in records):
        columns.insert(-1, Column("published", "published", fixed(2)))
    return tuple(columns)


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_program("opt_ppl", __doc__, OptPplConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
