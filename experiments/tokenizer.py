"""Tokenizers: text to token ids, with nothing added and nothing cut.

Special tokens are the business of the evaluation protocol (`experiments.text`), so
`encode` adds none; `bos_id` says which one the protocols put in front.
"""

import dataclasses
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Int32

from kashin_jax.errors import CheckpointError, UsageError

__all__ = ["Tokenizer", "check_vocabulary", "load_tokenizer"]


@runtime_checkable
class Tokenizer(Protocol):
    """What an evaluation needs of a tokenizer."""

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text (`</s>` for OPT); None if there is none."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that `encode` can return."""
        ...

    def encode(self, text: str) -> Int32[np.ndarray, " n"]:
        """Token ids of the whole text, without added special tokens."""
        ...

    def decode(self, ids: Int[np.ndarray, " n"]) -> str:
        """The text of some token ids."""
        ...


@dataclasses.dataclass(frozen=True)
class _BackendTokenizer:
    backend: Any
    bos_id: int | None
    vocab_size: int

    def encode(self, text: str) -> Int32[np.ndarray, " n"]:
        return np.asarray(
            self.backend.encode(text, add_special_tokens=False).ids, np.int32
        )

    def decode(self, ids: Int[np.ndarray, " n"]) -> str:
        return self.backend.decode(ids.tolist(), skip_special_tokens=False)


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Reads the tokenizer that lies beside a checkpoint.

    `tokenizer.json` is read by the `tokenizers` library. Published OPT directories have
    `vocab.json` and `merges.txt` instead, which `transformers` reads; both ways give
    the same ids. Nothing is downloaded.

    Args:
      directory: A checkpoint directory, such as `LoadedModel.directory`.

    Returns:
      The tokenizer, with truncation and padding switched off.

    Raises:
      CheckpointError: If there is no tokenizer or its file is damaged.
      UsageError: If the library that reads it is not installed.
    """
    file = Path(directory) / "tokenizer.json"
    backend = _read_json(file) if file.is_file() else _read_vocabulary(Path(directory))
    backend.no_truncation()
    backend.no_padding()
    # What the tokenizer puts in front of an empty text is its own choice of BOS.
    prefix = backend.encode("", add_special_tokens=True).ids
    bos_id = prefix[0] if prefix else backend.token_to_id("</s>")
    vocabulary = backend.get_vocab(with_added_tokens=True)
    return _BackendTokenizer(backend, bos_id, 1 + max(vocabulary.values()))


def _read_json(file: Path) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise _missing("tokenizers") from error
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    # The library raises a bare Exception for a file that it cannot read.
    except Exception as error:
        raise CheckpointError(
            f"`{file}` is not a readable tokenizer ({error}); download it again."
        ) from error


def _read_vocabulary(directory: Path) -> Any:
    missing = [f for f in ("vocab.json", "merges.txt") if not (directory / f).is_file()]
    if missing:
        raise CheckpointError(
            f"`{directory}` has no tokenizer: add `tokenizer.json`, or `vocab.json` "
            "and `merges.txt`, of the same model."
        )
    try:
        import transformers
    except ImportError as error:
        raise _missing("transformers") from error
    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True
        ).backend_tokenizer
    # What a damaged file raises depends on the library's version.
    except Exception as error:
        raise CheckpointError(
            f"`vocab.json` and `merges.txt` in `{directory}` are not a readable "
            f"tokenizer ({error}); download them again."
        ) from error


def _missing(library: str) -> UsageError:
    return UsageError(
        f"Reading this tokenizer needs `{library}`; "
        "run: pip install 'kashin_jax[experiments]'"
    )


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Checks that the model has an embedding for every token.

    Args:
      tokenizer: The tokenizer that makes the evaluation text.
      vocab_size: Rows of the model's embedding. More rows than tokens are usual.

    Raises:
      CheckpointError: If the tokenizer can return an id outside the embedding.
    """
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"The tokenizer has {tokenizer.vocab_size} tokens, the model's "
            f"`vocab_size` is {vocab_size}; use the tokenizer files that came with "
            "this checkpoint."
        )
