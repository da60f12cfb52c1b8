"""Joint coding: the search, what it finds, and how its tensors decode."""

import dataclasses
import re
from functools import lru_cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_matrices import random_words

from kashin_jax import (
    NF4,
    RTN,
    BasisSpec,
    JointKashin,
    KMeans,
    Rotated,
    bits_per_weight,
    encode,
    matmul,
    quantize,
)
from kashin_jax.bases import make_pair
from kashin_jax.codebooks import assign_scalars
from kashin_jax.codebooks.gaussian import lloyd_max_levels
from kashin_jax.methods.joint.anneal import anneal
from kashin_jax.methods.joint.anneal import level_mean as mean_eagerly
from kashin_jax.methods.joint.coder import joint_block_shape
from kashin_jax.methods.joint.schedules import LONG, SHORT, SPLITS, Schedule, Split
from kashin_jax.methods.joint.words import coarse_rows
from kashin_jax.methods.joint.words import decode_words as decode_eagerly

KEY = jax.random.key(3)
HADAMARD = BasisSpec.parse("hadamard")
FAST = {"effort": "fast"}
# Tests share matrices of a shape and a width where they can, so that the coder is
# compiled once for them: it takes longest.
SHAPE, THREE = (128, 96), JointKashin(bits=3, **FAST)
decode_words, level_mean = jax.jit(decode_eagerly), jax.jit(mean_eagerly)
analysis = jax.jit(lambda basis, x: basis.analysis(x))
synthesis = jax.jit(lambda basis, v: basis.synthesis(v))


def gaussian_blocks(count, side):
    x = np.random.default_rng(0).standard_normal((count, side, side))
    return jnp.asarray(x, jnp.float32)


def error_of(blocks, words, basis):
    return float(np.mean(np.square(blocks - decode_words(words, basis))))


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
    st.lists(st.floats(-3, 3), min_size=8, max_size=8, unique=True),
    st.sampled_from([2, 3, 8]),  # a program each
    st.floats(-5, 5),
    st.floats(1e-3, 10),
)
@settings(max_examples=60, deadline=None)
def test_the_mean_of_levels_is_their_weighted_mean(levels, count, h, temperature):
    levels = np.sort(np.asarray(levels[:count], np.float32))
    logits = -((h - levels.astype(float)) ** 2) / (2 * temperature)
    weights = np.exp(logits - logits.max())
    expected = weights @ levels / weights.sum()
    found = level_mean(np.full(1, h, np.float32), [*levels], np.float32(temperature))
    np.testing.assert_allclose(found[0], expected, atol=2e-3)


def test_cold_means_are_the_nearest_levels():
    levels = jnp.asarray([-1.0, -0.2, 0.3, 2.0])
    h = jnp.asarray([-9.0, -0.7, -0.5, 0.04, 0.06, 1.1, 1.2, 8.0])
    index = assign_scalars(h, levels)
    np.testing.assert_array_equal(index, [0, 0, 1, 1, 2, 2, 3, 3])
    cold = level_mean(h, [*levels], jnp.float32(1e-6))
    np.testing.assert_allclose(cold, levels[index], atol=1e-6)


# From 1,048,576 weights, `results/bench_joint.jsonl`, and two percent for chance.
WORST = {
    2: 0.0711, 2.5: 0.0390, 3: 0.0202, 3.5: 0.01028, 4: 0.00506, 4.5: 0.00255,
    5: 0.00129,
}  # fmt: skip
WIDTHS = [
    bits if bits in (2, 2.5, 4) else pytest.param(bits, marks=pytest.mark.slow)
    for bits in WORST
]


@lru_cache
def searched(bits):
    """The words of 65,536 Gaussian weights."""
    x, basis = gaussian_blocks(16, 64), make_pair(HADAMARD, KEY, (64, 64))
    return x, basis, anneal(x, basis, split=SPLITS[bits], steps=200)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_error_on_a_gaussian_source(bits):
    x, basis, words = searched(bits)
    # Shannon's bound, which only chance could beat.
    assert 4.0**-bits < error_of(x, words, basis) < WORST[bits]


@pytest.mark.parametrize("bits", WIDTHS)
def test_no_entry_of_u_or_v_can_be_improved_alone(bits):
    x, basis, words = searched(bits)
    split = SPLITS[bits]
    v_levels = np.asarray(words.levels.v)
    v = v_levels[np.asarray(words.v)]
    mixed = synthesis(basis, jnp.asarray(v))
    u = decode_words(words, basis) - mixed
    h = analysis(basis, x - u)
    nearest = v_levels[np.asarray(assign_scalars(h, words.levels.v))]
    # Entries on an edge between two levels fall as rounding has it.
    assert (np.abs(h - v) <= np.abs(h - nearest) + 1e-5).all()
    tables = [words.levels.u, words.levels.v]
    assert (words.levels.coarse is not None) == split.half
    rows = np.zeros((1, 64, 1), bool)
    if split.half:
        tables.append(words.levels.coarse)
        rows = np.asarray(coarse_rows(64))[None]
        assert (
            np.asarray(words.u).max(axis=(0, 2))[rows[0, :, 0]] < 2 ** (split.u - 1)
        ).all()
    for levels in tables:
        assert (np.diff(levels) > 0).all()
    # The last round moved v after u, which therefore is nearly the nearest one.
    nearest = assign_scalars(x - mixed, words.levels.u)
    assert float(np.mean((nearest != words.u) & ~rows)) < 0.03


def planted(schedule, blocks, side):
    """Words of random levels, and what they decode to."""
    parts = []
    for i, half in enumerate((schedule.levels_u, schedule.levels_v)):
        levels = np.array([-c for c in reversed(half)] + [*half], np.float32)
        rng = np.random.default_rng(i)
        index = rng.integers(0, len(levels), (blocks, side, side))
        parts.append((index, jnp.asarray(levels[index])))
    return parts


def test_a_planted_word_of_two_signs_is_found_to_the_last_bit():
    split = Split(1, 1)
    basis = make_pair(HADAMARD, KEY, (64, 64))
    (u_index, u), (v_index, v) = planted(LONG[split], 16, 64)
    x = u + synthesis(basis, v)
    words = anneal(x, basis, split=split, steps=200)
    np.testing.assert_array_equal(words.u, u_index)
    np.testing.assert_array_equal(words.v, v_index)
    np.testing.assert_allclose(decode_words(words, basis), x, atol=1e-5)


@pytest.mark.slow
def test_repulsion_is_worth_more_than_a_long_search():
    basis = make_pair(HADAMARD, KEY, (64, 64))
    x = gaussian_blocks(16, 64)
    schedule = LONG[Split(1, 1)]
    without = dataclasses.replace(schedule, repulsion=(0.0,) * 5)
    plain = anneal(x, basis, split=Split(1, 1), steps=400, schedule=without)
    ours = anneal(x, basis, split=Split(1, 1), steps=50)
    assert error_of(x, ours, basis) < 0.95 * error_of(x, plain, basis)


@pytest.mark.parametrize("table", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("split", SPLITS.values(), ids=str)
def test_schedules_have_the_levels_of_their_splits_and_cool(table, split):
    schedule = table[split]
    assert len(schedule.levels_u) == 2 ** (split.u - 1)
    assert len(schedule.levels_v) == 2 ** (split.v - 1)
    assert len(schedule.levels_coarse) == (2 ** (split.u - 2) if split.half else 0)
    for levels in (schedule.levels_u, schedule.levels_v, schedule.levels_coarse):
        assert (np.diff([0.0, *levels]) > 0).all()
    plan = schedule.plan(100)
    for shares in (plan.a_u, plan.a_v, plan.damping):
        assert ((shares > 0) & (shares < 1)).all()
    assert plan.t_u[-1] < plan.t_u[0] / 3


def test_a_plan_passes_through_its_knots():
    schedule = Schedule(
        temperature=(1.0, 0.5, 0.25, 0.1, 0.01),
        temperature_ratio=(2.0, 0.5),
        repulsion=(0.9, 0.8, 0.7, 0.6, 0.5),
        repulsion_shift=(0.0, 1.0),
        damping=(0.6, 0.2),
        levels_u=(1.0,),
        levels_v=(1.0,),
    )
    plan = schedule.plan(101)
    np.testing.assert_allclose(plan.t_u[[0, 8, 25, 55, 100]], schedule.temperature)
    np.testing.assert_allclose(plan.a_u[[0, 8, 25, 55, 100]], schedule.repulsion)
    np.testing.assert_allclose(plan.t_v[[0, 100]], [2.0, 0.005])
    np.testing.assert_allclose(plan.a_v[[0, 100]], [0.9, np.e / (1 + np.e)])
    np.testing.assert_allclose(plan.damping[[0, 100]], [0.6, 0.2])


def test_more_steps_cost_no_quality_and_few_are_already_good():
    x, basis, words = searched(2)
    quick = anneal(x, basis, split=Split(1, 1), steps=50)
    assert 0.075 > error_of(x, quick, basis) > error_of(x, words, basis)


def test_blocks_are_searched_alone_whatever_is_searched_beside_them():
    basis = make_pair(HADAMARD, KEY, (16, 16))
    x = gaussian_blocks(12, 16)
    words = [
        anneal(x, basis, split=Split(2, 1), steps=30, pass_size=size)
        for size in (256, 2**17)
    ]
    # Products of other shapes round otherwise, which may tip an entry, and with it
    # others of its block.
    assert np.median(share_of_equal(*words)) > 0.98
    errors = [error_of(x, found, basis) for found in words]
    np.testing.assert_allclose(*errors, rtol=0.05)


def share_of_equal(one, other):
    """For every block."""
    same = (np.asarray(one.u) == other.u) & (np.asarray(one.v) == other.v)
    return same.reshape(len(same), -1).mean(axis=1)


def relative_error(x, config):
    return float(quantize(x, config, KEY)[1].relative_squared_error)


@pytest.mark.parametrize("name", ["gaussian", "student_t", "outlier_columns"])
@pytest.mark.parametrize(
    "bits", [2, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (3, 4))]
)
def test_it_loses_less_than_the_controls_of_at_least_as_many_bits(name, bits):
    x = getattr(problems, name)(256, 512)
    tensor, report = quantize(x, JointKashin(bits=bits, **FAST), KEY)
    error = float(report.relative_squared_error)
    assert bits < bits_per_weight(tensor) < bits + 0.15
    assert error < relative_error(x, RTN(bits=bits, group_size=128))
    # One codebook for a rotated matrix needs fewer bits by the scales alone.
    assert error < 0.8 * relative_error(x, Rotated(KMeans(bits=bits)))
    if bits == 4:
        assert error < relative_error(x, NF4())


def dense(basis):
    """Both sides as matrices."""
    sides = (basis.left, basis.right)
    orders = (side.signs.shape[-1] for side in sides)
    return [
        np.asarray(synthesis(side, jnp.eye(n)), np.float64).T
        for side, n in zip(sides, orders, strict=True)
    ]


def unpacked(tensor):
    """Codes by plain NumPy, as indices of centroids."""
    m, n = tensor.shape
    rows = {None: range(m)}
    bits = tensor.layout.bits
    if bits % 1:
        rows = {0: range(0, m, 2), 1: range(1, m, 2)}
    codes = np.zeros((m, n), int)
    for part, mine in rows.items():
        width = int(np.ceil(bits)) - (part or 0)
        packed = tensor.packed_coarse if part else tensor.packed_codes
        stream = np.unpackbits(np.asarray(packed), bitorder="little")
        stream = stream[: len(mine) * n * width].reshape(len(mine), n, width)
        first = 2 ** (width + 1) if part else 0
        codes[list(mine)] = first + stream @ 2 ** np.arange(width)
    return codes


@pytest.mark.parametrize(
    ("bits", "shape", "balance"),
    [
        (3, (128, 64), 1.0), (4, (24, 40), 0.0), (4.5, (130, 7), 1.0),
        (2.5, (2, 1), 0.0),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (5, (7, 13), 1.0), (3, (1, 9), 0.0), (2, (15, 1), 1.0),
                (2.5, (128, 64), 1.0), (3.5, (24, 41), 0.0),
            )
        ),
    ],
)  # fmt: skip
def test_decoding_and_products_are_those_of_plain_numpy(bits, shape, balance):
    config = JointKashin(bits=bits, balance=balance, rotation=bool(balance), **FAST)
    tensor = random_words(config, shape)
    m, n = shape
    bm, bn = tensor.layout.block_shape
    pairs = np.asarray(tensor.centroids, np.float64)[unpacked(tensor)]
    basis = tensor.derive_bases().basis
    left, right = dense(basis)
    rotation = tensor.derive_bases().rotation
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
    x = jnp.asarray(problems.gaussian(3, m))
    product = np.asarray(x, np.float64) @ expected
    size = np.abs(product).max()
    for max_tile in (2**20, 1):
        found = matmul(x, tensor, max_tile=max_tile)
        np.testing.assert_allclose(found / size, product / size, atol=1e-5)


def test_the_centroids_are_all_pairs_of_levels():
    tensor, _ = quantize(problems.gaussian(*SHAPE), THREE, KEY)
    u, v = np.asarray(tensor.centroids).reshape(4, 2, 2).transpose(2, 0, 1)
    assert (u == u[:, :1]).all()
    assert (v == v[:1]).all()
    assert (np.diff(u[:, 0]) > 0).all()


@pytest.mark.parametrize(
    "name", ["zero", "constant", "diagonal", "sparse", "huge", "tiny"]
)
def test_degenerate_and_hostile_matrices_are_coded(name):
    x = getattr(problems, name)(*SHAPE)
    tensor, report = quantize(x, THREE, KEY)
    assert np.isfinite(np.asarray(tensor.decode())).all()
    assert 0 <= float(report.relative_squared_error) < (0.3 if name != "zero" else 1e-9)


def test_a_single_huge_outlier_does_not_drown_the_rest():
    x = problems.gaussian(*SHAPE)
    x[5, 7] = 1e4
    tensor, _ = quantize(x, THREE, KEY)
    others = np.ones(x.shape, bool)
    others[5], others[:, 7] = False, False
    lost = np.asarray(tensor.decode())[others] - x[others]
    # Its block has a scale of its own, and its row and column take the rest.
    assert np.mean(lost**2) < 0.5


def test_scaling_by_a_power_of_two_changes_nothing_but_the_scale():
    x = problems.gaussian(*SHAPE)
    ours, theirs = (quantize(x * np.float32(f), THREE, KEY)[0] for f in (1.0, 2.0**-20))
    np.testing.assert_array_equal(ours.packed_codes, theirs.packed_codes)
    np.testing.assert_allclose(theirs.decode() * 2.0**20, ours.decode(), rtol=1e-6)


def test_the_same_key_gives_the_same_bytes_and_another_key_others():
    x = problems.gaussian(*SHAPE)
    first, again = (quantize(x, THREE, KEY)[0] for _ in range(2))
    other, _ = quantize(x, THREE, jax.random.key(4))
    chex.assert_trees_all_equal(first, again)
    assert not np.array_equal(first.packed_codes, other.packed_codes)


def test_centroids_and_scales_have_gradients():
    tensor, _ = quantize(problems.gaussian(*SHAPE), THREE, KEY)

    @jax.jit
    def size(centroids, scale, in_scale):
        changed = tensor.replace(centroids=centroids, scale=scale, in_scale=in_scale)
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
    assert joint_block_shape(shape, JointKashin()) == expected
    given_shape = JointKashin(block_shape=(2, 3))
    assert joint_block_shape(shape, given_shape) == (2, 3)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bits": 1}, "exists at 2 to 5 bits"),
        ({"bits": 6}, "exists at 2 to 5 bits"),
        ({"bits": 2.7}, "in steps of 0.5"),
        ({"effort": "heroic"}, "`effort` must be one of fast, default, max"),
        ({"balance": 1.5}, "`balance` must lie in"),
        ({"balance": float("nan")}, "`balance` must lie in"),
        ({"unshrink": -0.5}, "`unshrink` must lie in"),
    ],
)
def test_choices_that_do_not_exist_are_refused(fields, words):
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        JointKashin(**fields)


def test_blocks_that_do_not_divide_the_matrix_are_refused():
    with pytest.raises(ValueError, match="`weight`: A matrix of shape"):
        quantize(problems.gaussian(10, 10), JointKashin(block_shape=(4, 4)), KEY)


def test_half_widths_need_blocks_of_an_even_number_of_rows():
    with pytest.raises(ValueError, match="`weight`: At 2.5 bits .* 7 rows"):
        quantize(problems.gaussian(7, 64), JointKashin(bits=2.5), KEY)
    with pytest.raises(ValueError, match="`weight`: At 2.5 bits .* 3 rows"):
        quantize(
            problems.gaussian(12, 12), JointKashin(bits=2.5, block_shape=(3, 4)), KEY
        )
    assert joint_block_shape((6, 6), JointKashin(bits=2.5)) == (6, 6)
    assert joint_block_shape((126, 6), JointKashin(bits=2.5)) == (42, 6)


@pytest.mark.parametrize("bits", SPLITS)
def test_stored_bits_are_those_of_the_width_and_a_little(bits):
    x = jax.ShapeDtypeStruct((256, 512), jnp.float32)
    coded = partial(encode, config=JointKashin(bits=bits, **FAST))
    tensor, _ = jax.eval_shape(coded, x, KEY)
    # Two half-precision numbers per line, a float32 per block, the codebook, the seed.
    pairs = tensor.centroids.shape[0]
    extra = 16 * (256 + 512) + 32 * 32 + pairs * 64 + 64
    assert bits_per_weight(tensor) == bits + extra / x.size
    assert extra / x.size < 0.13


@pytest.mark.slow
def test_errors_of_half_widths_lie_between_those_of_whole_ones():
    x = problems.gaussian(256, 512)
    errors = [relative_error(x, JointKashin(bits=b, **FAST)) for b in (2, 2.5, 3, 3.5)]
    ratios = np.diff(np.log2(errors))
    # Half a bit halves the error: no width is a bad bargain.
    assert (ratios < -0.8).all()
    assert (ratios > -1.1).all()


def test_permuting_inputs_of_equal_blocks_permutes_the_code():
    """Blocks are searched alone, so exchanging rows of blocks exchanges their codes."""
    x = problems.gaussian(*SHAPE)
    swapped = np.concatenate([x[64:], x[:64]])
    ours, theirs = (quantize(each, THREE, KEY)[0].decode() for each in (x, swapped))
    moved = np.concatenate([theirs[64:], theirs[:64]])
    scale = np.sqrt(np.mean(np.square(x - ours)))
    # Sums over blocks in another order move the shared levels by a last bit.
    assert np.sqrt(np.mean(np.square(ours - moved))) < 0.05 * scale


def weighted_error(x, config, weights, **kwargs):
    tensor, _ = quantize(x, config, KEY, **kwargs)
    return float(np.mean(weights[:, None] * np.square(x - tensor.decode())))


def test_importances_lower_the_error_that_they_weigh():
    x = problems.gaussian(*SHAPE)
    importance = np.exp(np.linspace(-3, 3, 128)).astype(np.float32)
    np.random.default_rng(0).shuffle(importance)
    ours = weighted_error(x, THREE, importance, importance=importance)
    plain = weighted_error(x, THREE, importance)
    # What Cauchy and Schwarz promise is (mean sqrt d)^2 / mean d = .62 here.
    expected = np.mean(np.sqrt(importance)) ** 2 / np.mean(importance)
    assert ours < 1.1 * expected * plain
    assert ours > 0.9 * expected * plain


def test_equal_importances_are_a_balance_of_one_half():
    x = problems.gaussian(*SHAPE)
    ours, _ = quantize(x, THREE, KEY, importance=np.ones(128))
    same, _ = quantize(x, dataclasses.replace(THREE, balance=0.5), KEY)
    np.testing.assert_allclose(ours.in_scale, same.in_scale, rtol=2e-3)
    # Codes of two programs are equal until rounding tips one.
    errors = [np.sum(np.square(x - tensor.decode())) for tensor in (ours, same)]
    np.testing.assert_allclose(*errors, rtol=0.05)


@pytest.mark.parametrize(
    ("importance", "words"),
    [
        (np.ones(63), "`weight`: `importance` has shape (63,), but the matrix has 64"),
        (np.full(64, np.nan), "`weight`: `importance` holds"),
        (np.r_[-1.0, np.ones(63)], "`weight`: `importance` holds"),
        (np.zeros(64), "`weight`: `importance` is zero"),
    ],
)
def test_importances_that_cannot_be_are_refused(importance, words):
    config = JointKashin(bits=2, **FAST)
    with pytest.raises(ValueError, match=re.escape(words)):
        quantize(problems.gaussian(64, 64), config, KEY, importance=importance)


def test_only_the_joint_coder_takes_importances():
    with pytest.raises(TypeError, match="RTN has no use for `importance`"):
        quantize(problems.gaussian(64, 64), RTN(), KEY, importance=np.ones(64))


@pytest.mark.parametrize("balance", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_unshrinking_gives_outputs_back_what_means_took(balance):
    x = problems.student_t(*SHAPE)
    plain, half = (
        quantize(x, JointKashin(bits=2, balance=balance, unshrink=p, **FAST), KEY)[0]
        for p in (0.0, 0.5)
    )
    # Two programs may find other codes: those of one of them, with both scales.
    plain = dataclasses.replace(half, out_scale=plain.out_scale)
    before, after = (
        np.sum(x * x, axis=0) / np.sum(x * np.asarray(tensor.decode()), axis=0)
        for tensor in (plain, half)
    )
    assert before.mean() > 1.05
    # Half precision of the scales of outputs.
    np.testing.assert_allclose(after, before**0.5, rtol=2e-3)


def test_only_narrow_codes_unshrink_unless_told_to():
    powers = [JointKashin(bits=bits).expansion for bits in SPLITS]
    assert powers == [0.5, 0.5, 0, 0, 0, 0, 0]
    assert JointKashin(bits=4, unshrink=1.0).expansion == 1.0


def test_joint_coding_at_four_bits_is_what_happens_by_default():
    x = problems.gaussian(64, 64)
    ours, _ = quantize(x)
    same, _ = quantize(x, JointKashin(bits=4, effort="default"), jax.random.key(0))
    chex.assert_trees_all_equal(ours, same)


# The last ones, as they drop what was compiled of the search.
@pytest.mark.parametrize(
    "split",
    [Split(1, 1), pytest.param(Split(3, 2, half=True), marks=pytest.mark.slow)],
    ids=str,
)
def test_polishing_longer_never_loses(split, monkeypatch):
    basis = make_pair(HADAMARD, KEY, (32, 32))
    x = gaussian_blocks(2, 32)
    errors = []
    for rounds in (0, 1, 8):
        monkeypatch.setattr("kashin_jax.methods.joint.words._ROUNDS", rounds)
        anneal.clear_cache()
        errors.append(error_of(x, anneal(x, basis, split=split, steps=5), basis))
    anneal.clear_cache()
    assert errors[0] > errors[1]
    assert all(a >= b * (1 - 1e-5) for a, b in zip(errors, errors[1:], strict=False))


@pytest.mark.slow
def test_the_fast_and_the_dense_transforms_of_the_search_agree(monkeypatch):
    basis = make_pair(HADAMARD, KEY, (32, 32))
    x = gaussian_blocks(8, 32)
    found = [anneal(x, basis, split=Split(1, 1), steps=30)]
    monkeypatch.setattr("kashin_jax.methods.joint.anneal._DENSE_SIDE", 1)
    anneal.clear_cache()
    found.append(anneal(x, basis, split=Split(1, 1), steps=30))
    anneal.clear_cache()
    # Rounding may tip an entry, and with it some others of its block.
    assert np.median(share_of_equal(*found)) > 0.98
    errors = [error_of(x, words, basis) for words in found]
    np.testing.assert_allclose(*errors, rtol=0.05)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("seen", [slice(0, None, 2), slice(0, 3)])
def test_an_input_that_nobody_heard_loses_less_than_zeros_in_its_place(bits, seen):
    """Importances of 0 once scaled a row so far that it lost 176 times itself."""
    w = np.asarray(problems.gaussian(256, 64)) * 0.02
    importance = np.zeros(256, np.float32)
    importance[seen] = 1.0
    config = JointKashin(bits=bits, effort="fast")
    q, _ = quantize(w, config, KEY, importance=importance)
    lost = np.sum((np.asarray(q.decode()) - w) ** 2, axis=1) / np.sum(w**2, axis=1)
    assert lost.max() < 1
    # What is heard is coded better than by a coder that hears all alike.
    plain, _ = quantize(w, config, KEY)
    alike = np.sum((np.asarray(plain.decode()) - w) ** 2, axis=1) / np.sum(w**2, axis=1)
    assert lost[seen].mean() < alike[seen].mean()
