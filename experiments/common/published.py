"""Published numbers, to stand beside ours where model and protocol are the same.

Perplexity: OPT on WikiText-2 in the GPTQ protocol (rows joined by blank lines, windows
of 2048). Sources: full precision and RTN g128 from OmniQuant (arXiv 2308.13137),
appendix; RTN per channel, and everything of 350m, from GPTQ (arXiv 2210.17323).

GLUE: Table 3 of the 2024 paper (arXiv 2404.09737), single runs on the authors' own
fine-tuned checkpoints, which are not public: closeness can only be expected for those.
"""

from experiments.common.methods import FULL_PRECISION, Width
from kashin_jax.models import ClassifierConfig

__all__ = ["published_glue", "published_perplexity"]

_SIZES = ("125m", "350m", "1.3b", "2.7b", "6.7b")
_GPTQ_WIKITEXT2: dict[tuple[str, Width], tuple[float | None, ...]] = {
    (FULL_PRECISION, 16): (27.65, 22.00, 14.62, 12.47, 10.86),
    ("rtn-channel", 4): (37.28, 25.94, 48.17, 16.92, 12.10),
    ("rtn-g128", 4): (30.47, None, 15.29, 13.02, 11.15),
    ("rtn-channel", 3): (1.2e3, 64.57, 1.3e4, 1.6e4, 5.8e3),
    ("rtn-g128", 3): (51.22, None, 119.0, 298.0, 23.54),
}


def published_perplexity(
    model: str,
    dataset: str,
    context: int,
    tokens_limited: bool,
    method: str,
    bits: Width,
) -> float | None:
    """The published value, or None where there is none for exactly this protocol."""
    size = model.rsplit("/", 1)[-1].removeprefix("opt-")
    row = _GPTQ_WIKITEXT2.get((method, bits))
    if dataset != "wikitext2-gptq" or context != 2048 or tokens_limited or row is None:
        return None
    return row[_SIZES.index(size)] if size in _SIZES else None


_TABLE3_COLUMNS = (
    "cola/matthews", "sst2/accuracy", "qqp/accuracy", "qqp/f1", "qnli/accuracy",
    "mnli/matched", "mnli/mismatched", "rte/accuracy", "stsb/pearson", "stsb/spearman",
    "mrpc/accuracy", "mrpc/f1", "wnli/accuracy",
)  # fmt: skip
_TABLE3 = {
    ("roberta-base", FULL_PRECISION): (
        59.06, 93.8, 91.24, 88.36, 92.62, 88.1, 87.43, 67.87, 89.65, 89.49, 87.75, 91.2,
        56.34,
    ),
    ("roberta-base", "uniform"): (
        0.0, 49.08, 36.82, 53.82, 49.46, 31.82, 31.82, 52.71, 10.08, 9.37, 68.38, 81.22,
        56.34,
    ),
    ("roberta-base", "k-means"): (
        46.97, 92.77, 88.77, 87.39, 89.27, 83.98, 82.85, 55.23, 79.65, 80.47, 71.32,
        75.77, 56.34,
    ),
    ("roberta-base", "kashin"): (
        52.09, 90.37, 89.53, 86.73, 91.14, 86.41, 85.51, 60.28, 87.29, 87.26, 83.08,
        87.10, 56.34,
    ),
    ("bert-base", FULL_PRECISION): (
        59.31, 91.74, 90.66, 87.39, 90.74, 83.96, 84.24, 64.98, 88.94, 88.77, 84.31,
        88.81, 42.25,
    ),
    ("bert-base", "uniform"): (
        1.24, 49.66, 38.09, 52.75, 49.22, 32.24, 33.34, 50.18, -0.21, -0.25, 63.97,
        76.02, 49.3,
    ),
    ("bert-base", "k-means"): (
        54.43, 91.51, 88.87, 85.33, 88.01, 78.63, 78.76, 55.23, 85.06, 85.0, 34.55,
        8.87, 54.92,
    ),
    ("bert-base", "kashin"): (
        59.65, 91.63, 90.28, 87.33, 90.06, 83.88, 84.01, 63.53, 88.76, 88.56, 84.80,
        89.31, 42.25,
    ),
}  # fmt: skip
_BASE_SIZES = {
    ("bert", 30522, 12, 768): "bert-base",
    ("roberta", 50265, 12, 768): "roberta-base",
}


def published_glue(
    config: ClassifierConfig, method: str, bits: Width, task: str, metric: str
) -> float | None:
    """Table 3's value in percent, or None where the model or the row is not in it.

    Args:
      config: The architecture, by which BERT-base (uncased) and RoBERTa-base are known.
      method: Name of the row.
      bits: Code width; the table has 4, and full precision.
      task: Short name.
      metric: One of the task's.
    """
    sizes = (
        config.model_type,
        config.vocab_size,
        config.num_hidden_layers,
        config.hidden_size,
    )
    row = _TABLE3.get((_BASE_SIZES.get(sizes, ""), method))
    column = f"{task}/{metric}"
    if row is None or (bits != 4 and method != FULL_PRECISION):
        return None
    if column not in _TABLE3_COLUMNS:
        return None
    return row[_TABLE3_COLUMNS.index(column)]
