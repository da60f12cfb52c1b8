"""Programs whose flags are the fields of a frozen dataclass.

A field made by `flag` is a flag of the same name. Errors a user can mend become one
line on stderr and an exit code: 2 for a flag, 1 for a file or its content.
"""

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from absl import flags

from kashin_jax.errors import CheckpointError, DataError, NonFiniteError, UsageError

__all__ = [
    "COUNT",
    "GIVEN",
    "POSITIVE",
    "POSITIVE_COUNT",
    "RATE",
    "SHARE",
    "Allowed",
    "check_flags",
    "flag",
    "parse_flags",
    "run_program",
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
