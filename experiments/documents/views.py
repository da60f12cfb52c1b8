"""The tables of README and docs, by the names that stand in their markers.

A view takes the records of one result file, those that fit its filter, and makes a
Markdown table of them with the code that prints the table of a program.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from experiments import (
    ablate_bases,
    learn_butterfly,
    rate_distortion,
    refine_glue,
    robustness,
    sizes,
)
from experiments.classification.tasks import TASKS
from experiments.common.methods import (
    CALIBRATED_METHODS,
    FULL_PRECISION,
    GLUE_METHODS,
    JOINT,
    METHODS,
    REFINED_CONTROL,
)
from experiments.common.perplexity_table import (
    comparison_tables,
    mean_columns,
    mean_rows,
    short_table,
)
from experiments.common.tables import (
    PERPLEXITY_COLUMNS,
    Column,
    Record,
    fixed,
    increase,
    markdown_table,
    share,
)
from experiments.depth_curves import (
    SUMMARY_COLUMNS,
    setting_columns,
    setting_rows,
    summary_rows,
)
from experiments.glue import glue_columns, table_rows
from experiments.table1 import COLUMNS as TABLE1_COLUMNS

__all__ = ["FIVE_TASKS", "SENTIMENT", "VIEWS", "View", "Where", "ordered", "select"]

Where = dict[str, Any]


class View(NamedTuple):
    """A table of a document.

    Attributes:
      file: Of `RESULT_FILES`.
      where: What its records have, as `select` reads it.
      table: Makes Markdown of them.
    """

    file: str
    where: Where
    table: Callable[[Sequence[Record]], str]

    def markdown(self, records: Sequence[Record]) -> str:
        """The table of its records; the notes of rows are said once, in the docs."""
        return self.table([{**record, "note": None} for record in records])


def select(records: Sequence[Record], where: Where) -> list[Record]:
    """The records whose fields have the values of `where`; of a list, any value."""
    return [
        record
        for record in records
        if all(
            record.get(field) in wanted
            if isinstance(wanted, list | tuple)
            else record.get(field) == wanted
            for field, wanted in where.items()
        )
    ]


def ordered(
    records: Sequence[Record], methods: Sequence[str] = tuple(METHODS)
) -> list[Record]:
    """Rows as the programs print them: full precision, then by width and method.

    Args:
      records: With method, bits, and perhaps basis and seed.
      methods: The first ones, in their order.
    """
    every = dict.fromkeys((*methods, *METHODS, *CALIBRATED_METHODS))
    full = FULL_PRECISION, REFINED_CONTROL
    order = [*full, *every]

    def place(record: Record) -> tuple[Any, ...]:
        method = str(record["method"]).removesuffix("-mixed")
        return (
            method not in full, record["bits"], order.index(method),
            record.get("basis") or "", record.get("seed") or 0,
        )  # fmt: skip

    return sorted(records, key=place)


def _plain(columns: Sequence[Column], records: Sequence[Record]) -> str:
    return markdown_table(records, columns)


def _rows(extra: Sequence[Column], records: Sequence[Record]) -> str:
    columns = (PERPLEXITY_COLUMNS[0], *extra, *PERPLEXITY_COLUMNS[1:])
    return markdown_table(ordered(records), columns)


def _means(records: Sequence[Record]) -> str:
    rows = mean_rows(ordered(records, (JOINT, *METHODS)))
    return markdown_table(rows, mean_columns(rows))


def _calibrated(records: Sequence[Record]) -> str:
    return markdown_table(mean_rows(ordered(records)), _CALIBRATED)


def _compared(records: Sequence[Record]) -> str:
    return comparison_tables(ordered(records))[1]


def _short(records: Sequence[Record]) -> str:
    methods = (JOINT, "kashin", "nf4-g64", "hqq-g64", "rotate-k-means", FULL_PRECISION)
    rows, columns = short_table(records, methods, (4, 3, 2))
    return markdown_table(rows, columns)


def _glue(names: Sequence[str], records: Sequence[Record]) -> str:
    tasks = [TASKS[name] for name in names]
    own = ordered(records, (JOINT, *GLUE_METHODS))
    return markdown_table(table_rows(tasks, own), glue_columns(tasks, own))


def _rate(records: Sequence[Record]) -> str:
    by_width = sorted(records, key=lambda record: record["bits"])
    return markdown_table(by_width, rate_distortion.COLUMNS)


def _refined(task: str, records: Sequence[Record]) -> str:
    rows, columns = refine_glue.table(TASKS[task], records)
    return markdown_table(rows, columns)


def _depth(records: Sequence[Record]) -> str:
    return markdown_table(summary_rows(records), SUMMARY_COLUMNS)


def _settings(records: Sequence[Record]) -> str:
    return markdown_table(setting_rows(records), setting_columns(records))


def _robustness(field: str, records: Sequence[Record]) -> str:
    rows, columns = robustness.table(records, field)
    return markdown_table(rows, columns)


def _ablation(records: Sequence[Record]) -> str:
    return markdown_table(ablate_bases.summary(records), ablate_bases.SUMMARY)


def _curve(records: Sequence[Record]) -> str:
    columns = (
        Column("step", "step"),
        Column("loss", "training loss", fixed(2)),
    )
    return markdown_table(records, columns)


_WIKITEXT: Where = {"dataset": "wikitext2", "model": "opt-wiki-18m"}
_WHOLE = _WIKITEXT | {"max_tokens": "all", "seed": [None, 0]}
_SEEDS: Where = {
    "seed": [None, 0, 1, 2],
    "basis": [None, "hadamard"],
    "max_tokens": 16384,
}
_RIVALS = [
    FULL_PRECISION, JOINT, "rtn-g128", "nf4-g64", "hqq-g64", "rotate-rtn-g64",
    "k-means-channel", "rotate-k-means",
]  # fmt: skip
_WITHOUT_TEXT = [JOINT, "kashin-dct", "rtn-g128", "rotate-k-means"]
_VITAL: Where = {"dataset": "wiki_vital", "model": "opt-wiki-18m"} | _SEEDS
_LLAMA: Where = {"dataset": "wiki_vital", "model": "llama-wiki-12m"}
_FIRST = _WIKITEXT | {"max_tokens": 8192}
_GLUE: Where = {"model": "minilm-glue"}
FIVE_TASKS = ("cola", "sst2", "rte", "stsb", "mrpc")
CALIBRATED_TASKS = ("sst2", "stsb", "mrpc")
SENTIMENT = ("sentiment-amazon", "sentiment-nyt")
_STUDY: Where = {"data": ["wikitext2", "sst2, stsb"]}
_SEED = Column("seed", "seed")
_BASIS = Column("basis", "basis")


def _opt(where: Where, table: Callable[[Sequence[Record]], str]) -> View:
    return View("table2_opt", where, table)


def _glue_view(names: Sequence[str], where: Where) -> View:
    own = _GLUE | {"task": list(names)} | where
    return View("table3_glue", own, partial(_glue, names))


def _rates(source: str, **where: Any) -> View:
    return View("rate_distortion", {"source": source} | where, _rate)


_TIMES_DENSE = (
    Column("times_dense", "times dense, best over best", fixed(2)),
    Column("median_times_dense", "medians", fixed(2)),
    Column("load", "load", fixed(1)),
)
_PRODUCT = (
    Column("rows", "rows of x"),
    Column("bits", "bits"),
    Column("milliseconds", "ms", fixed(2)),
    Column("dense_milliseconds", "ms, dense float32", fixed(2)),
    *_TIMES_DENSE,
)
_PEERS = (
    Column("rows", "rows of x"),
    Column("method", "weights"),
    Column("stored_bits_per_weight", "bits", fixed(2)),
    Column("milliseconds", "ms", fixed(2)),
    *_TIMES_DENSE,
)
_CALIBRATED = (
    Column("method", "method"),
    Column("bits", "bits"),
    Column("stored_bits_per_weight", "bits/weight", fixed(3)),
    Column("seeds", "seeds"),
    Column("perplexity", "perplexity"),
    Column("increase", "increase", increase),
    Column("output_error", "outputs lose", fixed(4)),
    Column("data_free_output_error", "without text", fixed(4)),
)
_CALIBRATION = (
    Column("part", "part"),
    Column("inputs", "inputs"),
    Column("outputs", "outputs"),
    Column("cpu_seconds", "CPU seconds", fixed(3)),
    Column("times_moments", "memory over 4 bytes x inputs²", fixed(2)),
    Column("load", "load", fixed(1)),
)
_ESTIMATES = (
    Column("model", "model"),
    Column("effort", "effort"),
    Column("devices", "GPUs"),
    Column("statistics_seconds", "statistics, s", fixed(0)),
    Column("feedback_seconds", "factors and feedback, s", fixed(0)),
    Column("search_seconds", "search, s", fixed(0)),
    Column("hours", "hours in all", fixed(2)),
)
_GENERATION = (
    Column("model", "model"),
    Column("batch", "batch"),
    Column("weights", "weights"),
    Column("tokens_per_second", "tokens/s", fixed(1)),
    Column("times_float32", "times float32, best over best", fixed(2)),
    Column("median_times_float32", "medians", fixed(2)),
    Column("megabytes", "MB of arrays", fixed(0)),
    Column("resident_megabytes", "MB resident", fixed(0)),
    Column("bandwidth_share", "of bandwidth", share),
    Column("load", "load", fixed(1)),
)


def _products(records: Sequence[Record]) -> str:
    in_order = sorted(records, key=lambda record: (record["rows"], record["bits"]))
    return markdown_table(in_order, _PRODUCT)


VIEWS: Mapping[str, View] = MappingProxyType({
    "opt-wiki-vital": _opt(_VITAL, _means),
    "opt-wiki-vital-short": _opt(_VITAL, _short),
    "opt-wiki-vital-rivals": _opt(_VITAL, _compared),
    "llama-wiki-vital": _opt(_LLAMA, _means),
    "opt-wikitext2-whole": _opt(_WHOLE, partial(_rows, ())),
    "opt-wikitext2-8k": _opt(
        _FIRST | {"bits": [4, 16], "seed": [None, 0], "basis": [None, "hadamard"]},
        partial(_rows, ()),
    ),
    "opt-wikitext2-16k": _opt(_WIKITEXT | _SEEDS, _means),
    "opt-16k-seeds": _opt(_WIKITEXT | _SEEDS | {"method": _RIVALS}, _compared),
    "opt-wikitext2-haar": _opt(
        _WIKITEXT | {"max_tokens": 16384, "basis": "haar"}, partial(_rows, (_BASIS,))
    ),
    "opt-one-sided": _opt(
        _FIRST | {"method": JOINT, "bits": [2, 3, 4]}, partial(_rows, (_BASIS, _SEED))
    ),
    "opt-mixed-widths": _opt(
        _FIRST | {"method": [FULL_PRECISION, JOINT, f"{JOINT}-mixed"]}
        | {"basis": [None, "hadamard"], "bits": [16, 2.5, 2.7, 3, 3.07, 3.5]},
        partial(_rows, (_SEED,)),
    ),
    "opt-data-free": _opt(
        _VITAL | {"method": _WITHOUT_TEXT, "bits": [2, 3, 4]},
        _means,
    ),
    "opt-calibrated": View("calibrated_opt", _VITAL, _calibrated),
    "opt-calibrated-wikitext2": View(
        "calibrated_opt", _WIKITEXT | _SEEDS, _calibrated
    ),
    "opt-calibrated-lambada": View(
        "calibrated_opt", {"dataset": "lambada"} | _SEEDS, _calibrated
    ),
    "glue-calibrated": View(
        "calibrated_glue", _GLUE, partial(_glue, (*CALIBRATED_TASKS, *SENTIMENT))
    ),
    "opt-lambada": _opt({"dataset": "lambada"} | _SEEDS, _means),
    "opt-lambada-rivals": _opt({"dataset": "lambada"} | _SEEDS, _compared),
    "sentiment": _glue_view(SENTIMENT, {}),
    "glue-sst2-stsb": _glue_view(("sst2", "stsb"), {
        "bits": [4, 16], "seed": [None, 0], "method": [FULL_PRECISION, *GLUE_METHODS],
    }),
    "glue-five-tasks": _glue_view(FIVE_TASKS, {}),
    "refine-mrpc": View(
        "refine_glue", _GLUE | {"task": "mrpc"}, partial(_refined, "mrpc")
    ),
    "rate-gaussian-efforts": _rates("gaussian", method=JOINT),
    "rate-gaussian": _rates("gaussian", effort=[None, "default"]),
    "rate-student-t3": _rates("student_t3"),
    "rate-outlier-columns": _rates("outlier_columns"),
    "rate-opt-wiki": _rates("opt-wiki-18m/model.safetensors"),
    "depth": View("depth", _STUDY, _depth),
    "depth-settings": View("depth", _STUDY, _settings),
    "robustness": View("robustness", {}, partial(_robustness, "log10_residual_mean")),
    "robustness-steps": View("robustness", {}, partial(_robustness, "steps_mean")),
    "robustness-levels": View("robustness", {}, partial(_robustness, "level_mean")),
    "ablate-bases": View("ablate_bases", {}, _ablation),
    "learn-butterfly": View(
        "learn_butterfly", {}, partial(_plain, learn_butterfly.COLUMNS)
    ),
    "sizes": View("sizes", {}, partial(_plain, sizes.COLUMNS)),
    "table1": View("table1", {}, partial(_plain, TABLE1_COLUMNS)),
    "cpu-kernel-products": View(
        "bench_matmul",
        {"block": "square-4096", "method": f"{JOINT} by kernel", "device": "cpu"},
        _products,
    ),
    "cpu-kernel-peers": View("bench_peers", {"device": "cpu"}, partial(_plain, _PEERS)),
    "calibration-layers": View(
        "bench_calibration",
        {"part": ["moments", "host sum", "factors", "coding", "coding without",
                  "memory"], "device": "cpu"},
        partial(_plain, _CALIBRATION),
    ),
    "calibration-estimates": View(
        "bench_calibration", {"part": "estimate"}, partial(_plain, _ESTIMATES)
    ),
    "cpu-kernel-generation": View("bench_generate", {}, partial(_plain, _GENERATION)),
    "train-opt": View(
        "train_lm", {"kind": "training", "architecture": "opt"}, _curve
    ),
})  # fmt: skip
