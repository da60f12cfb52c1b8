"""Programs whose flags are the fields of a frozen dataclass, and flags that many share.

A field made by `flag` is a flag of the same name. Errors a user can mend become one
line on stderr and an exit code: 2 for a flag, 1 for a file or its content.
"""

import dataclasses
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from absl import flags

from kashin_jax import BasisSpec
from kashin_jax.errors import CheckpointError, DataError, NonFiniteError, UsageError
from kashin_jax.interrupts import no_interrupt_is_lost

__all__ = [
    "ALL",
    "COUNT",
    "GIVEN",
    "POSITIVE",
    "POSITIVE_COUNT",
    "RATE",
    "SHARE",
    "Allowed",
    "check_flags",
    "chosen_names",
    "command_line",
    "file_stem",
    "flag",
    "flag_text",
    "parse_bases",
    "parse_flags",
    "parse_numbers",
    "parse_widths",
    "plain_differences",
    "run_program",
    "short_model_name",
]

Config = TypeVar("Config")

# A bound, and how it reads in a message.
Allowed = tuple[Callable[[Any], bool], str]

POSITIVE_COUNT: Allowed = (lambda x: x >= 1, "at least 1")
COUNT: Allowed = (lambda x: x >= 0, "at least 0")
POSITIVE: Allowed = (lambda x: 0 < x < math.inf, "positive and finite")
SHARE: Allowed = (lambda x: 0 <= x <= 1, "in [0, 1]")
RATE: Allowed = (lambda x: 0 <= x < 1, "in [0, 1)")
GIVEN: Allowed = (bool, "given")

_DEFINE: dict[Any, Callable[..., Any]] = {
    bool: flags.DEFINE_boolean,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
    tuple[str, ...]: flags.DEFINE_list,
}


def flag(
    default: Any,
    help_text: str,
    allowed: Allowed | None = None,
    *,
    is_repeated: bool = False,
) -> Any:
    """A dataclass field that is a flag.

    Args:
      default: Of the type of the field: bool, int, float, str or `tuple[str, ...]`, a
        comma-separated list.
      help_text: Shown by `--help`.
      allowed: Checked by `check_flags`.
      is_repeated: Whether a tuple is given as several flags instead of one list.
    """
    define = flags.DEFINE_multi_string if is_repeated else None
    return dataclasses.field(
        default=default,
        metadata={"help": help_text, "allowed": allowed, "define": define},
    )


def check_flags(config: Any) -> None:
    """Raises UsageError, naming the flag, if a value is out of its bounds."""
    for field in dataclasses.fields(config):
        value, allowed = getattr(config, field.name), field.metadata["allowed"]
        if allowed and not allowed[0](value):
            raise UsageError(f"`--{field.name}` must be {allowed[1]}. Got {value!r}.")


def parse_flags(
    config_type: type[Config], program: str, arguments: list[str]
) -> Config | str:
    """Reads the command line, without the program's name.

    Returns:
      The configuration, or the text that `--help` asks for.

    Raises:
      UsageError: If a flag is unknown or a value cannot work.
    """
    # Own values rather than absl's global ones: other programs use the same names.
    values = flags.FlagValues()
    flags.DEFINE_boolean("help", False, "Show this text.", flag_values=values)
    fields: tuple[Any, ...] = dataclasses.fields(config_type)  # type: ignore[arg-type]
    for field in fields:
        default = field.default
        if isinstance(default, tuple):
            default = list(default)
        define = field.metadata["define"] or _DEFINE[field.type]
        define(field.name, default, field.metadata["help"], flag_values=values)
    try:
        rest = values([program, *arguments])[1:]
    except flags.Error as error:
        raise UsageError(f"{' '.join(str(error).split())} (see --help)") from error
    if rest:
        raise UsageError(f"`{rest[0]}` is not a flag; write `--name=value`.")
    if values.help:
        return values.get_help()
    chosen: dict[str, Any] = {field.name: values[field.name].value for field in fields}
    for name, value in chosen.items():
        if isinstance(value, list):
            chosen[name] = tuple(item.strip() for item in value if item.strip())
    return config_type(**chosen)


def run_program(
    program: str,
    manual: str | None,
    config_type: type[Config],
    run: Callable[[Config], int],
    arguments: list[str],
) -> int:
    """Parses, runs, and turns errors into a line and an exit code."""
    try:
        config = parse_flags(config_type, program, arguments)
        if isinstance(config, str):
            print(f"{manual}\n{config}")
            return 0
        with no_interrupt_is_lost():
            return run(config)
    except KeyboardInterrupt:
        print(
            f"{program}: interrupted; what is finished is kept, and the same command "
            "goes on from there.",
            file=sys.stderr,
        )
        return 130
    except (UsageError, DataError, CheckpointError, NonFiniteError, OSError) as error:
        # Messages of other libraries, which some errors quote, have several lines.
        print(f"{program}: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except ModuleNotFoundError as error:
        print(
            f"{program}: {error}; run: pip install 'kashin_jax[experiments]'",
            file=sys.stderr,
        )
        return 2


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
    """A directory's or GGUF file's own name, or the hub id as it is.

    `hf` is only an export's.
    """
    path = Path(model)
    if path.suffix == ".gguf":
        return path.stem
    if not path.is_dir() and "{" not in model:
        return model
    path = path.resolve() if path.is_dir() else path
    return path.parent.name if path.name == "hf" else path.name
