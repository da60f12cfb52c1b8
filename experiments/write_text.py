r"""Lets a language model write text, to train a smaller one on.

    python -m experiments.write_text --out=runs/opt-text.txt --tokens=400000

Pieces of `--context` tokens are drawn from the model at temperature 1, `</s>` in front
of each; another `</s>` begins another document, as in its own training. `--out` has the
documents, separated by empty lines, as `experiments.train_lm --text_file=` reads them.
Until it is whole, finished batches lie beside it in `OUT.parts.jsonl`: the same command
goes on behind the last one, and ends with the text of an uninterrupted run.

Exit code 0: finished; 1: model or parts unusable; 2: wrong flag.
"""

import dataclasses
import functools
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from experiments.common.checkpoints import EMBEDDED
from experiments.common.flags import (
    COUNT,
    GIVEN,
    POSITIVE_COUNT,
    check_flags,
    flag,
    run_program,
)
from experiments.common.results import append_jsonl, read_jsonl
from experiments.train.bpe import end_of_text_id, load_tokenizer
from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.io import atomic_path
from kashin_jax.models import generate, load_language_model
from kashin_jax.models.generation import CausalLM
from kashin_jax.progress import progress_bar

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["WriteConfig", "main", "split_texts", "write_text"]

# Within a document, as an empty line would separate two.
_EMPTY_LINES = re.compile(r"\n\s*\n")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteConfig:
    """A text to be written; meanings are in the flags.

    Raises:
      UsageError: If a value cannot work; the message names the flag.
    """

    model: str = flag(
        str(EMBEDDED["opt"]), "Directory or hub id of the language model.", GIVEN
    )
    out: str = flag("", "The text file to write.", GIVEN)
    tokens: int = flag(1_000_000, "Tokens to draw at least.", POSITIVE_COUNT)
    context: int = flag(512, "Tokens of a piece.", POSITIVE_COUNT)
    batch_size: int = flag(64, "Pieces that are drawn together.", POSITIVE_COUNT)
    seed: int = flag(0, "Seed of what is drawn.", COUNT)

    def __post_init__(self) -> None:
        check_flags(self)
        if self.context < 2:
            raise UsageError("`--context` must be at least 2, one of them the start.")

    @property
    def batches(self) -> int:
        """Batches that hold so many tokens."""
        return -(-self.tokens // (self.batch_size * (self.context - 1)))

    def identity(self) -> dict[str, str | int]:
        """What decides a batch."""
        names = ("context", "batch_size", "seed")
        return {"model": Path(self.model).name} | {n: getattr(self, n) for n in names}


def split_texts(rows: Int[np.ndarray, "b t"], tokenizer: "Tokenizer") -> Iterator[str]:
    """Yields the documents in rows of tokens, without empty lines inside.

    Args:
      rows: Pieces; each begins a document, and `</s>` begins another.
      tokenizer: What the tokens are of.
    """
    end = end_of_text_id(tokenizer)
    for row in rows:
        for piece in np.split(row, np.flatnonzero(row == end)):
            text = tokenizer.decode(piece[piece != end].tolist())
            if text.strip():
                yield _EMPTY_LINES.sub("\n", text.strip("\n"))


def _finished(parts: Path, config: WriteConfig) -> list[list[str]]:
    records = read_jsonl(parts)
    if records and records[0] != config.identity():
        raise CheckpointError(
            f"`{parts}` holds a text of {records[0]}, not of {config.identity()}; give "
            "its flags, another `--out`, or delete it."
        )
    if not records:
        append_jsonl(parts, config.identity())
    return [record["documents"] for record in records[1:]]


def write_text(config: WriteConfig) -> Path:
    """Writes a text, or goes on with one.

    Returns:
      The file.

    Raises:
      CheckpointError: If the model cannot be read, or the parts are of another text.
      UsageError: If the context exceeds the model's.
    """
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    parts = out.with_name(f"{out.name}.parts.jsonl")
    loaded = load_language_model(config.model)
    tokenizer = load_tokenizer(loaded.directory)
    done = _finished(parts, config)
    draw = functools.partial(_draw, loaded.model, config, end_of_text_id(tokenizer))
    with progress_bar(
        config.batches, "batches", initial=min(len(done), config.batches), desc="write"
    ) as bar:
        for index in range(len(done), config.batches):
            documents = list(split_texts(draw(index), tokenizer))
            append_jsonl(parts, {"documents": documents})
            done.append(documents)
            bar.update(1)
    _join(out, (document for batch in done[: config.batches] for document in batch))
    parts.unlink()
    return out


def _draw(
    model: CausalLM, config: WriteConfig, start: int, index: int
) -> Int[np.ndarray, "b t"]:
    tokens = generate(
        model,
        jnp.full((config.batch_size, 1), start, jnp.int32),
        max_new_tokens=config.context - 1,
        temperature=1.0,
        key=jax.random.fold_in(jax.random.key(config.seed), index),
    )
    return np.asarray(tokens)


def _join(out: Path, documents: Iterable[str]) -> None:
    with atomic_path(out) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(f"{document}\n\n" for document in documents)


def _run(config: WriteConfig) -> int:
    print(f"Wrote {write_text(config)}.")
    return 0


def main(arguments: list[str]) -> int:
    """Runs the command line `arguments`; returns the exit code."""
    return run_program("write_text", __doc__, WriteConfig, _run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
