"""What a reader of a GLUE table has to know, one sentence each."""

from collections.abc import Sequence

from experiments.classification.rows import GlueBench
from experiments.classification.tasks import Task
from experiments.common.tables import Record

__all__ = ["table_facts"]

_GLUE = (
    "Percent: Matthews (CoLA), accuracy (SST-2, RTE, WNLI, QNLI), accuracy / F1 (MRPC, "
    "QQP), Pearson / Spearman (STS-B), matched / mismatched (MNLI)."
)
_RATED = (
    "Percent: accuracy / Pearson ({}) of the SST-2 head, fine-tuned on film reviews: "
    "its class against the sign of the mean human rating, and its output for positive "
    "less its output for negative against the rating itself."
)
_QUANTIZING = (
    "All matrices but embeddings and classifier are quantized, decoded, and run in "
    "float32. Sizes are stored bits: codes, centroids, scales, zero points, seeds. "
    "`seconds` is quantization time on this device, compilation included."
)
_STORED = (
    "The model was quantized before; its matrices are decoded and run in float32. "
    "Sizes are stored bits."
)


def table_facts(
    bench: GlueBench,
    records: Sequence[Record],
    left_out: Sequence[Task],
    max_length: int,
    seeds: int,
) -> list[str]:
    """The protocol, what was left out, and what computed it.

    Args:
      bench: What was scored.
      records: Its records; there is at least one.
      left_out: Tasks that the model knows but nobody has data for.
      max_length: Tokens of an example.
      seeds: Of the methods that are random.
    """
    first = records[0]
    sizes = "; ".join(
        f"{one.task.title} {sum(len(s.labels) for s in one.sets):,}"
        + _cut(sum(s.num_truncated for s in one.sets))
        + _skipped(sum(s.num_skipped for s in one.sets))
        for one in bench.tasks
    )
    facts = [
        f"Model {first['model']}; examples: {sizes}; at most {max_length} tokens each.",
        *_metrics([one.task for one in bench.tasks]),
        _STORED if bench.is_quantized else _QUANTIZING,
    ]
    if left_out:
        facts.append(
            f"Left out: {', '.join(task.title for task in left_out)}, whose files are "
            "not at hand (GLUE is not embedded); give `--data_dir`, or name them by "
            "`--tasks` to have them fetched."
        )
    if seeds > 1:
        facts.append(
            f"Random methods: mean over seeds 0 to {seeds - 1}, ± standard deviation."
        )
    facts.append(
        f"{first['device']}, jax {first['jax_version']}, kashin_jax "
        f"{first['kashin_jax_version']}."
    )
    return facts


def _metrics(tasks: Sequence[Task]) -> list[str]:
    rated = [task.title for task in tasks if task.rating_range is not None]
    glue = [_GLUE] if len(rated) < len(tasks) else []
    return glue + ([_RATED.format(", ".join(rated))] if rated else [])


def _cut(count: int) -> str:
    return f" ({count} cut)" if count else ""


def _skipped(count: int) -> str:
    return f" ({count} damaged rows left out)" if count else ""
