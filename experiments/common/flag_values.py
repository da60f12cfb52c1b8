"""Flags that several programs share: lists of numbers and bases, and back to text."""

import dataclasses
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kashin_jax import BasisSpec
from kashin_jax.errors import UsageError

__all__ = [
    "ALL",
    "chosen_names",
    "command_line",
    "file_stem",
    "flag_text",
    "parse_bases",
    "parse_numbers",
    "parse_widths",
    "plain_differences",
    "short_model_name",
]

ALL = ("all",)


def chosen_names(
    name: str, texts: tuple[str, ...], allowed: Iterable[str]
) -> tuple[str, ...]:
    """The allowed names that a flag lists, in the order of `allowed`, each once.

    Raises:
      UsageError: If a text is neither allowed nor `all`; names the flag.
    """
    names = tuple(allowed)
    if not set(texts) <= {*ALL, *names}:
        raise UsageError(
            f"`--{name}` must be all or a list of: {', '.join(names)}. "
            f"Got {flag_text(texts)!r}."
        )
    return names if "all" in texts else tuple(n for n in names if n in texts)


def parse_numbers(name: str, texts: tuple[str, ...], low: int, high: int) -> list[int]:
    """Whole numbers in [low, high], sorted, each once; UsageError names the flag."""
    for text in texts:
        if not re.fullmatch(r"[0-9]{1,10}", text) or not low <= int(text) <= high:
            raise UsageError(
                f"`--{name}` must list whole numbers in [{low}, {high}]. Got {text!r}."
            )
    return sorted({int(text) for text in texts})


def parse_widths(
    name: str, texts: tuple[str, ...], low: int, high: int
) -> list[int | float]:
    """Code widths in [low, high], such as 2, 2.5 and 2.7: sorted, each once.

    Up to three decimals; whole widths are ints. UsageError names the flag.
    """
    for text in texts:
        is_number = re.fullmatch(r"[0-9]{1,10}(\.[0-9]{1,3})?", text, re.ASCII)
        if not is_number or not low <= float(text) <= high:
            raise UsageError(
                f"`--{name}` must list numbers in [{low}, {high}], with three decimals "
                f"at most. Got {text!r}."
            )
    widths = {float(text) for text in texts}
    return [int(w) if w.is_integer() else w for w in sorted(widths)]


def parse_bases(texts: tuple[str, ...]) -> list[BasisSpec]:
    """The bases of `--basis`, each once; UsageError says what is wrong."""
    try:
        return list(dict.fromkeys(map(BasisSpec.parse, texts)))
    except ValueError as error:
        raise UsageError(f"`--basis`: {error}") from error


def flag_text(value: Any) -> str:
    """A value as it is given on the command line."""
    return ",".join(value) if isinstance(value, tuple) else str(value)


def command_line(program: str, config: Any, *, always: tuple[str, ...]) -> str:
    """The command that makes a configuration: what differs from the defaults.

    Args:
      program: Its name, as in `opt_ppl`.
      config: The dataclass of its flags.
      always: Flags shown even at their default.
    """
    parts = [f"python -m experiments.{program}"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default or field.name in always:
            parts.append(shlex.quote(f"--{field.name}={flag_text(value)}"))
    return " ".join(parts)


def plain_differences(config: Any, names: dict[str, str]) -> list[str]:
    """Parts of a file name: what differs from the default, so the plain run is plain.

    Args:
      config: The dataclass of the flags.
      names: What stands before the value, by flag.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    return [
        label + flag_text(getattr(config, name))
        for name, label in names.items()
        if getattr(config, name) != defaults[name]
    ]


def file_stem(parts: list[str]) -> str:
    """Joins parts to a file name without characters that shells or systems mind."""
    return re.sub(r"([^A-Za-z0-9._-]|-)+", "-", "-".join(parts))


def short_model_name(model: str) -> str:
    """A directory's own name, or the hub id as it is; `hf` is only an export's."""
    path = Path(model)
    if not path.is_dir() and "{" not in model:
        return model
    path = path.resolve() if path.is_dir() else path
    return path.parent.name if path.name == "hf" else path.name
