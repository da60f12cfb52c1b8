"""Matrix families have the property that they are named after."""

from functools import partial

import jax
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from experiments.common.checkpoints import EMBEDDED, model_kernels
from experiments.robustness import (
    COLUMN_FACTOR,
    MATRICES,
    MAX_SIZE,
    NONZERO_ENTRIES,
    OUTLIER_COLUMNS,
    draw_matrices,
    draw_matrix,
)
from kashin_jax.errors import CheckpointError

KEY, OTHER = jax.random.split(jax.random.key(5))
N = 32


def drawn(family, key=KEY, n=N):
    return np.asarray(draw_matrix(family, key, n), np.float64)


def test_there_are_at_least_a_dozen_families():
    assert len(MATRICES) >= 12


@pytest.mark.parametrize("family", MATRICES)
def test_a_matrix_is_square_finite_float32_of_unit_root_mean_square(family):
    x = draw_matrix(family, KEY, N)
    assert x.shape == (N, N) and x.dtype == np.float32
    assert np.sqrt(np.mean(np.square(x))) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("family", ["hadamard", "hadamard-row", "comb", "sparse"])
def test_sides_need_not_be_powers_of_two(family):
    for n in (1, 21):
        x = draw_matrix(family, KEY, n)
        assert x.shape == (n, n)
        assert np.sqrt(np.mean(np.square(x))) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("family", MATRICES)
def test_the_same_key_gives_the_same_bytes_and_another_key_others(family):
    x = draw_matrix(family, KEY, N)
    assert np.array_equal(x, draw_matrix(family, KEY, N))
    is_equal = np.array_equal(x, draw_matrix(family, OTHER, N))
    assert is_equal == (family == "constant")


def test_a_stack_holds_what_every_family_draws_alone():
    keys = jax.random.split(KEY, 2)
    stack = draw_matrices(("sparse", "gaussian"), keys, N)
    assert stack.shape == (2, 2, N, N)
    assert np.array_equal(stack[1, 0], draw_matrix("sparse", keys[1], N))
    assert np.array_equal(stack[0, 1], draw_matrix("gaussian", keys[0], N))


@pytest.mark.parametrize(
    ("family", "law"),
    [("gaussian", scipy.stats.norm()), ("student-t3", scipy.stats.t(3))],
)
def test_entries_follow_their_distribution(family, law):
    entries = np.asarray(MATRICES[family](KEY, N), np.float64).reshape(-1)
    assert scipy.stats.kstest(entries, law.cdf).pvalue > 1e-3


@pytest.mark.parametrize(
    ("family", "rank"),
    [
        ("low-rank", 2), ("rank-one", 1), ("constant", 1), ("constant-rows", 1),
        ("hadamard-row", 1), ("comb", 1), ("hadamard", N), ("diagonal", N),
        ("gaussian", N),
    ],
)  # fmt: skip
def test_a_family_has_its_rank(family, rank):
    values = scipy.linalg.svdvals(drawn(family))
    assert np.sum(values > 1e-5 * values[0]) == rank


@pytest.mark.parametrize("power", [2, 4, 8])
def test_singular_values_are_evenly_spaced_in_their_logarithms(power):
    values = scipy.linalg.svdvals(drawn(f"condition-1e{power}"))
    logs = np.log10(values / values[0])
    expected = np.linspace(0, -power, N)
    seen = expected > -5.5  # below it float32 has rounding only
    assert seen.sum() >= 20
    np.testing.assert_allclose(logs[seen], expected[seen], atol=0.03)
    assert np.all(logs[~seen] < -5)


def test_sparse_and_diagonal_have_as_many_entries_as_they_say():
    assert np.sum(drawn("sparse") != 0) == round(NONZERO_ENTRIES * N * N)
    diagonal = drawn("diagonal")
    assert np.all(diagonal[~np.eye(N, dtype=bool)] == 0)
    assert np.all(np.diag(diagonal) != 0)


def test_outliers_are_as_many_and_as_large_as_they_say():
    columns = np.sqrt(np.mean(np.square(drawn("outlier-columns", n=128)), axis=0))
    by_size = np.sort(columns)
    large, usual = by_size[-OUTLIER_COLUMNS:], by_size[:-OUTLIER_COLUMNS]
    assert np.mean(large) / np.mean(usual) == pytest.approx(COLUMN_FACTOR, rel=0.1)
    assert large.min() > 5 * usual.max()
    entries = np.sort(np.abs(drawn("scattered-outliers", n=128)), axis=None)
    count = round(128 * 128 / 200)
    assert np.median(entries[-count:]) / np.median(entries) == pytest.approx(100, 0.3)


def test_constant_families_are_constant():
    assert np.all(drawn("constant") == 1)
    rows = drawn("constant-rows")
    assert np.all(rows == rows[:, :1])
    assert len(np.unique(rows[:, 0])) == N


def test_hadamard_families_are_made_of_rows_of_sylvesters_matrix():
    sylvester = scipy.linalg.hadamard(N)
    rows = {tuple(row) for row in sylvester}
    x = drawn("hadamard")
    assert {tuple(row) for row in x} == rows
    assert not np.array_equal(x, sylvester)
    signs = np.sign(drawn("hadamard-row"))
    row = tuple(signs[0] * signs[0, 0])
    assert row in rows - {tuple(np.ones(N))}


def test_a_comb_is_as_sparse_in_sylvesters_basis_as_in_its_own():
    x, h = drawn("comb"), scipy.linalg.hadamard(N) / np.sqrt(N)
    other = h.T @ x @ h
    assert np.sum(x != 0) == 64
    assert np.sum(np.abs(other) > 1e-6) == 16
    square = drawn("comb", n=64)
    h = scipy.linalg.hadamard(64) / 8
    assert np.sum(square != 0) == np.sum(np.abs(h.T @ square @ h) > 1e-6) == 64


@pytest.mark.parametrize("model", EMBEDDED)
def test_layer_blocks_are_cut_from_the_layers_of_the_model(model):
    kernels = list(map(np.asarray, model_kernels(EMBEDDED[model]).values()))
    places = set()
    for key in jax.random.split(KEY, 3):
        block = np.asarray(MATRICES[f"{model}-layer"](key, 12))
        found = [
            (number, int(i), int(j))
            for number, kernel in enumerate(kernels)
            for i, j in np.argwhere(kernel[:-11, :-11] == block[0, 0])
            if np.array_equal(kernel[i : i + 12, j : j + 12], block)
        ]
        assert len(found) == 1
        places.add(found[0])
    assert len(places) == 3


def test_both_architectures_are_read_without_their_heads():
    counts = {name: len(model_kernels(path)) for name, path in EMBEDDED.items()}
    assert counts == {"opt": 48, "minilm": 37}
    for path in EMBEDDED.values():
        kernels = model_kernels(path)
        assert not [name for name in kernels if "classifier" in name or "head" in name]
        assert min(min(kernel.shape) for kernel in kernels.values()) == MAX_SIZE


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="config.json"):
        model_kernels(tmp_path)


@pytest.mark.parametrize(
    ("draw", "says"),
    [
        (partial(draw_matrix, "smooth", KEY, 8), "Unknown matrix family `smooth`"),
        (partial(draw_matrix, "gaussian", KEY, 0), "`n` must lie in"),
        (partial(draw_matrix, "opt-layer", KEY, 385), "Got n=385"),
    ],
)
def test_what_cannot_be_drawn_is_an_error_with_its_name(draw, says):
    with pytest.raises(ValueError, match=says):
        draw()
