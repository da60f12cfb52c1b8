"""The numbers behind the paper's figures, against other people's arithmetic."""

import math

import jax
import numpy as np
import pytest
import scipy.stats

from experiments import fig1, fig2, fig3, fig4, fig5, fig6
from experiments.common import clusterings
from experiments.common.figures import Setting, layer_basis, survey
from experiments.common.plots import FAMILY_STYLES
from kashin_jax import BasisSpec, GreedyKashin, make_basis, make_pair
from kashin_jax.bases import FAMILIES
from kashin_jax.bases.basis import dense
from kashin_jax.bases.butterfly import make_butterfly
from tests import oracle_bases, oracle_numpy, problems

# A whole program on small matrices; its parts have tests of their own.
pytestmark = pytest.mark.slow

KEY = jax.random.key(3)


def test_the_choice_in_the_plane_is_the_larger_l1_norm():
    choice, sweep = fig1.measure((0.92, 0.37), 30.0, 181)
    x = np.array([0.92, 0.37])
    c, s = math.cos(math.radians(30)), math.sin(math.radians(30))
    q = np.array([[c, -s], [s, c]])
    assert choice["coefficient_u"] == pytest.approx(np.abs(x).sum() / math.sqrt(2))
    of_v = np.abs(q.T @ x).sum() / math.sqrt(2)
    assert choice["coefficient_v"] == pytest.approx(of_v, rel=1e-6)
    u, v, rest, _ = oracle_numpy.greedy_vector(x, q, 1e-9, 1)
    assert (choice["choice"] == "u") == bool(u.any()) == (not v.any())
    np.testing.assert_allclose(choice["to"], rest, atol=1e-6)
    # Neighbouring atoms are 30 and 60 degrees apart; the worst x halves the larger gap.
    assert sweep["least_of_both"] == pytest.approx(math.cos(math.radians(30)), abs=1e-6)
    assert sweep["least_of_u"] == pytest.approx(math.sqrt(0.5), abs=1e-6)


def test_another_vector_takes_the_other_basis():
    choice, _ = fig1.measure((1.0, 0.05), 30.0, 3)
    assert choice["choice"] == "v"


@pytest.mark.parametrize(
    "family", ["haar", pytest.param("butterfly3", marks=pytest.mark.slow)]
)
def test_mean_and_band_are_those_of_a_plain_numpy_greedy(family):
    n, bases, vectors, steps = 24, 3, 4, 9
    (record,) = fig2.measure(
        KEY, n=n, bases=bases, vectors=vectors, steps=steps, families=(family,)
    )
    draws_key, bases_key = jax.random.split(KEY)
    draws = np.asarray(jax.random.normal(draws_key, (bases, vectors, n)), float)
    curves = []
    for key, xs in zip(jax.random.split(bases_key, bases), draws, strict=True):
        q = oracle_bases.dense_basis(family, make_basis(family, key, n), n)
        for x in xs:
            x = x / np.linalg.norm(x)
            curves.append([
                np.linalg.norm(oracle_numpy.greedy_vector(x, q, 0.0, k)[2])
                for k in range(steps + 1)
            ])  # fmt: skip
    assert record["draws"] == bases * vectors == len(curves)
    np.testing.assert_allclose(record["mean"], np.mean(curves, axis=0), rtol=2e-4)
    low, high = np.quantile(curves, [0.025, 0.975], axis=0)
    np.testing.assert_allclose(record["low"], low, rtol=2e-4)
    np.testing.assert_allclose(record["high"], high, rtol=2e-4)


@pytest.fixture(scope="module")
def kernels():
    """A plain layer, and one that no pair of bases can spread."""
    hard_basis = layer_basis(KEY, "hard", "hadamard", np.zeros((24, 32)))
    right = np.asarray(dense(hard_basis.right, 32))
    return {
        "plain": jax.numpy.asarray(problems.gaussian(24, 32)),
        "hard": jax.numpy.asarray(problems.counter_example(24, right)),
    }


def test_the_curve_of_a_layer_is_that_of_a_plain_numpy_greedy(kernels):
    (record,) = fig3.measure(kernels, KEY, {"plain": 18}, families=("haar",))
    basis = layer_basis(KEY, "plain", "haar", kernels["plain"])
    q1, q2 = (np.asarray(side.matrix, float) for side in basis)
    x = np.asarray(kernels["plain"], float)
    x /= np.linalg.norm(x)
    assert record["steps"] == [*range(13), 16, 18]
    for step, residual in zip(record["steps"], record["residuals"], strict=True):
        expected = oracle_numpy.greedy_matrix(x, q1, q2, 0.0, step)[2]
        assert residual == pytest.approx(np.linalg.norm(expected), rel=1e-3)


def test_a_curve_ends_at_the_floor_of_float32_and_not_before(kernels):
    basis = make_pair(BasisSpec("haar", "haar"), KEY, (24, 32))
    steps, residuals = fig3.curve(kernels["plain"], basis, 400)
    assert steps[-1] < 400
    assert residuals[-1] < fig3.FLOOR
    slow, left = fig3.curve(
        kernels["plain"],
        make_pair(BasisSpec("identity", "identity"), KEY, (24, 32)),
        60,
    )
    assert slow[-1] == 60
    assert left[-1] > 1e-3


def test_the_survey_puts_the_counter_example_first(kernels):
    first, second = survey(kernels, KEY, max_steps=40)
    assert (first["layer"], second["layer"]) == ("hard", "plain")
    assert first["residual"] > 0.1
    assert not first["converged"]
    assert second["converged"]
    assert second["residual"] < second["early_residual"] < first["early_residual"]


SIZES = fig4.Sizes(
    vector=(4, 8), matrix=(4, 8), step=(8, 16), analysis=(16, 32, 64), dense=32,
    steps=2, repeats=2,
)  # fmt: skip


def test_every_curve_is_timed_and_its_slope_is_linregress():
    records = fig4.measure(KEY, SIZES, families=("haar",))
    slopes = fig4.fitted_slopes(records)
    curves = {(r["part"], r["curve"]) for r in records}
    assert curves == {
        ("form", "matrix"), ("form", "vector"), ("step", "haar"), ("analysis", "haar"),
    }  # fmt: skip
    assert {(s["part"], s["curve"]) for s in slopes} == curves
    dense_sizes = [
        r["size"] for r in records if (r["part"], r["curve"]) == ("analysis", "haar")
    ]
    assert dense_sizes == [16, 32]
    for slope in slopes:
        own = [
            r for r in records
            if (r["part"], r["curve"]) == (slope["part"], slope["curve"])
        ]  # fmt: skip
        assert all(r["seconds"] > 0 for r in own)
        fit = scipy.stats.linregress(
            np.log([r["size"] for r in own]), np.log([r["seconds"] for r in own])
        )
        assert slope["slope"] == pytest.approx(fit.slope, rel=1e-9, abs=1e-9)
        expected = math.exp(fit.intercept)
        assert slope["seconds_at_1"] == pytest.approx(expected, rel=1e-6)
    figure = fig4.draw(records, slopes)
    texts = [t.get_text() for axes in figure.axes for t in axes.get_legend().texts]
    assert f"matrix {slopes[0]['slope']:.2f}" in texts


def test_vector_and_matrix_form_are_the_same_decomposition():
    matrix = fig4._form(KEY, "matrix", 8, 6)()
    vector = fig4._form(KEY, "vector", 8, 6)()
    assert matrix.residual == pytest.approx(float(vector.residual), rel=1e-4)
    np.testing.assert_allclose(matrix.u.reshape(-1), vector.u, atol=1e-5)
    np.testing.assert_allclose(matrix.v.reshape(-1), vector.v, atol=1e-5)


def test_the_first_call_compiles_and_does_not_count():
    calls = []
    seconds = fig4.median_seconds(lambda: calls.append(0), 4)
    assert len(calls) == 5
    assert 0 <= seconds < 1


@pytest.mark.parametrize(
    "n", [1, 6, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 8, 13))]
)
def test_the_factors_are_sparse_and_multiply_to_the_butterfly(n):
    basis = make_butterfly(KEY, n)
    found = fig5.factors(basis)
    angles = np.asarray(basis.angles, float)
    expected = oracle_bases.butterfly_factors(n)
    assert len(found) == len(expected) == math.ceil(math.log2(n))
    for matrix, rotations in zip(found.values(), expected, strict=True):
        np.testing.assert_allclose(
            matrix, oracle_bases.rotated(rotations, angles, n), atol=1e-6
        )
        assert (np.abs(np.asarray(matrix)) > 1e-7).sum(axis=1).max() == 2
    product = oracle_bases.product([np.asarray(m, float) for m in found.values()], n)
    np.testing.assert_allclose(product, dense(basis, n), atol=1e-6)


def test_the_papers_factors_are_named_after_their_blocks():
    assert list(fig5.factors(make_butterfly(KEY, 8))) == ["B8", "B4", "B2"]


@pytest.fixture(scope="module")
def clustering(kernels):
    config = GreedyKashin(bits=3, num_restarts=2, sample=128, max_steps=40)
    return clusterings.cluster_layer(kernels, KEY, "plain", "haar", config)


def test_the_error_of_a_clustering_is_that_of_the_nearest_pairs(kernels, clustering):
    x = np.asarray(kernels["plain"], float)
    basis = layer_basis(KEY, "plain", "haar", kernels["plain"])
    q1, q2 = (np.asarray(side.matrix, float) for side in basis)
    book = np.asarray(clustering.record["centroids"], float)
    points = np.stack([clustering.u, clustering.v], axis=1)
    codes = np.argmin(((points[:, None] - book) ** 2).sum(axis=2), axis=1)
    u, v = (book[codes][:, side].reshape(x.shape) for side in (0, 1))
    lost = x / np.sqrt(np.mean(x**2)) - u - q1 @ v @ q2.T
    found = clustering.record["relative_squared_error"]
    assert found == pytest.approx(np.mean(lost**2), rel=1e-3)
    assert len(book) == 8
    counts = np.bincount(codes, minlength=8) / len(codes)
    np.testing.assert_allclose(clustering.record["shares"], counts, atol=2e-3)


def test_overlap_is_distance_over_half_the_gap():
    book = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 6.0]])
    codes = np.array([0, 1, 2])
    # Half gaps 1, 1 and 3; distances .5, .5 and 1.
    u, v = np.array([0.5, 2.0, 0.0]), np.array([0.0, 0.5, 7.0])
    expected = math.sqrt((0.25 + 0.25 + 1) / (1 + 1 + 9))
    assert clusterings.overlap(u, v, book, codes) == pytest.approx(expected)


def test_all_pictures_are_drawn_from_tiny_numbers(kernels, clustering):
    vectors = fig2.measure(
        KEY, n=8, bases=1, vectors=2, steps=3, families=("identity",)
    )
    layers = fig3.measure(kernels, KEY, {"plain": 3, "hard": 3}, families=("identity",))
    figures = {
        fig1.draw(fig1.measure((1, 0), 30.0, 5)): 2,
        fig2.draw(vectors): 1,
        fig3.draw(layers, "layers"): 2,
        fig5.draw(fig5.measure(KEY, (2, 3))): 7,
        fig6.draw([clustering], "entries"): 3,
        clusterings.draw_clusterings([clustering] * 2, "pairs"): 3,
    }
    for figure, panels in figures.items():
        figure.draw_without_rendering()
        assert len(figure.axes) == panels
        shown = [axes for axes in figure.axes if axes.axison]
        labelled = [axes for axes in shown if axes.get_xlabel() or axes.get_ylabel()]
        assert labelled == shown


def test_no_two_families_look_alike():
    assert set(FAMILY_STYLES) == set(FAMILIES)
    looks = [
        (style["color"], str(style["linestyle"]), style["marker"])
        for style in FAMILY_STYLES.values()
    ]
    for i, one in enumerate(looks):
        for other in looks[:i]:
            assert sum(a != b for a, b in zip(one, other, strict=True)) >= 2


def test_another_models_good_layer_is_its_easiest(kernels):
    setting = Setting(model="other", seed=3)
    # As if it had been loaded.
    vars(setting)["kernels"] = kernels
    assert setting.good_layer == "plain"
    assert setting.hard_layer == setting.lossy_layer == "hard"
