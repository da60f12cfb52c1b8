"""The methods of the table and the published values beside them."""

import jax
import jax.numpy as jnp
import pytest

from experiments.common.methods import FULL_PRECISION, METHODS, choose_methods
from experiments.common.published import published_perplexity
from kashin_jax import BasisSpec, GreedyKashin, quantize
from kashin_jax.errors import UsageError
from tests import problems

HADAMARD = BasisSpec.parse("hadamard")
HAAR = BasisSpec.parse("haar")


def test_all_methods_come_in_the_order_of_the_table():
    assert list(choose_methods(("all",))) == list(METHODS)
    assert next(iter(METHODS)) == "kashin"


def test_named_methods_come_once_in_the_order_of_the_table():
    chosen = choose_methods(("uniform", "kashin", "uniform"))
    assert list(chosen) == ["kashin", "uniform"]


def test_full_precision_may_be_named_and_is_no_method():
    assert choose_methods((FULL_PRECISION,)) == {}


@pytest.mark.parametrize("names", [("kashin", "gptq"), ("Kashin",), ("",), ()])
def test_a_wrong_name_is_an_error_that_lists_the_right_ones(names):
    with pytest.raises(UsageError, match="`--methods`") as caught:
        choose_methods(names)
    for name in METHODS:
        assert name in str(caught.value)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("name", METHODS)
def test_a_method_exists_at_a_width_or_says_why_not(name, bits):
    make = METHODS[name].make
    if name == "nf4-g64" and bits != 4:
        with pytest.raises(ValueError, match="NF4 exists at 4 bits only"):
            make(bits, HADAMARD, 1e-3, 9)
    elif name == "kashin-joint" and not 2 <= bits <= 5:
        with pytest.raises(ValueError, match="exists at 2 to 5 bits"):
            make(bits, HADAMARD, 1e-3, 9)
    elif name == "kashin-dct" and bits < 2:
        with pytest.raises(ValueError, match="exists at 2 to 8 whole bits"):
            make(bits, HADAMARD, 1e-3, 9)
    else:
        assert make(bits, HADAMARD, 1e-3, 9).bits == bits


@pytest.mark.parametrize("bits", [1.5, 2.5, 2.7, 3.25, 4.5])
@pytest.mark.parametrize("name", METHODS)
def test_a_width_that_is_not_whole_exists_where_codes_have_it(name, bits):
    make = METHODS[name].make
    if name == "kashin-joint" and bits in (2.5, 4.5):
        assert make(bits, HADAMARD, 1e-3, 9).bits == bits
    else:
        with pytest.raises(ValueError, match=f"bits={bits}"):
            make(bits, HADAMARD, 1e-3, 9)


def test_only_joint_coding_takes_widths_between_its_own_as_budgets():
    widths = (1.9, 2, 2.1, 2.5, 2.7, 3, 4.999, 5, 5.1)
    budgets = {
        name: [w for w in widths if m.is_budget(w)] for name, m in METHODS.items()
    }
    assert budgets.pop("kashin-joint") == [2.1, 2.7, 4.999]
    assert not any(budgets.values())


def test_the_flags_reach_the_kashin_coder():
    for name in ("kashin", "kashin-authors"):
        assert METHODS[name].make(3, HAAR, 1e-3, 9) == GreedyKashin(
            bits=3, basis=HAAR, rtol=1e-3, max_steps=9
        )
    assert METHODS["kashin-authors"].keeps_failures
    assert not METHODS["kashin"].keeps_failures


@pytest.mark.parametrize("name", METHODS)
def test_the_basis_matters_exactly_where_rows_have_one(name):
    configs = {METHODS[name].make(4, basis, 1e-3, 9) for basis in (HADAMARD, HAAR)}
    assert len(configs) == (2 if METHODS[name].has_basis else 1)


@pytest.mark.parametrize("name", METHODS)
def test_the_seed_matters_exactly_where_rows_have_one(name):
    # Heavy tails: on Gaussian weights every start of k-means may end alike.
    weight = problems.student_t(64, 64)
    with jax.default_matmul_precision("highest"):
        config = METHODS[name].make(4, HADAMARD, 1e-6, 200)
        first, second = (
            quantize(weight, config, jax.random.key(seed))[0].decode()
            for seed in (0, 1)
        )
    assert bool(jnp.array_equal(first, second)) == (not METHODS[name].is_random)


def test_notes_state_group_size_and_type_of_the_scales():
    for name, method in METHODS.items():
        if name != "kashin-authors":
            assert "float32" in method.note or "fp16" in method.note
    assert "128" in METHODS["rtn-g128"].note
    for name in ("nf4-g64", "hqq-g64", "rotate-rtn-g64"):
        assert "per group of 64" in METHODS[name].note


def published(model="facebook/opt-125m", **changes):
    asked = {
        "dataset": "wikitext2-gptq", "context": 2048, "tokens_limited": False,
        "method": "rtn-channel", "bits": 4,
    }  # fmt: skip
    return published_perplexity(model, **(asked | changes))


def test_published_values_stand_beside_the_same_protocol():
    assert published() == 37.28
    assert published("facebook/opt-1.3b", method=FULL_PRECISION, bits=16) == 14.62
    assert published("facebook/opt-6.7b", method="rtn-g128", bits=3) == 23.54


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset": "wikitext2"},
        {"context": 512},
        {"tokens_limited": True},
        {"method": "kashin"},
        {"bits": 2},
        {"model": "opt-wiki-18m"},
        {"model": "facebook/opt-350m", "method": "rtn-g128"},
    ],
    ids=str,
)
def test_no_published_value_stands_beside_anything_else(changes):
    assert published(**changes) is None
