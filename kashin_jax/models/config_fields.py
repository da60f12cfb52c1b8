"""Reading the fields of a configuration dataclass from a Hugging Face `config.json`."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from kashin_jax.errors import CheckpointError, UsageError

__all__ = [
    "Counts",
    "Numbers",
    "TokenIds",
    "check_heads",
    "check_known",
    "check_rates",
    "check_sizes",
    "read_fields",
]

TokenIds = int | tuple[int, ...] | None
"""One token or several, or none; a list in JSON."""

Numbers = tuple[float, ...] | None
"""Some numbers, or none; a list in JSON."""

Counts = tuple[int, ...] | None
"""Some whole numbers, or none; a list in JSON."""

_LISTS: Mapping[Any, type] = {Numbers: float, Counts: int}

Config = TypeVar("Config")


def read_fields(
    config_type: type[Config],
    mapping: Mapping[str, Any],
    source: str,
    *,
    aliases: Mapping[str, str] | None = None,
    fixed: Mapping[str, Any] | None = None,
    nulls: Mapping[str, Any] | None = None,
) -> Config:
    """Makes a configuration; keys unknown to it are ignored.

    `null` for a switch is off, as it is to `transformers`.

    Args:
      config_type: A dataclass; fields without a default must be in the mapping.
      mapping: The parsed JSON object.
      source: Where it came from, for error messages.
      aliases: Keys in the mapping, of the fields that are spelled otherwise there.
      fixed: Values of fields that are not read from the mapping.
      nulls: What `null` stands for, by field; an error for fields that are not there,
        unless they may be None.

    Raises:
      CheckpointError: If a field is missing, of the wrong type or not supported; names
        `source` and the key.
    """
    aliases, values, nulls = aliases or {}, dict(fixed or {}), nulls or {}
    fields: tuple[Any, ...] = dataclasses.fields(config_type)  # type: ignore[arg-type]
    for field in fields:
        key = aliases.get(field.name, field.name)
        if field.name in values:
            continue
        if key in mapping and mapping[key] is None and field.type is bool:
            values[field.name] = False
        elif key in mapping and mapping[key] is None and field.name in nulls:
            values[field.name] = nulls[field.name]
        elif key in mapping:
            values[field.name] = _checked(mapping[key], field.type, key, source)
        elif field.default is dataclasses.MISSING:
            raise CheckpointError(
                f"{source}: field `{key}` is missing; restore the config.json "
                "that was published with the checkpoint."
            )
    try:
        return config_type(**values)
    except UsageError as error:
        raise CheckpointError(f"{source}: {error}") from error


def _checked(value: Any, kind: Any, key: str, source: str) -> Any:
    if kind == TokenIds:
        if isinstance(value, list):
            return tuple(_checked(each, int, key, source) for each in value)
        kind = int | None
    if kind in _LISTS:
        if isinstance(value, list | tuple):
            return tuple(_checked(each, _LISTS[kind], key, source) for each in value)
        kind = type(None)
    # JSON has one kind of number, and Python counts True among the integers.
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if is_whole and kind in (float, float | None):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        expected = getattr(kind, "__name__", str(kind))
        raise CheckpointError(
            f"{source}: field `{key}` is {value!r}; expected {expected}."
        )
    return value


def check_sizes(config: Any, names: tuple[str, ...]) -> None:
    """Raises UsageError if a named field is neither None nor at least 1."""
    for name in names:
        if (size := getattr(config, name)) is not None and size < 1:
            raise UsageError(f"`{name}` must be at least 1. Got {size}.")


def check_known(config: Any, name: str, known: Collection[str]) -> None:
    """Raises UsageError, naming those that are, if a field's value is not known."""
    if (value := getattr(config, name)) not in known:
        raise UsageError(
            f"`{name}`={value!r} is not supported; known are {', '.join(known)}."
        )


def check_heads(config: Any) -> None:
    """Raises UsageError if the heads do not share the hidden features evenly."""
    if config.hidden_size % config.num_attention_heads:
        raise UsageError(
            f"`num_attention_heads`={config.num_attention_heads} must divide "
            f"`hidden_size`={config.hidden_size}."
        )


def check_rates(config: Any, names: tuple[str, ...]) -> None:
    """Raises UsageError if a named field is neither None nor in [0, 1)."""
    for name in names:
        if (rate := getattr(config, name)) is not None and not 0 <= rate < 1:
            raise UsageError(f"`{name}` must lie in [0, 1). Got {rate}.")
