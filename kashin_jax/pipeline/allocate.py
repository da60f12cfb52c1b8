"""Code widths of layers under one budget: more bits where an error is felt more."""

import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

__all__ = ["JOINT_ERRORS", "allocate_widths"]

Number = int | float

JOINT_ERRORS: Mapping[Number, float] = MappingProxyType({
    2: 0.0695, 2.5: 0.0380, 3: 0.0197, 3.5: 0.0100, 4: 0.0050, 4.5: 0.0025, 5: 0.00126,
})  # fmt: skip
"""Relative squared error of joint coding by width, of Gaussian weights."""


class _Step(NamedTuple):
    # Of one layer, from one width to a wider one.
    gain_per_bit: float
    path: str
    width: int
    bits: Number


def allocate_widths(
    sizes: Mapping[str, int],
    overheads: Mapping[str, Sequence[Number]],
    sensitivities: Mapping[str, Number],
    widths: Sequence[Number],
    errors: Sequence[Number],
    budget: Number,
) -> dict[str, Number]:
    """Chooses a code width for every layer under a budget of stored bits.

    Minimises the sum over layers of `sensitivity * error(width)`, which takes what
    errors in different layers do to the outputs to be independent, and proportional to
    the squared error. Greedy: of all steps to a wider width, along the convex hull of
    each layer's losses over stored bits, the one that gains most per stored bit comes
    first. Steps that no longer fit are left out, with those of the same layer behind
    them. Where each step fits until none is left over this is the optimum; otherwise
    the loss exceeds the optimum by less than the gain of the first step left out.

    Args:
      sizes: Weights of every layer, by path.
      overheads: Bits stored beside the codes, one number for each of `widths`; infinity
        where the layer cannot have the width.
      sensitivities: What a relative squared error of 1 would cost, in any unit.
      widths: Bits of a code.
      errors: Relative squared error at each of `widths`.
      budget: Stored bits per weight, over all layers together.

    Returns:
      A width for every path, in the order of `sizes`.

    Raises:
      ValueError: If the mappings or sequences do not match, a number is negative or not
        finite, or the budget is less than the narrowest widths store.

    References:
      Fox, "Discrete optimization via marginal analysis", Management Science 13 (1966).
    """
    _check(sizes, overheads, sensitivities, widths, errors)
    stored = {
        path: [
            width * size + extra
            for width, extra in zip(widths, overheads[path], strict=True)
        ]
        for path, size in sizes.items()
    }
    chosen = {path: _narrowest(bits, errors) for path, bits in stored.items()}
    total, limit = sum(sizes.values()), budget * sum(sizes.values())
    spent = sum(stored[path][width] for path, width in chosen.items())
    if not spent <= limit:
        raise ValueError(
            f"`budget`={budget} bits per weight cannot be met: the narrowest widths "
            f"store {spent / max(total, 1):.4f}. Raise it."
        )
    steps = [
        step
        for path in sizes
        for step in _steps(path, chosen[path], stored[path], errors)
    ]
    gains = {step: sensitivities[step.path] * step.gain_per_bit for step in steps}
    full: set[str] = set()
    # Sorting is stable, and gains fall along a hull: steps of a layer stay in order.
    for step in sorted(steps, key=lambda step: -gains[step]):
        if step.path in full or not gains[step]:
            continue
        if spent + step.bits > limit:
            full.add(step.path)
            continue
        spent += step.bits
        chosen[step.path] = step.width
    return {path: widths[width] for path, width in chosen.items()}


def _narrowest(stored: Sequence[Number], errors: Sequence[Number]) -> int:
    return min(range(len(stored)), key=lambda i: (stored[i], errors[i]))


def _steps(
    path: str, start: int, stored: Sequence[Number], errors: Sequence[Number]
) -> Iterator[_Step]:
    """The lower convex hull of errors over stored bits, as steps."""
    here = start
    while True:

        def gain(there: int, here: int = here) -> float:
            return (errors[here] - errors[there]) / (stored[there] - stored[here])

        better = [
            i
            for i, bits in enumerate(stored)
            if errors[i] < errors[here] and stored[here] < bits < math.inf
        ]
        if not better:
            return
        there = max(better, key=lambda i: (gain(i), stored[i]))
        yield _Step(gain(there), path, there, stored[there] - stored[here])
        here = there


def _check(
    sizes: Mapping[str, int],
    overheads: Mapping[str, Sequence[Number]],
    sensitivities: Mapping[str, Number],
    widths: Sequence[Number],
    errors: Sequence[Number],
) -> None:
    if not widths or len(widths) != len(errors):
        raise ValueError(
            f"`errors` must have a number for each of `widths`, at least one. Got "
            f"{len(errors)} for {len(widths)}."
        )
    for name, given in (("overheads", overheads), ("sensitivities", sensitivities)):
        if given.keys() != sizes.keys():
            odd = min(given.keys() ^ sizes.keys())
            raise ValueError(
                f"`{name}` and `sizes` must have the same paths; `{odd}` is in one."
            )
    for path, extra in overheads.items():
        if len(extra) != len(widths) or not all(bits >= 0 for bits in extra):
            raise ValueError(
                f"`overheads` of `{path}` must be a number of at least 0 for each of "
                f"{len(widths)} widths. Got {list(extra)}."
            )
    for name, numbers in (
        ("sizes", sizes),
        ("sensitivities", sensitivities),
        ("widths", dict(enumerate(widths))),
        ("errors", dict(enumerate(errors))),
    ):
        for place, value in numbers.items():
            if not 0 <= value < math.inf:
                raise ValueError(
                    f"`{name}` must be finite and at least 0. Got {value} for "
                    f"`{place}`."
                )
