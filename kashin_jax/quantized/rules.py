"""Which layers are quantized, and how: ordered patterns on their paths."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kashin_jax.errors import UsageError
from kashin_jax.quantized.config_json import config_from_json, config_to_json
from kashin_jax.quantized.configs import DEFAULT_CONFIG, QuantizerConfig

__all__ = ["DEFAULT_SKIPS", "Rule", "Rules", "rules_from_json", "rules_to_json"]

DEFAULT_SKIPS = (
    r"(^|/)(lm_head|classifier|pre_classifier|score|qa_outputs)(/|$)",
    r"(^|[/_])(embed|embeddings?|embed_tokens|embed_positions|wte|wpe|shared)(/|$)",
    r"(^|[/_])(norm|layer_?norm|rms_?norm|ln(_\w+)?)(/|$)",
)
"""Output heads, embeddings and norms: what published tables leave in full precision."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """What happens to the layers that a pattern is found in.

    Attributes:
      pattern: A regular expression, searched for in paths such as
        `decoder/layers/0/fc1`; anchor it with ^, $ and / where that matters.
      config: The method; None leaves these layers in full precision.
    """

    pattern: str
    config: QuantizerConfig | None

    def __post_init__(self) -> None:
        _compiled(self.pattern)

    def matches(self, path: str) -> bool:
        """Whether the pattern is found in a path."""
        return _compiled(self.pattern).search(path) is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """A method for every layer.

    The first of these that speaks about a path decides: `skip`, then `rules` in order,
    then `DEFAULT_SKIPS`, then `config`.

    Attributes:
      config: For layers that nothing else speaks about.
      rules: The first one that matches a path decides.
      skip: Patterns of layers to leave in full precision, beside `DEFAULT_SKIPS`.
    """

    config: QuantizerConfig = DEFAULT_CONFIG
    rules: Sequence[Rule] = ()
    skip: Sequence[str] = ()

    def __post_init__(self) -> None:
        for pattern in self.skip:
            _compiled(pattern)

    def config_for(self, path: str) -> QuantizerConfig | None:
        """The method of a layer; None leaves it in full precision."""
        if any(_compiled(pattern).search(path) for pattern in self.skip):
            return None
        for rule in self.rules:
            if rule.matches(path):
                return rule.config
        if any(_compiled(pattern).search(path) for pattern in DEFAULT_SKIPS):
            return None
        return self.config

    def check(self, paths: Iterable[str]) -> None:
        """Raises UsageError, naming it, if a pattern is found in none of the paths."""
        known = list(paths)
        for pattern in (*(rule.pattern for rule in self.rules), *self.skip):
            if not any(_compiled(pattern).search(path) for path in known):
                raise UsageError(
                    f"Rule {pattern!r} matches none of {len(known)} layers, such as "
                    f"{', '.join(known[:2]) or 'none'}. Correct or remove it."
                )


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(
            f"Rule {pattern!r} is no regular expression ({error}); correct it."
        ) from error


def rules_to_json(rules: Rules) -> dict[str, Any]:
    """`{"config": ..., "rules": [...], "skip": [...]}`, everything written out."""
    return {
        "config": config_to_json(rules.config),
        "rules": [
            {"pattern": rule.pattern}
            | ({"skip": True} if rule.config is None else config_to_json(rule.config))
            for rule in rules.rules
        ],
        "skip": list(rules.skip),
    }


def rules_from_json(content: Any, default: QuantizerConfig = DEFAULT_CONFIG) -> Rules:
    """Inverts `rules_to_json`; also reads a bare list of rules.

    A rule has a `pattern` and either `"skip": true` or some of `method`, `bits` and the
    method's other fields; what it does not say it takes from the default.

    Args:
      content: Parsed JSON.
      default: Stands where `config` is missing.

    Raises:
      UsageError: If something is unknown or cannot work; names it.
    """
    whole = {"rules": content} if isinstance(content, list) else content
    if not isinstance(whole, Mapping) or whole.keys() - {"config", "rules", "skip"}:
        raise UsageError(
            "Rules are a list, or an object with `config`, `rules` and `skip`. Got "
            f"{sorted(whole) if isinstance(whole, Mapping) else type(whole).__name__}."
        )
    config = config_from_json(_object(whole.get("config", {}), "config"), default)
    listed, skip = whole.get("rules", []), whole.get("skip", [])
    if not isinstance(listed, list) or not isinstance(skip, list):
        raise UsageError("`rules` and `skip` must be lists.")
    if not all(isinstance(pattern, str) for pattern in skip):
        raise UsageError("`skip` must be a list of patterns.")
    rules = tuple(_rule(_object(rule, "rules"), config) for rule in listed)
    return Rules(config=config, rules=rules, skip=tuple(skip))


def _rule(content: dict[str, Any], default: QuantizerConfig) -> Rule:
    pattern = content.pop("pattern", None)
    if not isinstance(pattern, str):
        raise UsageError(f"A rule needs a `pattern`. Got {content!r}.")
    if "skip" not in content:
        return Rule(pattern, config_from_json(content, default))
    if content != {"skip": True}:
        raise UsageError(
            f"Rule {pattern!r}: `skip` must be true and stand alone. Got {content!r}."
        )
    return Rule(pattern, None)


def _object(content: Any, name: str) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise UsageError(f"`{name}` must hold objects. Got {content!r}.")
    return dict(content)
