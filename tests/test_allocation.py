"""Widths under a budget, against brute force."""

import itertools
import math

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kashin_jax import JointKashin, quantize
from kashin_jax.methods.joint.schedules import SPLITS
from kashin_jax.pipeline import allocate_widths
from kashin_jax.pipeline.allocate import JOINT_ERRORS

WIDTHS = [2, 2.5, 3, 4]
ERRORS = [0.08, 0.04, 0.02, 0.005]


def allocate(sizes, sensitivities, budget, overheads=None, errors=ERRORS):
    extra = overheads or {path: [0] * len(WIDTHS) for path in sizes}
    return allocate_widths(sizes, extra, sensitivities, WIDTHS, errors, budget)


def loss(chosen, sensitivities, errors=ERRORS):
    by_width = dict(zip(WIDTHS, errors, strict=True))
    return sum(sensitivities[path] * by_width[w] for path, w in chosen.items())


def stored(chosen, sizes, overheads):
    return sum(
        width * sizes[path] + overheads[path][WIDTHS.index(width)]
        for path, width in chosen.items()
    )


def brute_force(sizes, sensitivities, budget, overheads, errors=ERRORS):
    """The least loss of all ways to meet the budget; infinite if there are none."""
    limit = budget * sum(sizes.values())
    ways = itertools.product(WIDTHS, repeat=len(sizes))
    fitting = (
        chosen
        for chosen in (dict(zip(sizes, way, strict=True)) for way in ways)
        if stored(chosen, sizes, overheads) <= limit
    )
    return min((loss(c, sensitivities, errors) for c in fitting), default=math.inf)


counts = st.integers(1, 5)
weights = st.integers(1, 1000)
numbers = st.floats(0, 100)


@st.composite
def problems(draw, size=weights):
    paths = [f"layers/{i}" for i in range(draw(counts))]
    sizes = {path: draw(size) for path in paths}
    felt = {path: draw(numbers) for path in paths}
    extra = {
        path: sorted(draw(st.lists(st.integers(0, 40), min_size=4, max_size=4)))
        for path in paths
    }
    return sizes, felt, extra, draw(st.floats(1.5, 5))


@settings(max_examples=200, deadline=None)
@given(problems())
def test_the_budget_is_kept_and_the_loss_within_a_step_of_the_best(problem):
    sizes, felt, extra, budget = problem
    best = brute_force(sizes, felt, budget, extra)
    if best == math.inf:
        with pytest.raises(ValueError, match="cannot be met"):
            allocate(sizes, felt, budget, extra)
        return
    chosen = allocate(sizes, felt, budget, extra)
    assert list(chosen) == list(sizes)
    assert stored(chosen, sizes, extra) <= budget * sum(sizes.values())
    # Steps of the hull may skip widths where overheads grow: from the first at most.
    step = max(felt.values()) * (ERRORS[0] - ERRORS[-1])
    assert loss(chosen, felt) <= best + step + 1e-9


@settings(max_examples=100, deadline=None)
@given(problems(size=st.just(64)), st.integers(0, 20))
def test_with_steps_of_equal_size_the_loss_is_the_least(problem, halves):
    sizes, felt, _, _ = problem
    widths, errors = [2, 2.5, 3, 3.5], [0.08, 0.04, 0.02, 0.01]
    budget = 2 + 0.5 * min(halves, 3 * len(sizes)) / len(sizes)
    none = {path: [0] * 4 for path in sizes}
    chosen = allocate_widths(sizes, none, felt, widths, errors, budget + 1e-9)
    by_width = dict(zip(widths, errors, strict=True))
    best = min(
        sum(felt[p] * by_width[w] for p, w in zip(sizes, way, strict=True))
        for way in itertools.product(widths, repeat=len(sizes))
        if sum(way) <= (budget + 1e-9) * len(sizes)
    )
    found = sum(felt[path] * by_width[width] for path, width in chosen.items())
    assert found == pytest.approx(best, rel=1e-12, abs=1e-12)


def test_where_an_error_is_felt_more_there_are_more_bits():
    sizes = {"a": 100, "b": 100, "c": 100}
    chosen = allocate(sizes, {"a": 1.0, "b": 30.0, "c": 1.1}, 2.9)
    assert chosen == {"a": 2, "b": 4, "c": 2.5}


def test_a_layer_that_nobody_feels_has_the_narrowest_width():
    chosen = allocate({"a": 10, "b": 10}, {"a": 0.0, "b": 1.0}, 100)
    assert chosen == {"a": 2, "b": 4}


def test_a_small_layer_is_widened_before_a_large_one_that_is_felt_as_much():
    chosen = allocate({"large": 1000, "small": 100}, {"large": 1.0, "small": 1.0}, 2.2)
    assert chosen == {"large": 2, "small": 4}


def test_what_no_longer_fits_leaves_its_room_to_others():
    sizes = {"large": 1000, "small": 10}
    chosen = allocate(sizes, {"large": 1000.0, "small": 1.0}, 2.1)
    assert chosen == {"large": 2, "small": 4}


def test_a_width_that_a_layer_cannot_have_is_not_chosen():
    extra = {"a": [0, math.inf, 0, 0], "b": [0, 0, 0, 0]}
    sizes, felt = {"a": 10, "b": 10}, {"a": 1.0, "b": 1.0}
    found = {allocate(sizes, felt, b / 10, extra)["a"] for b in range(20, 50)}
    assert found == {2, 3, 4}


def test_a_width_that_is_no_better_than_a_narrower_one_is_not_chosen():
    errors = [0.08, 0.08, 0.02, 0.02]
    found = {
        allocate({"a": 10}, {"a": 1.0}, b / 10, errors=errors)["a"]
        for b in range(20, 50)
    }
    assert found == {2, 3}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"budget": 1.99}, "`budget`=1.99 bits per weight cannot be met.*store 2.0000"),
        ({"budget": math.nan}, "`budget`=nan bits per weight cannot be met"),
        ({"errors": [0.1]}, "`errors` must have a number for each of `widths`"),
        ({"widths": [], "errors": []}, "`errors` must have a number for each"),
        ({"overheads": {"a": [0] * 4}}, "`overheads` and `sizes`.*`b` is in one"),
        ({"sensitivities": {"a": 1.0}}, "`sensitivities` and `sizes`.*`b` is in one"),
        ({"overheads": {"a": [0] * 4, "b": [0]}}, "`overheads` of `b` must be"),
        ({"overheads": {"a": [0] * 4, "b": [-1] * 4}}, "`overheads` of `b` must be"),
        ({"sensitivities": {"a": 1.0, "b": -1.0}}, "`sensitivities` must be.*-1.0 for"),
        ({"sensitivities": {"a": math.nan, "b": 1.0}}, "`sensitivities` must be.*nan"),
        ({"errors": [0.1, math.inf, 0.1, 0.1]}, "`errors` must be.*inf for `1`"),
    ],
)
def test_what_cannot_be_meant_is_named(changes, says):
    whole = {
        "sizes": {"a": 10, "b": 10},
        "overheads": {"a": [0] * 4, "b": [0] * 4},
        "sensitivities": {"a": 1.0, "b": 1.0},
        "widths": WIDTHS,
        "errors": ERRORS,
        "budget": 3.0,
    }
    with pytest.raises(ValueError, match=says):
        allocate_widths(**(whole | changes))


@pytest.mark.parametrize("bits", [pytest.param(2, marks=pytest.mark.slow), 3.5])
def test_errors_of_joint_coding_are_those_of_gaussian_weights(bits):
    assert list(JOINT_ERRORS) == sorted(SPLITS)
    weight = jax.random.normal(jax.random.key(1), (256, 256))
    _, report = quantize(
        weight, JointKashin(bits=bits, unshrink=0.0), jax.random.key(0)
    )
    found = float(report.relative_squared_error)
    assert found == pytest.approx(JOINT_ERRORS[bits], rel=0.05)
