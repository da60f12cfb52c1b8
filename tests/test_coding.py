"""From matrix to codes: the Kashin coder and its controls against known errors."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from kashin_jax.bases import BasisSpec, make_pair
from kashin_jax.decomposition import kashin_decompose
from kashin_jax.methods.kashin import (
    GreedyKashin,
    cluster_factors,
    decompose_blocks,
    kashin_code,
)
from kashin_jax.methods.kmeans import kmeans_code
from kashin_jax.methods.nf4 import nf4_code
from kashin_jax.methods.rtn import rtn_code
from kashin_jax.methods.uniform import minmax_code
from kashin_jax.tensors.blocks import from_blocks, resolve_block_shape, to_blocks
from kashin_jax.tensors.codebook import NF4_LEVELS
from kashin_jax.tensors.grouped import group_rows, ungroup_rows
from tests import problems

QUICK = {"num_restarts": 4, "sample": 4096, "polish_steps": 5}


def relative_error(x, decoded):
    x = np.asarray(x, np.float64)
    return np.linalg.norm(x - np.asarray(decoded)) / np.linalg.norm(x)


# One program each: op by op decoding would take longer than coding.
@partial(jax.jit, static_argnames="block_shape")
def decode_kashin(code, basis, block_shape):
    pairs = to_blocks(code.codes, block_shape)
    u, v = (code.centroids[:, i][pairs] for i in (0, 1))
    return from_blocks(code.scale[..., None, None] * (u + basis.synthesis(v)))


@jax.jit
def decode_affine(code):
    return code.scale * (code.codes.astype(jnp.float32) - code.zero)


@jax.jit
def decode_scalars(code):
    values = code.levels[code.codes]
    # In groups, or one scale for a matrix.
    return (code.scale if values.ndim == 3 else code.scale[0]) * values


def run_kashin(x, config, block_shape=None, seed=0):
    block_shape = block_shape or x.shape
    basis = make_pair(config.basis, jax.random.key(seed), block_shape)
    code = kashin_code(jnp.asarray(x), basis, jax.random.key(1), config, block_shape)
    return code, decode_kashin(code, basis, block_shape)


@pytest.mark.parametrize(
    "text", ["hadamard", pytest.param("haar", marks=pytest.mark.slow)]
)
def test_gaussian_matrices_reach_the_papers_error_at_four_bits(text):
    x = problems.gaussian(512, 512)
    config = GreedyKashin(basis=BasisSpec.parse(text))
    code, decoded = run_kashin(x, config)
    assert code.converged.all()
    assert 0.122 < relative_error(x, decoded) < 0.134
    # At .603 per step no entry exceeds 1 / (1 - .603) = 2.5 root-mean-squares.
    assert 0.5 < float(code.max_v[0, 0]) < float(code.max_u[0, 0]) < 2.52


def test_scalar_controls_reach_their_known_errors_on_gaussian_matrices():
    x = jnp.asarray(problems.gaussian(512, 512))
    book = kmeans_code(x, jax.random.key(0), bits=4)
    assert 0.0965 < relative_error(x, decode_scalars(book)) < 0.0985
    uniform = minmax_code(x[None], 4)
    assert 0.15 < relative_error(x, decode_affine(uniform)[0]) < 0.20
    groups = group_rows(x, 64)
    nf4 = nf4_code(groups)
    assert 0.08 < relative_error(groups, decode_scalars(nf4)) < 0.10
    assert 0.08 < relative_error(groups, decode_affine(rtn_code(groups, 4))) < 0.11


@pytest.mark.parametrize(
    "bits", [1, *(pytest.param(b, marks=pytest.mark.slow) for b in (2, 3, 5, 8))]
)
def test_every_width_has_its_codebook_and_more_bits_lose_less(bits):
    x = problems.student_t(64, 96)
    code, decoded = run_kashin(x, GreedyKashin(bits=bits, **QUICK))
    assert code.centroids.shape == (2**bits, 2)
    assert int(code.codes.max()) < 2**bits
    limit = {1: 0.8, 2: 0.6, 3: 0.4, 5: 0.17, 8: 0.06}[bits]
    assert relative_error(x, decoded) < limit


@pytest.mark.parametrize("name", problems.ALL)
def test_no_problem_yields_anything_but_finite_numbers(name):
    x = problems.ALL[name](64, 96)
    code, decoded = run_kashin(x, GreedyKashin(max_steps=20, **QUICK))
    assert all(np.isfinite(leaf).all() for leaf in code)
    assert np.isfinite(decoded).all()
    if name in problems.TRIVIAL:
        np.testing.assert_allclose(decoded, x, rtol=1e-6)
    else:
        scale = np.abs(x).max()
        assert relative_error(x / scale, np.asarray(decoded) / scale) < 0.5


def test_scaling_a_matrix_leaves_its_codes_unchanged():
    x, config = problems.gaussian(64, 96), GreedyKashin(**QUICK)
    plain, _ = run_kashin(x, config)
    scaled, _ = run_kashin(x * np.float32(2.0**-90), config)
    assert np.array_equal(plain.codes, scaled.codes)
    assert np.array_equal(plain.scale * np.float32(2.0**-90), scaled.scale)


def test_blocks_are_decomposed_as_if_each_were_alone():
    x = problems.outlier_columns(48, 80)
    # After many steps roundings of a batch have tipped a sign here and there.
    config = GreedyKashin(rtol=1e-3, max_steps=10, **QUICK)
    basis = make_pair(config.basis, jax.random.key(0), (24, 40))
    factors = decompose_blocks(jnp.asarray(x), basis, config, (24, 40))
    assert factors.u.shape == (2, 2, 24, 40)
    for i in range(2):
        for j in range(2):
            block = jnp.asarray(x[24 * i : 24 * i + 24, 40 * j : 40 * j + 40])
            alone = kashin_decompose(block, basis, rtol=1e-3, max_steps=10)
            own = [np.asarray(leaf)[i, j] for leaf in factors]
            chex.assert_trees_all_close(own, [*alone], rtol=1e-5, atol=1e-5)


def test_one_block_takes_the_same_way_as_a_grid_of_one():
    x, config = jnp.asarray(problems.gaussian(24, 40)), GreedyKashin(max_steps=12)
    basis = make_pair(config.basis, jax.random.key(0), (24, 40))
    whole = decompose_blocks(x, basis, config, (24, 40))
    stacked = decompose_blocks(jnp.concatenate([x, x]), basis, config, (24, 40))
    assert whole.u.shape == (1, 1, 24, 40)
    own = lambda leaves, i: jax.tree.map(lambda leaf: np.asarray(leaf)[i, 0], leaves)
    chex.assert_trees_all_close(own(whole, 0), own(stacked, 1), rtol=1e-4, atol=1e-5)


def test_codes_of_a_blocked_matrix_are_in_the_order_of_the_matrix():
    x, config = problems.gaussian(48, 80), GreedyKashin(bits=6, **QUICK)
    code, decoded = run_kashin(x, config, (24, 20))
    assert code.scale.shape == code.residual.shape == (2, 4)
    assert code.codes.shape == x.shape
    assert relative_error(x, decoded) < 0.13
    basis = make_pair(config.basis, jax.random.key(0), (24, 20))
    factors = decompose_blocks(jnp.asarray(x), basis, config, (24, 20))
    codes, centroids = cluster_factors(factors.u, factors.v, jax.random.key(1), config)
    assert np.array_equal(codes, code.codes)
    u = np.asarray(jax.jit(from_blocks)(factors.u))
    v = np.asarray(jax.jit(from_blocks)(factors.v))
    pairs = np.stack([u, v], axis=-1)[..., None, :] - np.asarray(centroids)
    assert np.array_equal(codes, (pairs.astype(float) ** 2).sum(-1).argmin(-1))


@pytest.mark.parametrize(
    ("rows", "columns", "bm", "bn"),
    [(1, 1, 1, 1), (1, 3, 2, 1), (3, 1, 1, 2), (3, 2, 2, 3)],
)
def test_blocks_round_trip(rows, columns, bm, bn):
    x = np.arange(rows * bm * columns * bn, dtype=np.float32)
    x = x.reshape(rows * bm, columns * bn)
    blocks = jax.jit(to_blocks, static_argnums=1)(x, (bm, bn))
    assert blocks.shape == (rows, columns, bm, bn)
    assert np.array_equal(np.asarray(blocks)[-1, 0], x[-bm:, :bn])
    assert np.array_equal(jax.jit(from_blocks)(blocks), x)


@pytest.mark.parametrize("block_shape", [(5, 8), (4, 3), (0, 8), (-4, 8), (16, 8)])
def test_blocks_that_do_not_divide_the_matrix_are_refused(block_shape):
    with pytest.raises(ValueError, match=r"\(8, 8\) does not divide.*`block_shape`"):
        resolve_block_shape((8, 8), block_shape)
    for shape in ((8,), (0, 8), (2, 2, 2)):
        with pytest.raises(ValueError, match="non-empty matrices"):
            resolve_block_shape(shape, None)
    assert resolve_block_shape((8, 6), None) == (8, 6)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_rtn_errs_by_at_most_half_a_step_and_codes_zero_exactly(bits):
    groups = np.array(problems.student_t(96, 40)).reshape(3, 32, 40)
    groups[0, :, :10] = abs(groups[0, :, :10]) + 1  # ranges that exclude 0
    groups[1, :, :10] = -abs(groups[1, :, :10]) - 1
    groups[:, 5] = 0.0
    groups[2, :, 7] = 0.0
    code = rtn_code(jnp.asarray(groups), bits)
    decoded = np.asarray(decode_affine(code))
    assert np.array_equal(code.zero, np.round(code.zero))
    assert int(code.codes.max()) <= 2**bits - 1
    assert np.array_equal(decoded[groups == 0], np.zeros((groups == 0).sum()))
    # The fp16 step may be short by 2^-11, so the last of 2^bits - 1 steps overshoots.
    half = 0.5 + 2**bits * 2.0**-11
    assert np.all(np.abs(groups - decoded) <= half * np.asarray(code.scale) + 1e-7)
    scale = np.asarray(code.scale)
    assert np.array_equal(scale, scale.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_uniform_equals_min_max_rounding_in_numpy(bits):
    x = problems.outlier_columns(40, 30).astype(np.float64)
    step = (x.max() - x.min()) / (2**bits - 1)
    expected = x.min() + np.round((x - x.min()) / step) * step
    code = minmax_code(jnp.asarray(x, jnp.float32)[None], bits)
    decoded = np.asarray(decode_affine(code))[0]
    moved = np.abs(decoded - expected) > 1e-3 * step
    assert moved.mean() <= 0.002  # only where float32 rounds a tie the other way
    assert np.abs(decoded - x).max() <= 0.5001 * step
    np.testing.assert_allclose([decoded.min(), decoded.max()], [x.min(), x.max()], 1e-5)


@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 1e30, -1e-30])
@pytest.mark.parametrize("bits", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_constant_matrices_survive_uniform_kmeans_and_kashin_exactly(value, bits):
    x = jnp.full((12, 20), value)
    assert np.array_equal(decode_affine(minmax_code(x[None], bits))[0], x)
    book = kmeans_code(x, jax.random.key(0), bits=bits)
    assert np.array_equal(decode_scalars(book), x)
    _, decoded = run_kashin(x, GreedyKashin(bits=bits, **QUICK))
    assert np.array_equal(decoded, x)


def test_nf4_levels_are_those_of_qlora():
    # Appendix E of arXiv 2305.14314, as its authors print them.
    published = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ]  # fmt: skip
    assert np.array_equal(NF4_LEVELS, np.float32(published))


def test_nf4_levels_are_averages_of_normal_quantiles():
    offset = 0.9677083  # (1 - 1/30 + 1 - 1/32) / 2
    above = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    expected = np.sort(np.concatenate([above, [0.0], below])) / above[0]
    np.testing.assert_allclose(NF4_LEVELS, expected, atol=1e-6)


def test_nf4_scales_by_the_largest_entry_and_takes_the_nearest_level():
    groups = problems.student_t(128, 10).reshape(2, 64, 10)
    groups[1, :, 3] = 0.0
    code = nf4_code(jnp.asarray(groups))
    peak = np.abs(groups).max(axis=1, keepdims=True).astype(np.float16)
    assert np.array_equal(code.scale, peak.astype(np.float32))
    unit = groups / np.where(peak > 0, peak, 1).astype(np.float32)
    nearest = np.abs(unit[..., None] - NF4_LEVELS).argmin(-1)
    assert np.array_equal(code.codes, nearest)
    assert not np.asarray(decode_scalars(code))[1, :, 3].any()


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 128])
def test_a_short_last_group_is_filled_without_changing_its_range(rows):
    x = problems.gaussian(rows, 7)
    grouped = jax.jit(group_rows, static_argnums=1)(x, 64)
    assert grouped.shape == (-(-rows // 64), 64, 7)
    back = jax.jit(ungroup_rows, static_argnums=1)(grouped, rows)
    assert np.array_equal(back, x)
    groups = np.asarray(grouped)
    last = x[64 * (groups.shape[0] - 1) :]
    assert np.array_equal(groups[-1].min(0), last.min(0))
    assert np.array_equal(groups[-1].max(0), last.max(0))


@pytest.mark.parametrize(
    ("field", "value"),
    [("bits", 0), ("bits", 9), ("num_restarts", 0), ("sample", 0), ("polish_steps", 0)],
)
def test_settings_that_cannot_work_are_refused(field, value):
    with pytest.raises(ValueError, match=f"`{field}`"):
        GreedyKashin(**{field: value})
