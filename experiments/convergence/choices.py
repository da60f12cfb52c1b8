"""Flags that list names, or say `all`."""

from collections.abc import Iterable

from experiments.flag_values import flag_text
from kashin_jax.errors import UsageError

__all__ = ["ALL", "chosen_names"]

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
