"""Which matrices of a model are quantized, and by which method."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

from kashin_jax.errors import UsageError
from kashin_jax.methods import DEFAULT_CONFIG, Method
from kashin_jax.pipeline.rules import Rules

__all__ = [
    "Candidate",
    "Choice",
    "Policy",
    "Select",
    "choose_methods",
    "default_select",
    "make_policy",
]

# What language models and classifiers call their heads.
_HEADS = frozenset({"lm_head", "classifier", "pre_classifier"})

Select = Callable[[str], bool]


class Candidate(NamedTuple):
    """A matrix of a model that could be quantized.

    Attributes:
      paths: Of all layers that use it; the first one names it.
      shape: Of the array, not always a matrix.
      dtype: Its type.
      only_by_rule: Whether it is left alone unless a rule names it.
      left: Why it stays, whatever is asked for; None if it need not.
      problem: Why asking for it is an error; None if it is not.
    """

    paths: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    only_by_rule: bool = False
    left: str | None = None
    problem: str | None = None


class Choice(NamedTuple):
    """What happens to one matrix.

    Attributes:
      candidate: The matrix.
      config: The method; None for full precision.
      reason: Why it stays in full precision; None if it does not.
    """

    candidate: Candidate
    config: Method | None
    reason: str | None

    @property
    def path(self) -> str:
        """What names the matrix."""
        return self.candidate.paths[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """What a caller asked for.

    Attributes:
      config: The method where there are no rules.
      rules: A method for each layer; None for `config` everywhere.
      select: Layers to leave out where it is false.
    """

    config: Method
    rules: Rules | None
    select: Select

    def choice(self, path: str, only_by_rule: bool) -> tuple[Method | None, str]:
        """The method for a layer, or None and the reason."""
        named = self.rules is not None and any(
            rule.matches(path) for rule in self.rules.rules
        )
        if only_by_rule and not named:
            return None, "no rule names it"
        if not self.select(path):
            return None, "not selected"
        if self.rules is None:
            return self.config, ""
        return self.rules.config_for(path), "skipped by the rules"


def default_select(path: str) -> bool:
    """Every linear but those of the output head, as in the published tables."""
    return not _HEADS & set(path.split("/"))


def make_policy(
    config: Method | None, rules: Rules | None, select: Select | None
) -> Policy:
    """What a caller asked for; `config` is that of the rules if both are given.

    Raises:
      UsageError: If both give another one.
    """
    if rules is None:
        return Policy(
            config=config or DEFAULT_CONFIG,
            rules=None,
            select=select or default_select,
        )
    if config is not None:
        if rules.config not in (config, DEFAULT_CONFIG):
            raise UsageError(
                f"`config`={config} and `rules.config`={rules.config} differ; give one."
            )
        rules = dataclasses.replace(rules, config=config)
    return Policy(config=rules.config, rules=rules, select=select or (lambda _: True))


def choose_methods(
    candidates: Iterable[Candidate], policy: Policy, *, what: str
) -> list[Choice]:
    """Decides about every matrix.

    Args:
      candidates: In the order of the table.
      policy: What was asked for.
      what: What can be quantized, in messages: `nnx.Linear layers`.

    Raises:
      UsageError: If a rule matches nothing, nothing is chosen, a chosen matrix cannot
        be quantized, or layers that share a matrix have different methods.
    """
    known = list(candidates)
    possible = [each for each in known if each.left is None]
    if policy.rules is not None:
        policy.rules.check(path for each in possible for path in each.paths)
    choices = [_choose(each, policy) for each in known]
    if all(choice.config is None for choice in choices):
        count = sum(len(each.paths) for each in possible if not each.only_by_rule)
        raise UsageError(
            f"No layer is selected: the model has {count} {what} and "
            + (
                "`select` accepts none of them."
                if policy.rules is None
                else "the rules leave all of them in full precision."
            )
        )
    return choices


def _choose(each: Candidate, policy: Policy) -> Choice:
    if each.left is not None:
        return Choice(each, None, each.left)
    found = {path: policy.choice(path, each.only_by_rule) for path in each.paths}
    kept = [path for path, (config, _) in found.items() if config is None]
    if kept:
        # What shares a matrix stays together: all packed, or none.
        alone = len(kept) == len(found)
        return Choice(each, None, found[kept[0]][1] if alone else f"tied to {kept[0]}")
    configs = {config for config, _ in found.values()}
    if len(configs) > 1:
        raise UsageError(
            f"`{'` and `'.join(each.paths)}` share one matrix, but the rules give "
            f"{len(configs)} methods for it. Give one."
        )
    if each.problem is not None:
        raise UsageError(each.problem)
    return Choice(each, configs.pop(), None)
