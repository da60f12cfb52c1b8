"""Joint coding: the search, what it finds, and how its tensors decode."""

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kashin_jax import (
    BasisSpec,
    JointConfig,
    NF4Config,
    RotatedKMeansConfig,
    RTNConfig,
    bits_per_weight,
    matmul,
    quantize,
)
from kashin_jax.bases import make_pair
from kashin_jax.codebooks import assign_scalars
from kashin_jax.codebooks.gaussian import lloyd_max_levels
from kashin_jax.coding.anneal import SCHEDULES, anneal, level_mean
from kashin_jax.coding.joint import joint_block_shape
from kashin_jax.quantized import derive_basis
from kashin_jax.quantized.tensor import derive_rotation

KEY = jax.random.key(3)
HADAMARD = BasisSpec.parse("hadamard")
FAST = {"effort": "fast"}


def gaussian_blocks(count, side, seed=0):
    return jax.random.normal(jax.random.key(seed), (count, side, side))


def decoded(words, basis):
    return words.levels_u[words.u] + basis.synthesis(words.levels_v[words.v])


def error_of(blocks, words, basis):
    return float(jnp.mean(jnp.square(blocks - decoded(words, basis))))


# Table I of Max (1960), and for 16 levels its outermost and innermost.
@pytest.mark.parametrize(
    ("count", "positive"),
    [
        (2, [0.7980]),
        (4, [0.4528, 1.510]),
        (8, [0.2451, 0.7560, 1.344, 2.152]),
        (3, [0.0, 1.224]),
    ],
)
def test_gaussian_levels_are_those_that_max_published(count, positive):
    levels = lloyd_max_levels(count)
    np.testing.assert_allclose(levels, -np.flip(levels), atol=1e-9)
    np.testing.assert_allclose(levels[count // 2 :], positive, atol=5e-4)


@given(
    st.lists(st.floats(-3, 3), min_size=2, max_size=8, unique=True),
    st.floats(-5, 5),
    st.floats(1e-3, 10),
)
@settings(max_examples=60, deadline=None)
def test_the_mean_of_levels_is_their_weighted_mean(levels, h, temperature):
    levels = np.sort(np.asarray(levels, np.float32))
    logits = -((h - levels.astype(float)) ** 2) / (2 * temperature)
    weights = np.exp(logits - logits.max())
    expected = weights @ levels / weights.sum()
    found = level_mean(
        jnp.full((1,), h, jnp.float32), [*jnp.asarray(levels)], jnp.float32(temperature)
    )
    np.testing.assert_allclose(found[0], expected, atol=2e-3)


def test_cold_means_are_the_nearest_levels():
    levels = jnp.asarray([-1.0, -0.2, 0.3, 2.0])
    h = jnp.asarray([-9.0, -0.7, -0.5, 0.04, 0.06, 1.1, 1.2, 8.0])
    index = assign_scalars(h, levels)
    np.testing.assert_array_equal(index, [0, 0, 1, 1, 2, 2, 3, 3])
    cold = level_mean(h, [*levels], jnp.float32(1e-6))
    np.testing.assert_allclose(cold, levels[index], atol=1e-6)


@pytest.mark.parametrize("bits", SCHEDULES)
def test_no_entry_of_u_or_v_can_be_improved_alone(bits):
    basis = make_pair(HADAMARD, KEY, (16, 16))
    x = gaussian_blocks(4, 16)
    words = anneal(x, basis, bits=bits, steps=20)
    v = words.levels_v[words.v]
    h = basis.analysis(x - words.levels_u[words.u])
    np.testing.assert_array_equal(assign_scalars(h, words.levels_v), words.v)
    assert (jnp.diff(words.levels_u) > 0).all()
    assert (jnp.diff(words.levels_v) > 0).all()
    # The last round moved v after u, which therefore is nearly the nearest one.
    u = assign_scalars(x - basis.synthesis(v), words.levels_u)
    assert float(jnp.mean(u != words.u)) < 0.02


def test_a_planted_word_of_two_signs_is_found_to_the_last_bit():
    basis = make_pair(HADAMARD, KEY, (64, 64))
    spread = SCHEDULES[1, 1].spread
    u, v = (
        factor * jax.random.rademacher(jax.random.key(i), (4, 64, 64), jnp.float32)
        for i, factor in enumerate(lloyd_max_levels(2)[1] * s for s in spread)
    )
    x = u + basis.synthesis(v)
    words = anneal(x, basis, bits=(1, 1), steps=200)
    np.testing.assert_array_equal(words.u, u > 0)
    np.testing.assert_array_equal(words.v, v > 0)
    np.testing.assert_allclose(decoded(words, basis), x, atol=1e-5)


@pytest.mark.parametrize(
    ("bits", "worst"), [(2, 0.0715), (3, 0.0221), (4, 0.0066), (5, 0.00190)]
)
def test_the_error_on_a_gaussian_source(bits, worst):
    basis = make_pair(HADAMARD, KEY, (64, 64))
    x = gaussian_blocks(16, 64)
    words = anneal(x, basis, bits=(bits - 1, 1), steps=200)
    # 65,536 weights: the standard error is about half a percent.
    assert error_of(x, words, basis) < worst


def test_more_steps_cost_no_quality_and_few_are_already_good():
    basis = make_pair(HADAMARD, KEY, (64, 64))
    x = gaussian_blocks(16, 64)
    errors = [
        error_of(x, anneal(x, basis, bits=(1, 1), steps=steps), basis)
        for steps in (10, 50, 200)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[1] < 0.075


def test_blocks_are_searched_alone_whatever_is_searched_beside_them():
    basis = make_pair(HADAMARD, KEY, (16, 16))
    x = gaussian_blocks(12, 16)
    words = [
        anneal(x, basis, bits=(2, 1), steps=30, pass_size=size)
        for size in (256, 1024, 2**17)
    ]
    for other in words[1:]:
        same = float(jnp.mean((other.u == words[0].u) & (other.v == words[0].v)))
        # Products of other shapes round otherwise, which may tip single entries.
        assert same > 0.98


def relative_error(x, config):
    return float(quantize(x, config, KEY)[1].relative_squared_error)


@pytest.mark.parametrize("name", ["gaussian", "student_t", "outlier_columns"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_loses_less_than_the_controls_of_at_least_as_many_bits(name, bits):
    x = getattr(problems, name)(256, 512)
    tensor, report = quantize(x, JointConfig(bits=bits, **FAST), KEY)
    error = float(report.relative_squared_error)
    assert bits < bits_per_weight(tensor) < bits + 0.15
    assert error < relative_error(x, RTNConfig(bits=bits, group_size=128))
    # One codebook for a rotated matrix needs fewer bits by the scales alone.
    assert error < 0.8 * relative_error(x, RotatedKMeansConfig(bits=bits))
    if bits == 4:
        assert error < relative_error(x, NF4Config())


def dense(basis):
    """Both sides as matrices."""
    sides = (basis.left, basis.right)
    orders = (side.signs.shape[-1] for side in sides)
    return [
        np.asarray(side.synthesis(jnp.eye(n), 0), np.float64)
        for side, n in zip(sides, orders, strict=True)
    ]


@pytest.mark.parametrize("shape", [(128, 64), (24, 40), (7, 13), (1, 9), (15, 1)])
@pytest.mark.parametrize("balance", [0.0, 1.0])
def test_decoding_and_products_are_those_of_plain_numpy(shape, balance):
    config = JointConfig(bits=3, balance=balance, rotation=bool(balance), **FAST)
    tensor, _ = quantize(problems.gaussian(*shape), config, KEY)
    m, n = shape
    bm, bn = tensor.layout.block_shape
    stream = np.unpackbits(np.asarray(tensor.packed_codes), bitorder="little")
    codes = stream[: m * n * 3].reshape(m, n, 3) @ np.array([1, 2, 4])
    pairs = np.asarray(tensor.centroids, np.float64)[codes]
    basis = derive_basis(tensor)
    left, right = dense(basis)
    rotation = derive_rotation(tensor)
    assert (rotation is None) == (not balance)
    outer = (np.eye(bm), np.eye(bn)) if rotation is None else dense(rotation)
    expected = np.zeros(shape)
    for i in range(0, m, bm):
        for j in range(0, n, bn):
            u, v = np.moveaxis(pairs[i : i + bm, j : j + bn], -1, 0)
            block = outer[0] @ (u + left @ v @ right.T) @ outer[1].T
            scale = float(tensor.scale[i // bm, j // bn])
            expected[i : i + bm, j : j + bn] = scale * block
    if balance:
        expected *= np.asarray(tensor.in_scale, np.float64)[:, None]
    else:
        assert tensor.in_scale is None
    expected *= np.asarray(tensor.out_scale, np.float64)
    size = np.abs(expected).max()
    np.testing.assert_allclose(tensor.decode() / size, expected / size, atol=1e-5)
    x = jax.random.normal(jax.random.key(1), (3, m))
    product = np.asarray(x, np.float64) @ expected
    size = np.abs(product).max()
    np.testing.assert_allclose(matmul(x, tensor) / size, product / size, atol=1e-5)


def test_the_centroids_are_all_pairs_of_levels():
    tensor, _ = quantize(problems.gaussian(64, 64), JointConfig(bits=3, **FAST), KEY)
    u, v = np.asarray(tensor.centroids).reshape(4, 2, 2).transpose(2, 0, 1)
    assert (u == u[:, :1]).all()
    assert (v == v[:1]).all()
    assert (np.diff(u[:, 0]) > 0).all()


@pytest.mark.parametrize(
    "name", ["zero", "constant", "diagonal", "sparse", "huge", "tiny"]
)
def test_degenerate_and_hostile_matrices_are_coded(name):
    x = getattr(problems, name)(64, 96)
    tensor, report = quantize(x, JointConfig(bits=3, **FAST), KEY)
    assert np.isfinite(np.asarray(tensor.decode())).all()
    assert 0 <= float(report.relative_squared_error) < (0.3 if name != "zero" else 1e-9)


def test_a_single_huge_outlier_does_not_drown_the_rest():
    x = problems.gaussian(128, 128)
    x[5, 7] = 1e4
    tensor, _ = quantize(x, JointConfig(bits=4, **FAST), KEY)
    others = np.ones(x.shape, bool)
    others[5], others[:, 7] = False, False
    lost = np.asarray(tensor.decode())[others] - x[others]
    # Its block has a scale of its own, and its row and column take the rest.
    assert np.mean(lost**2) < 0.5


def test_scaling_by_a_power_of_two_changes_nothing_but_the_scale():
    x = problems.gaussian(64, 128)
    ours, theirs = (
        quantize(x * np.float32(f), JointConfig(bits=3, **FAST), KEY)[0]
        for f in (1.0, 2.0**-20)
    )
    np.testing.assert_array_equal(ours.packed_codes, theirs.packed_codes)
    np.testing.assert_allclose(theirs.decode() * 2.0**20, ours.decode(), rtol=1e-6)


def test_the_same_key_gives_the_same_bytes_and_another_key_others():
    x = problems.gaussian(64, 64)
    config = JointConfig(bits=2, **FAST)
    first, again = (quantize(x, config, KEY)[0] for _ in range(2))
    other, _ = quantize(x, config, jax.random.key(4))
    for ours, theirs in zip(
        jax.tree.leaves(first), jax.tree.leaves(again), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert not np.array_equal(first.packed_codes, other.packed_codes)


def test_centroids_and_scales_have_gradients():
    tensor, _ = quantize(problems.gaussian(64, 64), JointConfig(bits=2, **FAST), KEY)

    def size(centroids, scale, in_scale):
        changed = tensor._replace(centroids=centroids, scale=scale, in_scale=in_scale)
        return jnp.sum(jnp.square(changed.decode()))

    inputs = (tensor.centroids, tensor.scale, tensor.in_scale)
    for grad, value in zip(jax.grad(size, (0, 1, 2))(*inputs), inputs, strict=True):
        assert grad.shape == value.shape
        assert np.abs(np.asarray(grad, np.float32)).max() > 0


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((384, 1536), (64, 64)),
        ((768, 3072), (64, 64)),
        ((11008, 4096), (64, 64)),
        ((50, 97), (50, 97)),
        ((1, 7), (1, 7)),
        ((300, 120), (60, 60)),
    ],
)
def test_blocks_are_as_near_to_64_as_divisors_allow(shape, expected):
    assert joint_block_shape(shape, JointConfig()) == expected
    given_shape = JointConfig(block_shape=(2, 3))
    assert joint_block_shape(shape, given_shape) == (2, 3)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bits": 1}, "exists at 2 to 5 bits"),
        ({"bits": 6}, "exists at 2 to 5 bits"),
        ({"effort": "heroic"}, "`effort` must be one of fast, default, max"),
        ({"balance": 1.5}, "`balance` must lie in"),
        ({"balance": float("nan")}, "`balance` must lie in"),
    ],
)
def test_choices_that_do_not_exist_are_refused(fields, words):
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        JointConfig(**fields)


def test_blocks_that_do_not_divide_the_matrix_are_refused():
    with pytest.raises(ValueError, match="`weight`: A matrix of shape"):
        quantize(problems.gaussian(10, 10), JointConfig(block_shape=(4, 4)), KEY)
