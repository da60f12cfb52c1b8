"""Learned angles: losses that mean what they say, never worse, always orthogonal."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

from experiments.learn_butterfly import main
from kashin_jax.bases import BasisSpec, learn, make_basis, make_pair
from kashin_jax.bases import dense as dense_eagerly
from kashin_jax.bases.learn import angles_of, learn_angles, with_angles
from tests.oracle_bases import dense_basis
from tests.tiny_checkpoint import make_checkpoint

# Compiled as one program each: op by op every test would take seconds.
l1_loss, l1_ratio, scalar_error = map(
    jax.jit, (learn.l1_loss, learn.l1_ratio, learn.scalar_error)
)
dense = jax.jit(dense_eagerly, static_argnames="n")
ADAM = optax.adam(0.05)
LEVELS = jnp.array([-1.51, -0.4528, 0.4528, 1.51])
KEY = jax.random.key(0)


def matrix(m, n):
    return jnp.asarray(
        np.random.default_rng(m + n).standard_normal((m, n)), jnp.float32
    )


def pair_of(text, m, n):
    return make_pair(BasisSpec.parse(text), KEY, (m, n))


def coefficients(pair, text, x):
    spec = BasisSpec.parse(text)
    left = dense_basis(spec.left, pair.left, x.shape[0])
    right = dense_basis(spec.right, pair.right, x.shape[1])
    return left.T @ np.asarray(x, float) @ right


@pytest.mark.parametrize("text", ["butterfly", "givens:identity", "haar"])
def test_losses_are_those_of_the_dense_coefficients(text):
    x, pair = matrix(12, 20), pair_of(text, 12, 20)
    y = coefficients(pair, text, x)
    flat = np.asarray(x, float).ravel()
    l1 = np.abs(y).sum() / np.sqrt(240) / np.linalg.norm(flat)
    own = np.abs(flat).sum() / np.sqrt(240) / np.linalg.norm(flat)
    assert float(l1_loss(pair, x)) == pytest.approx(-l1, rel=1e-5)
    assert float(l1_ratio(pair, x)) == pytest.approx(max(l1, own), rel=1e-5)
    unit = y / np.sqrt(np.mean(y**2))
    nearest = np.min((unit[..., None] - np.asarray(LEVELS, float)) ** 2, axis=-1)
    assert float(scalar_error(LEVELS, pair, x)) == pytest.approx(
        nearest.mean(), rel=1e-4
    )


def test_losses_have_no_unit_and_zero_is_no_trap():
    x, pair = matrix(8, 8), pair_of("butterfly", 8, 8)
    for loss in (l1_loss, l1_ratio, Partial(scalar_error, LEVELS)):
        assert float(loss(pair, 1000 * x)) == pytest.approx(
            float(loss(pair, x)), rel=1e-5
        )
        assert np.isfinite(float(loss(pair, 0 * x)))


@pytest.mark.parametrize(
    ("text", "loss"),
    [
        ("butterfly", l1_loss),
        ("butterfly3:identity", l1_loss),
        ("givens", Partial(scalar_error, LEVELS)),
    ],
)
def test_learning_lowers_the_loss_and_keeps_the_basis_orthogonal(text, loss):
    x, pair = matrix(12, 20), pair_of(text, 12, 20)
    learned = learn_angles(pair, x, loss, ADAM, 40)
    assert learned.losses.shape == (40,)
    assert float(learned.losses[0]) == pytest.approx(float(loss(pair, x)), rel=1e-5)
    assert float(learned.loss) == float(jnp.min(learned.losses))
    assert float(learned.loss) == pytest.approx(float(loss(learned.basis, x)), rel=1e-5)
    assert float(learned.loss) < float(learned.losses[0]) - 0.01
    for side, n in zip(learned.basis, (12, 20), strict=True):
        q = np.asarray(dense(side, n))
        np.testing.assert_allclose(q @ q.T, np.eye(n), atol=2e-6)


def test_a_rotated_sign_pattern_is_found_again():
    # One angle: the vector (1, 0) has the l1 ratio 1 in a basis at 45 degrees.
    basis = make_basis("butterfly", KEY, 2)._replace(angles=jnp.array([0.2]))
    learned = learn_angles(basis, jnp.array([1.0, 0.0]), l1_loss, ADAM, 200)
    assert float(learned.loss) == pytest.approx(-1, abs=1e-4)
    assert float(learned.basis.angles[0]) == pytest.approx(np.pi / 4, abs=0.02)


def test_a_step_that_is_far_too_long_returns_the_start():
    x, pair = jnp.eye(1, 16), pair_of("identity:butterfly", 1, 16)
    best = learn_angles(pair, x, l1_loss, ADAM, 200).basis
    learned = learn_angles(best, x, l1_loss, optax.sgd(1e4), 20)
    assert float(learned.loss) <= float(learned.losses[0])
    assert np.any(np.asarray(learned.losses) > float(learned.loss) + 0.01)


def test_a_loss_that_is_not_a_number_is_shown_and_never_chosen():
    bad = lambda basis, x: jnp.where(
        basis.angles[0] == 0.5, l1_loss(basis, x), l1_loss(basis, x) * jnp.nan
    )
    basis = make_basis("butterfly", KEY, 4)._replace(angles=jnp.full(3, 0.5))
    learned = learn_angles(basis, matrix(1, 4), bad, ADAM, 3)
    assert np.array_equal(learned.basis.angles, basis.angles)
    assert np.isnan(np.asarray(learned.losses)).tolist() == [False, True, True]


def test_angles_can_be_taken_out_and_put_back():
    pair = pair_of("butterfly:identity", 6, 9)
    angles = angles_of(pair)
    assert [leaf.shape for leaf in jax.tree.leaves(angles)] == [(5,)]
    still = with_angles(pair, jax.tree.map(jnp.zeros_like, angles))
    analysis = jax.jit(lambda basis, x: basis.analysis(x))
    assert np.array_equal(analysis(still, matrix(6, 9)), matrix(6, 9))


def test_a_basis_without_angles_and_too_few_steps_are_refused():
    with pytest.raises(ValueError, match="KroneckerBasis has no angles"):
        learn_angles(pair_of("haar", 4, 4), matrix(4, 4), l1_loss, ADAM, 5)
    with pytest.raises(ValueError, match="`steps` must be at least 1"):
        learn_angles(pair_of("givens", 4, 4), matrix(4, 4), l1_loss, ADAM, 0)


@pytest.mark.slow
def test_the_experiment_counts_what_learned_angles_cost(tmp_path, capsys):
    model, out = tmp_path / "model", tmp_path / "out"
    make_checkpoint(model)
    layer = "decoder/layers/1/self_attn/k_proj"
    flags = [f"--layers={layer}", "--families=butterfly", "--losses=error", "--steps=6"]
    assert main([*flags, f"--model={model}", f"--out={out}"]) == 0
    files = {path.suffix: path for path in out.iterdir()}
    [record] = map(json.loads, files[".jsonl"].read_text().splitlines())
    assert (record["layer"], record["angles"], record["weights"]) == (
        layer,
        126,
        64**2,
    )
    assert record["angle_bits_per_weight"] == 16 * 126 / 64**2
    gain = 10 * np.log10(record["error_random"] / record["error_learned"])
    assert record["gain_db"] == pytest.approx(gain) and gain > 0
    overhead = 20 * np.log10(2) * record["angle_bits_per_weight"]
    assert record["net_gain_db"] == pytest.approx(gain - overhead)
    assert "net, dB" in files[".md"].read_text()
    assert "--steps=6" in files[".md"].read_text()
    assert layer in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--layers=decoder/layers/99/fc1", "decoder/layers/99/fc1 is no layer of"),
        ("--families=haar", "`--families` must be a list of: butterfly"),
        ("--losses=l2", "`--losses` must be"),
        ("--bits=9", "`--bits` must be in [1, 8]"),
        ("--steps=0", "`--steps` must be at least 1"),
        ("--learning_rate=nan", "`--learning_rate` must be positive"),
    ],
)
def test_wrong_flags_are_one_line(flag, message, tmp_path, capsys):
    assert main([flag, f"--out={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
