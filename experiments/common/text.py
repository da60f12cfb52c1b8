"""Evaluation texts: which text, tokenized how, cut how; fixed by a name.

| name | text | windows |
|---|---|---|
| `wiki_vital` | test file as it is | `context` tokens, not overlapping, all kept |
| `wikitext2` | raw test file as it is | as `wiki_vital` |
| `wikitext2-gptq` | test rows joined by blank lines | the last partial one dropped |
| `lambada` | test texts joined by one space | stride 512 or `context` if less |
| `ptb` | test sentences joined by one space | the last partial one dropped |
| `c4` | first 1,100 validation texts joined by one space | the first 256 |
| `text_file` | any UTF-8 file | as `wiki_vital` |

All are tokenized once, with the tokenizer's BOS in front of the text (`</s>` for OPT,
whose own tokenizer puts it there too), if the model was taught one. `wiki_vital` is
embedded; `data_dir` or the hub has the others. `wikitext2-gptq`, `ptb` and `c4` with a
context of 2048 are GPTQ's protocols (`get_wikitext2`, `get_ptb_new`, `get_c4_new`),
which published OPT numbers use. `lambada` with a context of 2048 is the protocol of the
2024 paper, where windows are weighted by their new tokens.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from experiments.common.corpora import (
    ASSETS,
    DATASETS,
    LAMBADA_STRIDE,
    PUBLISHED_CONTEXT,
    Dataset,
    read_utf8,
)
from kashin_jax.errors import UsageError
from kashin_jax.evaluation import (
    Weighting,
    Windows,
    count_new,
    make_windows,
)
from kashin_jax.models.tokenizer import Tokenizer, bos_token, with_bos

__all__ = [
    "ASSETS",
    "DATASETS",
    "EvaluationText",
    "default_context",
    "load_text",
    "parse_max_tokens",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationText:
    """A tokenized text together with everything that defines its perplexity.

    Attributes:
      name: Data set; `text_file:NAME` for a user's own.
      protocol: One sentence on how the text is cut and scored.
      tokens: The token ids to cut, BOS included, already limited to `max_tokens`.
      context: Window length in tokens.
      stride: Tokens between the beginnings of neighbouring windows.
      token_bytes: Bytes of the text that each of them stands for.
      bos: Whether `tokens` begins with a BOS.
      bos_token: Which one, as it is written; None for none.
      drop_last: Whether a last partial window is dropped.
      weigh: How windows are averaged, for `kashin_jax.evaluation.perplexity`.
      text_sha256: Of the UTF-8 bytes that were tokenized, before `max_tokens`.
      notes: What a reader of the number has to know, one sentence each.
    """

    name: str
    protocol: str
    tokens: Int32[np.ndarray, " n"]
    token_bytes: Int32[np.ndarray, " n"]
    context: int
    stride: int
    bos: bool
    bos_token: str | None
    drop_last: bool
    weigh: Weighting
    text_sha256: str
    notes: tuple[str, ...]

    def windows(self) -> Windows:
        """Cuts the tokens.

        Raises:
          DataError: If the text is too short for one window.
          ValueError: If `context` or `stride` is out of range.
        """
        return make_windows(
            self.tokens,
            context=self.context,
            stride=self.stride,
            drop_last=self.drop_last,
            token_bytes=self.token_bytes,
        )

    def record_fields(self) -> dict[str, Any]:
        """The fields of a result that say what was scored; `tokens` are predictions."""
        return {
            "dataset": self.name,
            "protocol": self.protocol,
            "context": self.context,
            "stride": self.stride,
            "bos": self.bos,
            "tokens": int(self.windows().scored.sum()),
            "text_sha256": self.text_sha256,
        }


def default_context(dataset: str, model_context: int) -> int:
    """The window length of a data set when the user names none.

    Args:
      dataset: A name of `DATASETS`, or `text_file`.
      model_context: Longest window the model is good for, in tokens.

    Returns:
      2048 for what published numbers are of, where the model allows it; else
      `model_context`.
    """
    found = DATASETS.get(dataset)
    if found is None or not found.is_published:
        return model_context
    return min(PUBLISHED_CONTEXT, model_context)


def parse_max_tokens(value: str) -> int | None:
    """Reads `--max_tokens`: a number of tokens, or `all` (None).

    Raises:
      UsageError: If it is neither.
    """
    if value == "all":
        return None
    if not value.isascii() or not value.isdigit():
        raise UsageError(
            f"`--max_tokens` must be `all` or a whole number. Got {value}."
        )
    return int(value)


def _describe(source: Dataset, *, stride: int, context: int, bos: str | None) -> str:
    start = f" with {bos} in front" if bos else ""
    if stride == context:
        cut = (
            f"non-overlapping windows of {context} tokens, all but the first predicted"
        )
    else:
        cut = f"windows of {context} tokens, stride {stride}, each token predicted once"
    last = "dropped" if source.drop_last else "kept"
    first = f"the first {source.max_windows} kept, " if source.max_windows else ""
    weighed = ", windows weighted by new tokens" if source.weigh is count_new else ""
    return (
        f"{source.described}, tokenized once{start}; {cut}; "
        f"{first}last partial window {last}{weighed}"
    )


def _notes(
    dataset: str, source: Dataset, *, context: int, used: int, total: int
) -> tuple[str, ...]:
    notes = []
    if used < total:
        notes.append(f"Only the first {used:,} of {total:,} tokens are used.")
    if dataset == "lambada" and context <= LAMBADA_STRIDE:
        notes.append(
            f"Window and stride coincide at {context} tokens: windows do not overlap; "
            f"the paper's protocol has windows of {PUBLISHED_CONTEXT}."
        )
    elif source.is_published and context != PUBLISHED_CONTEXT:
        notes.append(
            f"Published numbers use windows of {PUBLISHED_CONTEXT} tokens; these have "
            f"{context} and cannot be compared with them."
        )
    return tuple(notes)


def _find(dataset: str, text_file: str | Path | None) -> tuple[str, Dataset]:
    if text_file is not None:
        path = Path(text_file)
        read = lambda _: read_utf8(path)
        return f"text_file:{path.name}", Dataset(read, f"the file {path.name}")
    if dataset not in DATASETS:
        known = ", ".join(DATASETS)
        raise UsageError(
            f"`--dataset` must be one of {known}, or give --text_file. Got {dataset}."
        )
    return dataset, DATASETS[dataset]


def load_text(
    dataset: str,
    tokenizer: Tokenizer,
    *,
    context: int,
    text_file: str | Path | None = None,
    max_tokens: int | None = None,
    data_dir: Path | None = None,
    names_bos: bool = False,
) -> EvaluationText:
    """Reads and tokenizes an evaluation text.

    The user's folder is asked first; what neither it nor the repository has is asked of
    the hub.

    Args:
      dataset: A name of `DATASETS`; ignored when `text_file` is given.
      tokenizer: Of the model that will be scored.
      context: Window length in tokens, at least 2.
      text_file: A UTF-8 file to score in place of a data set, as `wiki_vital` is.
      max_tokens: Keep only the first tokens of the text, BOS included; None keeps all.
      data_dir: The user's folder, with `wikitext2/wiki.test.raw` and so on.
      names_bos: Whether the protocol says which BOS, since it is not the model's own.

    Returns:
      The text; that it fills at least one window has been checked.

    Raises:
      UsageError: If the data set is unknown, or `context` or `max_tokens` below 2.
      DataError: If a file is missing, empty, malformed, or too short.
    """
    if context < 2:
        raise UsageError(f"`--context` must be at least 2. Got {context}.")
    if max_tokens is not None and max_tokens < 2:
        raise UsageError(f"`--max_tokens` must be at least 2. Got {max_tokens}.")
    name, source = _find(dataset, text_file)
    text = source.read(data_dir)
    all_tokens, num_bytes = with_bos(tokenizer, text)
    bos = bos_token(tokenizer)
    # Rows that were measured before have no name for it.
    described = "a BOS" if bos is not None and not names_bos else bos
    if source.max_windows is not None:
        all_tokens = all_tokens[: source.max_windows * context]
    tokens = all_tokens[:max_tokens]
    stride = min(source.max_stride or context, context)
    loaded = EvaluationText(
        name=name,
        protocol=_describe(source, stride=stride, context=context, bos=described),
        tokens=tokens,
        token_bytes=num_bytes[: tokens.size],
        context=context,
        stride=stride,
        bos=bos is not None,
        bos_token=bos,
        drop_last=source.drop_last,
        weigh=source.weigh,
        text_sha256=hashlib.sha256(text.encode("utf-8")).hexdigest(),
        notes=_notes(
            name, source, context=context, used=tokens.size, total=all_tokens.size
        ),
    )
    loaded.windows()
    return loaded
