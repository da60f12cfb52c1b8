"""Byte-level BPE tokenizers with OPT's special tokens."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from kashin_jax.errors import CheckpointError, DataError
from kashin_jax.io import atomic_path
from kashin_jax.models.tokenizer import read_tokenizer_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "end_of_text_id",
    "load_tokenizer",
    "save_tokenizer",
    "train_tokenizer",
    "vocabulary_size",
]

_END_OF_TEXT = "</s>"
# The order is the ids: OPT's configuration relies on <pad> 1 and </s> 2.
_SPECIAL_TOKENS = ["<s>", "<pad>", _END_OF_TEXT, "<unk>"]
_FILE = "tokenizer.json"


def load_tokenizer(directory: Path) -> "Tokenizer":
    """Reads `tokenizer.json` of a directory.

    Raises:
      CheckpointError: If the file is missing or damaged, or lacks `</s>`.
    """
    path = directory / _FILE
    if not path.is_file():
        raise CheckpointError(
            f"`{path}` is missing; `--tokenizer` names a directory that holds one, and "
            "`--vocab_size` trains a new one on the text."
        )
    tokenizer = read_tokenizer_json(path)
    if tokenizer.token_to_id(_END_OF_TEXT) is None:
        raise CheckpointError(
            f"`{path}` has no token `{_END_OF_TEXT}`, which separates documents; use "
            "an OPT tokenizer or `--vocab_size`."
        )
    return tokenizer


def end_of_text_id(tokenizer: "Tokenizer") -> int:
    """Token that separates documents, of a tokenizer made by this module."""
    token = tokenizer.token_to_id(_END_OF_TEXT)
    assert token is not None
    return token


def vocabulary_size(tokenizer: "Tokenizer") -> int:
    """One more than the largest id; ids may have gaps."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())


def save_tokenizer(tokenizer: "Tokenizer", directory: Path) -> None:
    """Writes `tokenizer.json` into a directory, which is made if it is missing."""
    directory.mkdir(parents=True, exist_ok=True)
    with atomic_path(directory / _FILE) as temporary:
        tokenizer.save(str(temporary))


def train_tokenizer(documents: Iterable[str], *, vocab_size: int) -> "Tokenizer":
    """Learns a byte-level BPE with OPT's special tokens, `</s>` put in front of texts.

    Args:
      documents: Text to learn from.
      vocab_size: Tokens wanted, the four special ones and 256 bytes included.

    Returns:
      The tokenizer; its normalisation and pre-tokenisation are those of GPT-2 and OPT.

    Raises:
      DataError: If the text is too small for that many tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise DataError(
            f"The text yields only {tokenizer.get_vocab_size()} tokens; lower "
            f"`--vocab_size`={vocab_size} or give more text."
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_END_OF_TEXT} $A",
        pair="$A $B:1",
        special_tokens=[(_END_OF_TEXT, end_of_text_id(tokenizer))],
    )
    return tokenizer
