"""Tokenizers of language models and of classifiers, read from their checkpoints.

A language model's text is tokenized with nothing added and nothing cut: special tokens
are the business of the evaluation protocol, and `bos_id` says which one the protocols
put in front, as `with_bos` does. A classifier's sentences get the special tokens
that the checkpoint was trained with, and are cut to the model's length.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Int32

from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.io import read_json

__all__ = [
    "AUTO",
    "NO_BOS",
    "Encoded",
    "PairTokenizer",
    "TokenizedText",
    "Tokenizer",
    "bos_token",
    "check_padding",
    "check_vocabulary",
    "load_pair_tokenizer",
    "load_tokenizer",
    "prefix_token_id",
    "read_tokenizer_json",
    "with_bos",
]

AUTO = "auto"
"""Begin a text as the files of the checkpoint say."""
NO_BOS = "none"
"""Begin a text with its own first token."""

# Files that make a tokenizer, in the order in which they are looked for; the last two
# are read by `transformers`, by the model type that `config.json` names.
_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",))
# Tokens that begin a text and do nothing else, but for OPT's.
_BEGINNINGS = frozenset({"<s>", "</s>", "<bos>", "<|begin_of_text|>"})
# The library keeps 5 kB for an encoded pair of 31 tokens: 2 GB for the train of MNLI.
_CHUNK = 4096


class TokenizedText(NamedTuple):
    """A text as a model reads it.

    Attributes:
      ids: Token ids.
      num_bytes: UTF-8 bytes of the text that each of them stands for; all together
        have those of the text. A character of several tokens counts with the first,
        what the tokenizer drops with the token behind it, or else with the last.
    """

    ids: Int32[np.ndarray, " n"]
    num_bytes: Int32[np.ndarray, " n"]


@runtime_checkable
class Tokenizer(Protocol):
    """A tokenizer of a language model, as far as an evaluation needs one."""

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text (`</s>` for OPT); None for models without."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that `encode` can return."""
        ...

    def encode(self, text: str) -> Int32[np.ndarray, " n"]:
        """Token ids of the whole text, without added special tokens."""
        ...

    def encode_with_bytes(self, text: str) -> TokenizedText:
        """As `encode`, with the bytes of the text that each token stands for."""
        ...

    def decode(self, ids: Int[np.ndarray, " n"], *, skip_special: bool = False) -> str:
        """The text of some token ids, perhaps without those that are no text."""
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

    def encode_with_bytes(self, text: str) -> TokenizedText:
        encoding = self.backend.encode(text, add_special_tokens=False)
        ends = np.asarray([end for _, end in encoding.offsets], np.int64)
        ids = np.asarray(encoding.ids, np.int32)
        return TokenizedText(ids, _bytes_up_to(text, ends))

    def decode(self, ids: Int[np.ndarray, " n"], *, skip_special: bool = False) -> str:
        return self.backend.decode(ids.tolist(), skip_special_tokens=skip_special)


def _bytes_up_to(text: str, ends: Int[np.ndarray, " n"]) -> Int32[np.ndarray, " n"]:
    """Bytes from each token's end back to the end of the one before."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = sum((codes >= least).astype(np.int32) for least in (0, 0x80, 0x800, 2**16))
    upto = np.concatenate([[0], np.cumsum(sizes)])
    # Normalizers may let a token end before the one in front of it.
    ends = np.maximum.accumulate(ends)
    ends[-1:] = len(text)
    return np.diff(upto[ends], prepend=0).astype(np.int32)


def with_bos(tokenizer: Tokenizer, text: str) -> TokenizedText:
    """The tokens of a text behind the one that begins it, if there is one.

    That one stands for no byte.
    """
    ids, num_bytes = tokenizer.encode_with_bytes(text)
    if tokenizer.bos_id is None:
        return TokenizedText(ids, num_bytes)
    front = np.asarray([tokenizer.bos_id], np.int32)
    return TokenizedText(
        np.concatenate([front, ids]), np.concatenate([front * 0, num_bytes])
    )


def bos_token(tokenizer: Tokenizer) -> str | None:
    """The token that stands in front of a text, as it is written; None for none."""
    if tokenizer.bos_id is None:
        return None
    return tokenizer.decode(np.asarray([tokenizer.bos_id], np.int32))


class Encoded(NamedTuple):
    """Tokens of one text or pair, special ones included; whether any were cut off."""

    input_ids: list[int]
    token_type_ids: list[int]
    truncated: bool


@dataclasses.dataclass(frozen=True)
class PairTokenizer:
    """A classifier's tokenizer, of texts and of pairs of texts.

    Attributes:
      backend: The `tokenizers.Tokenizer`. Its truncation is set by every call.
      vocab_size: One more than the largest id that `encode` can return.
      pad_id: The token named `[PAD]` or `<pad>`; None if there is none.
    """

    backend: Any
    vocab_size: int
    pad_id: int | None

    def encode(
        self, first: Sequence[str], second: Sequence[str] | None, *, max_length: int
    ) -> list[Encoded]:
        """Tokenizes texts, or pairs if `second` is given.

        Args:
          first: Texts.
          second: Partners of the texts.
          max_length: Longest encoding in tokens; the longer text is cut first.

        Raises:
          UsageError: If `max_length` leaves less than one token for each text.
        """
        pairs = second is not None
        least = self.backend.num_special_tokens_to_add(pairs) + 1 + pairs
        # Below that the library would cut nothing at all.
        if max_length < least:
            raise UsageError(
                f"`--max_length` must be at least {least}, special tokens included. "
                f"Got {max_length}."
            )
        self.backend.enable_truncation(max_length, strategy="longest_first")
        inputs = list(first) if second is None else [*zip(first, second, strict=True)]
        return [
            Encoded(encoding.ids, encoding.type_ids, bool(encoding.overflowing))
            for start in range(0, len(inputs), _CHUNK)
            for encoding in self.backend.encode_batch(inputs[start : start + _CHUNK])
        ]

    def encode_pieces(self, texts: Sequence[str], *, max_length: int) -> list[Encoded]:
        """Tokenizes texts; one that is too long becomes several, each with its ends.

        Args:
          texts: Texts.
          max_length: Longest encoding in tokens.

        Raises:
          UsageError: If `max_length` leaves no token for a text.
        """
        self.encode([], None, max_length=max_length)
        return [
            Encoded(piece.ids, piece.type_ids, bool(encoding.overflowing))
            for start in range(0, len(texts), _CHUNK)
            for encoding in self.backend.encode_batch(texts[start : start + _CHUNK])
            for piece in (encoding, *encoding.overflowing)
        ]


def load_tokenizer(directory: str | Path, *, bos: str = AUTO) -> Tokenizer:
    """Reads the tokenizer that lies beside a language model's checkpoint.

    `tokenizer.json` is read by the `tokenizers` library. Published OPT directories have
    `vocab.json` and `merges.txt` instead, which `transformers` reads; both ways give
    the same ids. Nothing is downloaded.

    Args:
      directory: A checkpoint directory, such as `LoadedModel.directory`.
      bos: What a text begins with: `auto` for what the files of the checkpoint say,
        `none`, or a token of the vocabulary as it is written there.

    Returns:
      The tokenizer, with truncation and padding switched off.

    Raises:
      CheckpointError: If there is no tokenizer or its file is damaged.
      UsageError: If the library that reads it is not installed, or `bos` is no token.
    """
    directory = Path(directory)
    backend = _read_backend(directory)
    if bos == AUTO:
        bos_id = _bos_id(backend, directory)
    elif bos == NO_BOS:
        bos_id = None
    elif (bos_id := backend.token_to_id(bos)) is None:
        raise UsageError(
            f"`--bos` must be `{AUTO}`, `{NO_BOS}` or a token of the vocabulary. "
            f"Got {bos!r}."
        )
    return _BackendTokenizer(backend, bos_id, _vocab_size(backend))


def _bos_id(backend: Any, directory: Path) -> int | None:
    """What the model was taught a text begins with.

    What the tokenizer puts in front of a text is its own choice. Where it puts
    nothing, a file beside it may say whether this is meant so; if none does, it is the
    model's token that begins a text, unless that is one which separates texts, such as
    `<|endoftext|>`: nothing is put in front by models that have no other.
    """
    # Not an empty text: of one nobody could tell what is put in front from an end.
    encoding = backend.encode("a", add_special_tokens=True)
    if encoding.special_tokens_mask[:1] == [1]:
        return int(encoding.ids[0])
    stated, model = _configs(directory)
    if stated.get("add_bos_token") is False:
        return None
    named = backend.token_to_id(_as_written(stated.get("bos_token")))
    if stated.get("add_bos_token") is True and named is not None:
        return named
    if (bos := model.get("bos_token_id")) is None:
        is_opt = model.get("model_type", "opt") == "opt"
        return backend.token_to_id("</s>") if is_opt else None
    return bos if backend.id_to_token(bos) in _BEGINNINGS else None


def _configs(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the tokenizer's and the model's own file say; empty where there is none."""
    stated, model = (
        dict(read_json(path)) if (path := directory / name).is_file() else {}
        for name in ("tokenizer_config.json", "config.json")
    )
    return stated, model


def _as_written(token: Any) -> str:
    """Of a token as `tokenizer_config.json` has it: a text, or one with its flags."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def prefix_token_id(directory: str | Path, tokenizer: Tokenizer) -> int | None:
    """The token that stands in for a context where a text has none.

    The one that begins a text; for models without, the tokenizer's `bos_token`, or else
    its `eos_token`, whether or not texts get it, as lm-evaluation-harness takes it.

    Args:
      directory: A checkpoint directory, such as `LoadedModel.directory`.
      tokenizer: What `load_tokenizer` read there.

    Returns:
      Its id; None if no file names one.
    """
    if tokenizer.bos_id is not None:
        return tokenizer.bos_id
    stated, model = _configs(Path(directory))
    for name in ("bos_token", "eos_token"):
        # A text of one special token is that token.
        ids = tokenizer.encode(_as_written(stated.get(name)))
        if ids.size == 1:
            return int(ids[0])
    for name in ("bos_token_id", "eos_token_id"):
        found = model.get(name)
        found = found[0] if isinstance(found, list) and found else found
        if isinstance(found, int):
            return found
    return None


def load_pair_tokenizer(directory: str | Path) -> PairTokenizer:
    """Reads the tokenizer that lies beside a classifier's checkpoint.

    `tokenizer.json` is read by the `tokenizers` library, else `vocab.txt` (BERT) or
    `vocab.json` and `merges.txt` (RoBERTa) by `transformers`. Nothing is downloaded.

    Args:
      directory: A checkpoint directory, such as `LoadedClassifier.directory`.

    Returns:
      The tokenizer, with padding and stored truncation switched off.

    Raises:
      CheckpointError: If there is no tokenizer, its file is damaged, or it does not
        put special tokens around a text and between the texts of a pair.
      UsageError: If the library that reads it is not installed.
    """
    backend = _read_backend(Path(directory))
    around = backend.num_special_tokens_to_add(False)
    if not 0 < around < backend.num_special_tokens_to_add(True):
        raise CheckpointError(
            f"The tokenizer in `{directory}` puts no special tokens around and between "
            "sentences, so it is not a BERT or RoBERTa classifier's; use the tokenizer "
            "files that came with this checkpoint."
        )
    pad_ids = map(backend.token_to_id, ("[PAD]", "<pad>"))
    pad_id = next((i for i in pad_ids if i is not None), None)
    return PairTokenizer(backend, _vocab_size(backend), pad_id)


def read_tokenizer_json(file: Path) -> Any:
    """Reads a `tokenizer.json` as a `tokenizers.Tokenizer`, with all its settings.

    Raises:
      CheckpointError: If the file is damaged.
      UsageError: If `tokenizers` is not installed.
    """
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


def _read_backend(directory: Path) -> Any:
    complete = [
        files for files in _FILES if all((directory / name).is_file() for name in files)
    ]
    if not complete:
        raise CheckpointError(
            f"`{directory}` has no tokenizer: add `tokenizer.json`, or `vocab.json` "
            "and `merges.txt`, or `vocab.txt`, of the same model."
        )
    if complete[0] == ("tokenizer.json",):
        backend = read_tokenizer_json(directory / "tokenizer.json")
    else:
        backend = _read_vocabulary(directory, complete[0])
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_vocabulary(directory: Path, files: tuple[str, ...]) -> Any:
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
        names = " and ".join(f"`{name}`" for name in files)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{names} in `{directory}`: not a readable tokenizer ({reason}); download "
            "the files again, `config.json` too."
        ) from error


def _vocab_size(backend: Any) -> int:
    return 1 + max(backend.get_vocab(with_added_tokens=True).values())


def _missing(library: str) -> UsageError:
    extra = "cli" if library == "tokenizers" else "experiments"
    return UsageError(
        f"Reading this tokenizer needs `{library}`; "
        f"run: pip install 'kashin_jax[{extra}]'"
    )


def check_vocabulary(tokenizer: Tokenizer | PairTokenizer, vocab_size: int) -> None:
    """Checks that the model has an embedding for every token.

    Args:
      tokenizer: The tokenizer that makes the model's input.
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


def check_padding(tokenizer: PairTokenizer, pad_token_id: int) -> None:
    """Checks that tokenizer and model mean the same token by padding.

    It tells BERT's tokenizer (0) from RoBERTa's (1), which the size of the vocabulary
    may not: BERT's is the smaller one.

    Args:
      tokenizer: The tokenizer that makes the model's input.
      pad_token_id: Padding token of the model's configuration.

    Raises:
      CheckpointError: If the tokenizer's padding token has another id.
    """
    if tokenizer.pad_id not in (None, pad_token_id):
        raise CheckpointError(
            f"The tokenizer pads with token {tokenizer.pad_id}, the model's "
            f"`pad_token_id` is {pad_token_id}; use the tokenizer files that came with "
            "this checkpoint."
        )
