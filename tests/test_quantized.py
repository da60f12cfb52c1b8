"""`quantize`, `KashinTensor` and the controls' tensors, against plain NumPy."""

import dataclasses
import inspect
import json
import math
import re
import sys
from functools import lru_cache
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from kashin_jax import (
    HQQ,
    NF4,
    RTN,
    BasisSpec,
    GreedyKashin,
    KashinTensor,
    KMeans,
    Rotated,
    Uniform,
    bits_per_weight,
    dequantize,
    encode,
    matmul,
    quantize,
    stored_bits,
)
from kashin_jax.bases import key_from_seed, make_pair
from kashin_jax.errors import NonFiniteError
from kashin_jax.tensors.codebook import NF4_LEVELS
from kashin_jax.tensors.kashin import KashinLayout

GOLDEN = Path(__file__).parent / "golden" / "quantized" / "golden.json"
KEY = jax.random.key(5)
FAST = {"num_restarts": 1, "sample": 256, "codebook_steps": 10, "polish_steps": 2}
# One bit: two centroids compile quickest.
SMALL = GreedyKashin(bits=1, **FAST)
# Odd shapes, single rows and columns, blocks, one-sided pairs.
CASES = [
    ((16, 24), (8, 12), 2, "hadamard:identity"),
    ((15, 1), (5, 1), 3, "haar"),
    pytest.param(((7, 13), None, 8, "hadamard"), marks=pytest.mark.slow),
    pytest.param(((1, 9), None, 1, "sign-dct"), marks=pytest.mark.slow),
]


def weight(shape, seed=0):
    # Student's t: heavy tails, as trained weights have. NumPy's needs no compiling.
    drawn = np.random.default_rng(seed).standard_t(4, shape)
    return jnp.asarray(drawn, jnp.float32)


@lru_cache
def quantized(shape, block_shape, bits, basis):
    config = GreedyKashin(
        bits=bits, basis=BasisSpec.parse(basis), block_shape=block_shape, **FAST
    )
    return quantize(weight(shape), config, KEY)


def unpack(packed, bits, count):
    stream = np.unpackbits(np.asarray(packed), bitorder="little")
    return stream[: count * bits].reshape(count, bits) @ (1 << np.arange(bits))


@jax.jit
def images(side, unit):
    return side.synthesis(unit, axis=0)


def dense(side, n):
    """Q as a float64 matrix, column by column."""
    return np.asarray(images(side, jnp.eye(n)), np.float64)


def decode_by_hand(q):
    (m, n), (bm, bn) = q.layout.shape, q.layout.block_shape
    codes = unpack(q.packed_codes, q.layout.bits, m * n).reshape(m, n)
    pairs = np.asarray(q.centroids, np.float64)[codes]
    basis = q.derive_bases().basis
    q1, q2 = dense(basis.left, bm), dense(basis.right, bn)
    decoded = np.zeros((m, n))
    for r in range(m // bm):
        for c in range(n // bn):
            part = np.s_[r * bm : (r + 1) * bm, c * bn : (c + 1) * bn]
            u, v = np.moveaxis(pairs[part], -1, 0) * float(q.scale[r, c])
            decoded[part] = u + q1 @ v @ q2.T
    return decoded


def relative(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def stored(packed, centroids, scale, seed, **layout):
    """A tensor from plain numbers, as read from a file."""
    layout["basis"] = BasisSpec.parse(layout["basis"])
    for name in ("shape", "block_shape"):
        layout[name] = tuple(layout[name])
    return KashinTensor(
        jnp.array(packed, jnp.uint8),
        jnp.array(centroids, jnp.float32),
        jnp.array(scale, jnp.float32),
        jnp.array(seed, jnp.uint32),
        KashinLayout(**layout, dtype="float32"),
    )


def codes_of(q):
    return np.asarray(q.packed_codes).tobytes()


@pytest.mark.parametrize("case", CASES)
def test_decoding_agrees_with_numpy(case):
    q, _ = quantized(*case)
    assert relative(dequantize(q), decode_by_hand(q)) < 2e-6


@pytest.mark.parametrize("case", CASES)
def test_reported_error_is_the_error_of_the_decoded_matrix(case):
    q, report = quantized(*case)
    w = np.asarray(weight(case[0]), np.float64)
    error = np.sum((w - decode_by_hand(q)) ** 2) / np.sum(w**2)
    np.testing.assert_allclose(
        report.relative_squared_error, error, rtol=1e-4, atol=1e-12
    )


@pytest.mark.parametrize("case", CASES)
def test_stored_bits_are_codes_pairs_scales_and_seed(case):
    q, report = quantized(*case)
    shape, block_shape, bits, _ = case
    size = math.prod(shape)
    blocks = size // math.prod(block_shape or shape)
    expected = math.ceil(size * bits / 8) * 8 + 2 * 2**bits * 32 + 32 * blocks + 64
    assert stored_bits(q) == expected
    assert bits_per_weight(q) == expected / size
    assert q.centroids.shape == (2**bits, 2)
    assert report.decomposition["residual"].size == blocks


@pytest.mark.parametrize(
    ("bits", "basis", "shape", "block_shape"),
    [
        *((bits, "hadamard", (12, 15), (4, 5)) for bits in range(1, 9)),
        (3, "identity:haar", (12, 15), (4, 5)),
        (2, "hadamard", (7, 13), (7, 13)),
        (1, "sign-dct", (1, 9), (1, 9)),
    ],
)
def test_every_width_decodes_as_in_numpy(bits, basis, shape, block_shape):
    rng = np.random.default_rng(bits)
    grid = shape[0] // block_shape[0], shape[1] // block_shape[1]
    q = stored(
        rng.integers(0, 256, math.ceil(math.prod(shape) * bits / 8)),
        rng.normal(size=(2**bits, 2)),
        rng.uniform(0.5, 2, grid),
        (3, 5),
        shape=shape,
        block_shape=block_shape,
        bits=bits,
        basis=basis,
    )
    assert relative(dequantize(q), decode_by_hand(q)) < 2e-6


def test_tensors_pass_through_jit_and_tree_map():
    q, _ = quantized((16, 24), None, 1, "hadamard")
    same = jax.jit(lambda tensor: jax.tree.map(lambda leaf: leaf, tensor))(q)
    assert same.layout == q.layout
    chex.assert_trees_all_equal(same, q, strict=True)
    np.testing.assert_allclose(
        jax.jit(dequantize)(q), dequantize(q), rtol=1e-5, atol=1e-6
    )


@pytest.mark.slow
@pytest.mark.optimized  # compares fits that end by a tolerance
def test_stacked_tensors_decode_under_vmap_and_scan():
    w = weight((16, 24))
    keys = jax.random.split(KEY, 3)
    stacked, reports = jax.vmap(lambda key: encode(w, key, SMALL))(keys)
    one_by_one = jnp.stack([dequantize(encode(w, key, SMALL)[0]) for key in keys])
    assert len({np.asarray(seed).tobytes() for seed in stacked.seed}) == 3
    assert reports.relative_squared_error.shape == (3,)
    assert relative(jax.vmap(dequantize)(stacked), one_by_one) < 1e-5
    _, scanned = jax.lax.scan(lambda carry, q: (carry, dequantize(q)), None, stacked)
    assert relative(scanned, one_by_one) < 1e-5


def test_tensors_can_be_donated():
    q = jax.tree.map(np.array, quantized((16, 24), None, 1, "hadamard")[0])
    q = jax.tree.map(jnp.array, q)
    expected = 2 * np.asarray(dequantize(q))
    double = jax.jit(lambda t: t.replace(scale=2 * t.scale), donate_argnums=0)
    doubled = double(q)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(q))
    np.testing.assert_allclose(dequantize(doubled), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [SMALL, RTN()],
)
def test_eval_shape_has_the_structure_of_a_real_call(config):
    def run(w):
        return encode(w, KEY, config)

    def kinds(tree):
        return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]

    w = weight((16, 24))
    real, abstract = run(w), jax.eval_shape(run, w)
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    assert kinds(abstract) == kinds(real)


@pytest.mark.parametrize("config", [SMALL, RTN(), NF4()])
def test_bits_per_weight_equals_bytes_on_disk(config, tmp_path):
    q, _ = quantize(weight((16, 24)), config, KEY)
    named = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(q))}
    path = tmp_path / "q.safetensors"
    safetensors.numpy.save_file(named, path)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert 8 * (path.stat().st_size - 8 - header) == stored_bits(q)
    restored = safetensors.numpy.load_file(path)
    assert all(np.array_equal(restored[name], named[name]) for name in named)


@pytest.mark.parametrize(
    "config", [RTN(), dataclasses.replace(SMALL, block_shape=(4, 8))]
)
def test_a_second_matrix_of_a_shape_compiles_nothing(config, caplog):
    def use(seed):
        q, report = quantize(weight((8, 16), seed), config, jax.random.key(seed))
        x = jnp.asarray(np.ones((2, 8), np.float32))
        return report, q.decode(), dequantize(q), matmul(x, q)

    use(0)
    with jax.log_compiles(), caplog.at_level("DEBUG"):
        use(1)
    assert not [r for r in caplog.records if "Compiling" in r.getMessage()]


def test_limits_of_the_decomposition_do_not_recompile_it(caplog):
    w = weight((8, 16))
    quantize(w, SMALL, KEY)
    with jax.log_compiles(), caplog.at_level("DEBUG"):
        for changes in ({"rtol": 0.1}, {"max_steps": 3}, {"codebook_steps": 4}):
            quantize(w, dataclasses.replace(SMALL, **changes), KEY)
    assert not [r for r in caplog.records if "Compiling" in r.getMessage()]


def test_a_matrix_that_does_not_converge_is_still_packed():
    config = dataclasses.replace(SMALL, max_steps=3)
    basis = quantize(weight((16, 24)), config, KEY)[0].derive_bases().basis
    # The rank-one matrix e_i (Q2 e_j)^T is hard for its own pair of bases.
    w = np.zeros((16, 24), np.float32)
    w[2] = images(basis.right, jnp.eye(24))[:, 4]
    q, report = quantize(w, config, KEY)
    assert isinstance(q, KashinTensor)
    assert not report.decomposition["converged"].any()
    assert int(report.decomposition["num_steps"].max()) == 3
    assert report.decomposition["residual"].min() > config.rtol
    assert stored_bits(q) == 16 * 24 + 2 * 2 * 32 + 32 + 64
    error = relative(decode_by_hand(q), w) ** 2
    np.testing.assert_allclose(report.relative_squared_error, error, rtol=1e-4)


METHODS = [SMALL, RTN(), NF4(), Uniform(), KMeans(bits=1)]


@pytest.mark.parametrize("config", [*METHODS, Rotated(KMeans(bits=1))])
def test_a_zero_matrix_is_stored_exactly(config):
    q, report = quantize(jnp.zeros((16, 24)), config, KEY)
    assert report.relative_squared_error == 0
    assert not dequantize(q).any()


@pytest.mark.parametrize("config", METHODS)
def test_a_constant_matrix_is_decoded_to_finite_numbers(config):
    w = jnp.full((16, 24), -0.37)
    q, report = quantize(w, config, KEY)
    assert np.isfinite(dequantize(q)).all()
    error = relative(dequantize(q), w) ** 2
    np.testing.assert_allclose(
        report.relative_squared_error, error, rtol=1e-3, atol=1e-9
    )
    assert error < 0.25


@pytest.mark.parametrize("power", [-100, 100])
@pytest.mark.parametrize("config", [SMALL, Uniform(), KMeans(bits=1)])
def test_scaling_the_matrix_leaves_its_codes_alone(config, power):
    w = weight((16, 24))
    q, report = quantize(w, config, KEY)
    scaled, scaled_report = quantize(w * 2.0**power, config, KEY)
    assert codes_of(scaled) == codes_of(q)
    np.testing.assert_allclose(
        scaled_report.relative_squared_error, report.relative_squared_error, rtol=1e-5
    )
    np.testing.assert_allclose(
        dequantize(scaled) * 2.0**-power, dequantize(q), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_huge_and_tiny_weights_keep_their_relative_error(size):
    w = weight((16, 24))
    _, report = quantize(w, SMALL, KEY)
    q, scaled = quantize(w * size, SMALL, KEY)
    assert np.isfinite(dequantize(q)).all()
    np.testing.assert_allclose(
        scaled.relative_squared_error, report.relative_squared_error, rtol=0.05
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("config", [SMALL, RTN(), NF4()])
def test_half_precision_is_quantized_as_its_float32_values(config, dtype):
    w = weight((16, 24)).astype(dtype)
    q, _ = quantize(w, config, KEY)
    single, _ = quantize(w.astype(jnp.float32), config, KEY)
    assert codes_of(q) == codes_of(single)
    assert q.dtype == jnp.dtype(dtype)
    assert dequantize(q).dtype == dtype
    assert dequantize(q, jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("config", [SMALL, NF4()])
def test_nan_and_infinity_are_refused_before_tracing(config, bad, monkeypatch):
    def traced(*args):
        raise AssertionError("traced")

    monkeypatch.setattr(sys.modules["kashin_jax.methods.quantize"], "encode", traced)
    w = weight((16, 24)).at[3, 4].set(bad)
    with pytest.raises(NonFiniteError, match=r"`decoder/fc1` holds 1 NaN .* of 384"):
        quantize(w, config, KEY, path="decoder/fc1")


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"`fc1` has type int32; cast it"):
        quantize(jnp.ones((4, 4), jnp.int32), SMALL, KEY, path="fc1")


@pytest.mark.parametrize("config", [SMALL, RTN()])
@pytest.mark.parametrize("shape", [(8,), (2, 3, 4), (0, 4), (4, 0)])
def test_only_non_empty_matrices_are_accepted(config, shape):
    # Without the run-time checker of the tests, as users call it.
    call = inspect.unwrap(quantize)
    with pytest.raises(ValueError, match=rf"`fc1`: .*{re.escape(str(shape))}"):
        call(jnp.ones(shape), config, KEY, path="fc1")


def test_blocks_must_divide_the_matrix():
    config = dataclasses.replace(SMALL, block_shape=(5, 8))
    with pytest.raises(ValueError, match=r"`fc1`: .*\(16, 24\).*\(5, 8\)"):
        quantize(weight((16, 24)), config, KEY, path="fc1")


@pytest.mark.parametrize("config", [RTN(), NF4()])
def test_weights_too_large_for_half_precision_scales_are_refused(config):
    with pytest.raises(NonFiniteError, match=r"`fc1` reaches \S+e\+30.* Rescale it"):
        quantize(weight((16, 24)) * 1e30, config, KEY, path="fc1")


@pytest.mark.parametrize("bits", [0, 9])
@pytest.mark.parametrize("config", [GreedyKashin, RTN, Uniform, KMeans])
def test_bits_lie_between_one_and_eight(config, bits):
    with pytest.raises(ValueError, match=rf"`bits` must lie in \[1, 8\].*bits={bits}"):
        config(bits=bits)


def test_nf4_exists_at_four_bits_only():
    with pytest.raises(ValueError, match=r"NF4 exists at 4 bits only. Got bits=3"):
        NF4(bits=3)


def ungrouped(scale, rows, size):
    return np.repeat(np.asarray(scale, np.float64)[:, 0, :], size, axis=0)[:rows]


def codes_by_hand(q):
    bits, shape = q.layout.bits, q.layout.shape
    return unpack(q.packed_codes, bits, math.prod(shape)).reshape(shape)


@pytest.mark.parametrize(("rows", "bits"), [(256, 4), (200, 3)])
def test_rtn_stores_and_decodes_groups_of_128(rows, bits):
    w = weight((rows, 6))
    q, report = quantize(w, RTN(bits=bits, group_size=128), KEY)
    zero = unpack(q.zero, bits, q.scale.size).reshape(q.scale.shape)
    steps = ungrouped(q.scale, rows, 128)
    by_hand = steps * (codes_by_hand(q) - ungrouped(zero, rows, 128))
    assert relative(dequantize(q), by_hand) < 1e-6
    # Half a step, and another half where the whole zero point shifts the range.
    assert (np.abs(by_hand - np.asarray(w)) <= steps * 1.01).all()
    scales = math.ceil(rows / 128) * 6
    expected = [math.ceil(rows * 6 * bits / 8) * 8, 16 * scales]
    expected.append(math.ceil(scales * bits / 8) * 8)
    assert stored_bits(q) == sum(expected)
    error = relative(by_hand, w) ** 2
    np.testing.assert_allclose(report.relative_squared_error, error, rtol=1e-4)


def test_published_sizes_of_rtn_and_nf4():
    w = weight((256, 8))
    rtn, _ = quantize(w, RTN(bits=4, group_size=128), KEY)
    nf4, _ = quantize(w, NF4(group_size=64), KEY)
    assert bits_per_weight(rtn) == 4 + 20 / 128
    assert bits_per_weight(nf4) == 4.25


@pytest.mark.parametrize("rows", [128, 70])
def test_nf4_stores_and_decodes_groups_of_64(rows):
    q, _ = quantize(weight((rows, 6)), NF4(), KEY)
    by_hand = NF4_LEVELS.astype(np.float64)[codes_by_hand(q)]
    by_hand *= ungrouped(q.scale, rows, 64)
    assert relative(dequantize(q), by_hand) < 1e-6
    assert stored_bits(q) == rows * 6 * 4 + math.ceil(rows / 64) * 6 * 16


def test_one_scale_per_tensor_is_stored_in_single_precision():
    w = weight((16, 24))
    uniform, _ = quantize(w, Uniform(bits=3), KEY)
    kmeans, _ = quantize(w, KMeans(bits=1), KEY)
    rotated, _ = quantize(w, Rotated(KMeans(bits=1)), KEY)
    assert stored_bits(uniform) == 16 * 24 * 3 + 64
    assert stored_bits(kmeans) == 16 * 24 + 2 * 32 + 32
    assert stored_bits(rotated) == 16 * 24 + 2 * 32 + 32 + 64


def test_the_controls_per_tensor_decode_as_in_numpy():
    w = weight((16, 24))
    uniform, _ = quantize(w, Uniform(bits=3), KEY)
    by_hand = float(uniform.scale[0, 0, 0]) * (
        codes_by_hand(uniform) - float(uniform.zero[0, 0, 0])
    )
    assert relative(dequantize(uniform), by_hand) < 1e-6
    for config in (KMeans(bits=1), Rotated(KMeans(bits=1))):
        q, _ = quantize(w, config, KEY)
        by_hand = np.asarray(q.levels, np.float64)[codes_by_hand(q)] * float(
            q.scale[0, 0, 0]
        )
        if q.seed is not None:
            pair = make_pair(q.layout.basis, key_from_seed(q.seed), q.shape)
            by_hand = dense(pair.left, 16) @ by_hand @ dense(pair.right, 24).T
        assert relative(dequantize(q), by_hand) < 2e-6


def test_rotated_kmeans_shares_its_rotation_with_the_kashin_row():
    w = weight((16, 24))
    rotated, _ = quantize(w, Rotated(KMeans(bits=1)), KEY)
    kashin, _ = quantize(w, SMALL, KEY)
    assert (rotated.seed == kashin.seed).all()


# The last ones: `optimized` drops the programs of the others.
def golden_tensor(**changes):
    golden = json.loads(GOLDEN.read_text()) | changes
    leaves = [golden.pop(name) for name in ("packed_codes", "centroids")]
    leaves += [golden.pop(name) for name in ("scale", "seed")]
    decoded = golden.pop("decoded")
    return stored(*leaves, **golden), decoded


@pytest.mark.optimized
def test_a_stored_matrix_decodes_as_it_always_has():
    q, decoded = golden_tensor()
    assert relative(dequantize(q), decoded) < 1e-6


@pytest.mark.optimized
@pytest.mark.parametrize("family", ["hadamard", "haar", "sign-dct"])
def test_a_stored_matrix_decodes_alike_in_x64_mode(family):
    q, _ = golden_tensor(basis=family)
    expected = dequantize(q)
    with jax.enable_x64(True):
        assert relative(dequantize(q), expected) < 1e-5


@pytest.mark.optimized
def test_the_same_key_gives_the_same_bytes_eagerly_and_under_jit():
    w = weight((16, 24))
    eager, _ = encode(w, KEY, SMALL)
    again, _ = quantize(w, SMALL, KEY)
    jitted, _ = jax.jit(lambda w, key: encode(w, key, SMALL))(w, KEY)
    chex.assert_trees_all_equal(again, eager, strict=True)
    assert codes_of(jitted) == codes_of(eager)
    assert jitted.layout == eager.layout and (jitted.seed == eager.seed).all()
    other, _ = encode(w, jax.random.key(6), SMALL)
    assert codes_of(other) != codes_of(eager)


@pytest.mark.parametrize("config", [RTN(group_size=16), NF4(group_size=16), HQQ()])
def test_weights_below_half_precision_scales_are_refused(config):
    """Their steps are 0 in float16, and all of the matrix was lost in silence."""
    with pytest.raises(ValueError, match=r"`fc` reaches .*e-0[89] only, too little"):
        quantize(1e-9 * weight((64, 32)), config, KEY, path="fc")


@pytest.mark.parametrize("config", [RTN(group_size=16), GreedyKashin(num_restarts=1)])
def test_a_matrix_of_denormal_numbers_is_reported_as_lost(config):
    """XLA takes them for zeros, and an error of 0 was reported."""
    tiny = np.full((16, 24), 1e-39, np.float32)
    _, report = quantize(tiny, config, KEY)
    assert report.relative_squared_error == 1
    _, report = quantize(np.zeros((16, 24), np.float32), config, KEY)
    assert report.relative_squared_error == 0
