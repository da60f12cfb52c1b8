"""Rivals beside joint coding at equal stored bits, and means over seeds."""

import math

import numpy as np
import pytest

from experiments.common.perplexity_table import (
    comparison_rows,
    comparison_tables,
    interpolated,
    mean_columns,
    mean_rows,
    seed_means,
    short_table,
)


def record(method, bits, stored, perplexity, seed=None, basis=None):
    return {
        "method": method, "bits": bits, "stored_bits_per_weight": stored, "seed": seed,
        "perplexity": perplexity, "basis": basis,
    }  # fmt: skip


def joint(bits, stored, perplexity, seed=0, basis="hadamard"):
    return record("kashin-joint", bits, stored, perplexity, seed, basis)


FULL = record("full precision", 16, 16.0, 20.0)
CURVE = [joint(2, 2.0, 40.0), joint(2, 2.0, 60.0, 1), joint(3, 3.0, 30.0)]


def test_seeds_of_a_row_become_their_mean_and_standard_deviation():
    first, second = seed_means(CURVE)
    assert (first.bits, first.perplexity) == (2, 50.0)
    assert first.spread == pytest.approx(np.std([40.0, 60.0], ddof=1))
    assert first.text == "50.00 ± 14.14"
    assert (second.perplexity, second.spread, second.text) == (30.0, 0.0, "30.00")


def test_rows_of_dashes_have_no_mean():
    assert seed_means([record("nf4-g64", 3, None, None)]) == []


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_a_seed_that_is_not_finite_shows_in_the_mean(broken):
    (mean,) = seed_means([joint(2, 2.0, 40.0), joint(2, 2.0, broken, 1)])
    assert str(mean.perplexity) == str(broken)
    assert mean.spread == 0


def test_the_logarithm_of_perplexity_is_interpolated():
    curve = seed_means(CURVE)
    for bits in (2.0, 2.25, 2.9, 3.0):
        expected = np.exp(np.interp(bits, [2, 3], np.log([50.0, 30.0])))
        assert interpolated(curve, bits) == pytest.approx(expected)
    assert interpolated(curve, 1.999) is None
    assert interpolated(curve, 3.001) is None


def test_a_rival_stands_beside_rows_that_store_no_more_than_it():
    rival = record("rtn-g128", 2, 2.5, 70.0)
    (row,) = comparison_rows([FULL, *CURVE, rival])
    assert (row["method"], row["perplexity"]) == ("rtn-g128", "70.00")
    assert (row["below_bits"], row["below_perplexity"]) == (2.0, "50.00 ± 14.14")
    assert row["joint_perplexity"] == pytest.approx(math.sqrt(50 * 30))
    assert row["difference"] == pytest.approx(math.sqrt(50 * 30) - 70)


def test_beyond_the_curve_there_are_dashes():
    rivals = [record("a", 1, 1.9, 9.0), record("b", 4, 4.1, 9.0)]
    small, large = comparison_rows([*CURVE, *rivals])
    assert small["below_bits"] is None and small["joint_perplexity"] is None
    assert large["below_bits"] == 3.0 and large["joint_perplexity"] is None
    assert small["difference"] is None and large["difference"] is None


def test_a_rival_with_a_basis_meets_joint_coding_with_the_same():
    haar = [joint(2, 2.0, 80.0, basis="haar"), joint(3, 3.0, 70.0, basis="haar")]
    rivals = [record("rotate", 2, 2.0, 1.0, 0, basis) for basis in ("haar", "dct")]
    rows = comparison_rows([*CURVE, *haar, *rivals])
    assert [row["joint_perplexity"] for row in rows] == [80.0, 50.0]
    assert "| basis |" in comparison_tables([*CURVE, *haar, *rivals])[1]


def test_mixed_widths_stand_beside_uniform_ones():
    mixed = record("kashin-joint-mixed", 2.5, 2.5, 35.0, 0, "hadamard")
    (row,) = comparison_rows([*CURVE, mixed])
    assert row["joint_perplexity"] == pytest.approx(math.sqrt(50 * 30))


def test_without_joint_coding_there_is_no_comparison():
    records = [FULL, record("rtn-g128", 2, 2.5, 70.0)]
    assert comparison_tables(records) == ("", "")


def test_the_seeds_of_a_rival_meet_one_value():
    rivals = [record("k-means", 2, 2.5, 70.0 + seed, seed) for seed in (0, 1)]
    (row,) = comparison_rows([FULL, *CURVE, *rivals])
    assert row["joint_perplexity"] == pytest.approx(math.sqrt(50 * 30))


def test_rows_of_means_count_their_seeds_and_leave_dashes_out():
    dash = record("nf4-g64", 3, None, None)
    full, two, one = mean_rows([FULL, *CURVE, dash])
    assert (full["seeds"], full["perplexity"]) == (None, "20.00")
    assert (two["seeds"], two["perplexity"]) == (2, "50.00 ± 14.14")
    assert (one["seeds"], one["stored_bits_per_weight"]) == (1, 3.0)
    assert "basis" not in [column.key for column in mean_columns([full, two, one])]


def test_the_short_table_has_a_pair_of_columns_for_each_width():
    rows, columns = short_table(
        [FULL, *CURVE], ("kashin-joint", "nf4-g64", "full precision"), (3, 2)
    )
    assert [column.key for column in columns] == [
        "method", "stored_3", "perplexity_3", "stored_2", "perplexity_2",
    ]  # fmt: skip
    assert rows == [
        {"method": "kashin-joint", "stored_3": 3.0, "perplexity_3": "30.00",
         "stored_2": 2.0, "perplexity_2": "50.00 ± 14.14"},
        {"method": "nf4-g64"},
        {"method": "full precision", "stored_3": 16.0, "perplexity_3": "20.00",
         "stored_2": 16.0, "perplexity_2": "20.00"},
    ]  # fmt: skip
