"""The tokenizer of a GGUF file as the files that Hugging Face has of one.

Two kinds are read: byte-level BPE with its merges ("gpt2"), whose way of cutting a text
into words goes by a name, and SentencePiece's BPE ("llama"), which has scores in place
of merges.
"""

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.io.files import shown
from kashin_jax.io.gguf.header import GGUFHeader

__all__ = ["special_tokens", "tokenizer_config", "tokenizer_json"]

_FIELD = "tokenizer.ggml."
# Types of tokens that are found in a text before it is cut into words.
_CONTROL, _USER_DEFINED = 3, 4
# In Llama 3 and Qwen 2 alike, but for how many digits make a word.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS: Mapping[str, str | None] = MappingProxyType({
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": _WORDS.format(digits="{1,3}"),
    "qwen2": _WORDS.format(digits=""),
})  # fmt: skip
"""Words by name of the way; None takes those of GPT-2."""


def special_tokens(header: GGUFHeader) -> dict[str, int]:
    """Ids by the names that they have in a `config.json`, as far as there are any.

    Raises:
      CheckpointError: If one is no token.
    """
    names = {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk"}
    found = {}
    for theirs, ours in names.items():
        key = f"{_FIELD}{theirs}_token_id"
        if (value := header.fields.get(key)) is None:
            continue
        if not isinstance(value, int) or not 0 <= value < len(_tokens(header)):
            raise CheckpointError(
                f"{header.path}: `{key}` is {shown(value)}, which is no token; copy or "
                "download it again."
            )
        found[f"{ours}_token_id"] = value
    return found


def tokenizer_config(header: GGUFHeader) -> dict[str, Any]:
    """The content of a `tokenizer_config.json`, the chat template with it."""
    tokens = _tokens(header)
    content: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": _adds_bos(header),
        "clean_up_tokenization_spaces": False,
    }
    for name, value in special_tokens(header).items():
        content[name.removesuffix("_id")] = tokens[value]
    template = header.fields.get("tokenizer.chat_template")
    if isinstance(template, str):
        content["chat_template"] = template
    return content


def tokenizer_json(header: GGUFHeader) -> str:
    """The text of a `tokenizer.json`.

    Raises:
      CheckpointError: If the kind of tokenizer is not known, or its parts do not fit
        together.
      UsageError: If the package `tokenizers` is not installed.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise UsageError(
            "Reading GGUF files needs `tokenizers`; run: pip install 'kashin_jax[gguf]'"
        ) from error
    kinds = {"gpt2": _byte_level, "llama": _sentence_piece}
    kind = header.fields.get(f"{_FIELD}model")
    if not isinstance(kind, str) or kind not in kinds:
        raise CheckpointError(
            f"{header.path}: `{_FIELD}model` is {shown(kind)}; read are "
            f"{', '.join(kinds)}. Name the original model, in safetensors."
        )
    tokens = _tokens(header)
    types = _list(header, "token_type", int, len(tokens))
    try:
        backend = kinds[kind](header, tokenizers, tokens)
        backend.add_tokens([
            tokenizers.AddedToken(
                token, special=type_ == _CONTROL, normalized=False
            )
            for token, type_ in zip(tokens, types, strict=True)
            if type_ in (_CONTROL, _USER_DEFINED)
        ])  # fmt: skip
        _put_bos(header, tokenizers, backend, tokens)
    except CheckpointError:
        raise
    # The library raises a bare Exception.
    except Exception as error:
        reason = " ".join(str(error).split())[:100]
        raise CheckpointError(
            f"{header.path}: its tokenizer is damaged ({reason}); copy or download it "
            "again."
        ) from error
    return json.dumps(json.loads(backend.to_str()), ensure_ascii=False)


def _byte_level(header: GGUFHeader, tokenizers: Any, tokens: Sequence[str]) -> Any:
    way = header.fields.get(f"{_FIELD}pre")
    if not isinstance(way, str) or way not in _PATTERNS:
        raise CheckpointError(
            f"{header.path}: `{_FIELD}pre` is {shown(way)}; known are "
            f"{', '.join(_PATTERNS)}. Name the original model, in safetensors."
        )
    merges = [tuple(merge.split(" ")) for merge in _list(header, "merges", str)]
    split, normal = tokenizers.pre_tokenizers, tokenizers.normalizers
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            # Llama 3 takes a word that is a token before it looks for merges.
            ignore_merges=way == "llama-bpe",
        )
    )
    pattern = _PATTERNS[way]
    steps = [split.ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    if pattern is not None:
        words = tokenizers.Regex(pattern)
        steps.insert(0, split.Split(words, "isolated", invert=False))
    if way == "smollm":
        steps.insert(0, split.Digits(individual_digits=True))
    if way == "qwen2":
        backend.normalizer = normal.NFC()
    backend.pre_tokenizer = split.Sequence(steps)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def _sentence_piece(header: GGUFHeader, tokenizers: Any, tokens: Sequence[str]) -> Any:
    scores = _list(header, "scores", float, len(tokens))
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = special_tokens(header).get("unk_token_id", 0)
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab=vocab,
            merges=_merges(vocab, scores),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    normal, undo = tokenizers.normalizers, tokenizers.decoders
    steps = [normal.Replace(" ", "\u2581")]
    undone = [undo.Replace("\u2581", " "), undo.ByteFallback(), undo.Fuse()]
    if header.fields.get(f"{_FIELD}add_space_prefix", True):
        steps.insert(0, normal.Prepend("\u2581"))
        undone.append(undo.Strip(" ", 1, 0))
    backend.normalizer = normal.Sequence(steps)
    backend.decoder = undo.Sequence(undone)
    return backend


def _merges(vocab: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """All ways in which two tokens make a third, the best third first."""
    found = []
    for token, i in vocab.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                found.append((-scores[i], i, vocab[left], vocab[right], left, right))
    return [each[-2:] for each in sorted(found)]


def _put_bos(
    header: GGUFHeader, tokenizers: Any, backend: Any, tokens: Sequence[str]
) -> None:
    bos = special_tokens(header).get("bos_token_id")
    if bos is None or not _adds_bos(header):
        return
    token = tokens[bos]
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", "$B"], special_tokens=[(token, bos)]
    )


def _adds_bos(header: GGUFHeader) -> bool:
    """Whether a text begins with a token of its own; llama.cpp's default if unsaid."""
    default = (
        header.fields.get(f"{_FIELD}model") == "llama"
        or header.fields.get(f"{_FIELD}pre") == "llama-bpe"
    )
    return bool(header.fields.get(f"{_FIELD}add_bos_token", default))


def _tokens(header: GGUFHeader) -> list[str]:
    tokens: list[str] = _list(header, "tokens", str)
    if len(set(tokens)) < len(tokens):
        raise CheckpointError(
            f"{header.path}: `{_FIELD}tokens` has a token twice; copy or download it "
            "again."
        )
    return tokens


def _list(
    header: GGUFHeader, key: str, kind: type, length: int | None = None
) -> list[Any]:
    found = header.fields.get(f"{_FIELD}{key}")
    if (
        not isinstance(found, list)
        or not found
        or not all(isinstance(each, kind) for each in found)
        or len(found) != (length or len(found))
    ):
        wanted = {str: "texts", int: "whole numbers", float: "numbers"}[kind]
        amount = "" if length is None else f"{length} "
        raise CheckpointError(
            f"{header.path}: `{_FIELD}{key}` must be a list of {amount}{wanted}; copy "
            "or download it again."
        )
    return found
