"""The CPU kernel: products with packed codes, as exact as float32 allows.

Guards against codes read at the wrong bit, tables of the wrong rows, sums of padding,
scales of a neighbouring block, and reads beyond what a matrix holds.
"""

import os
from platform import machine

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_matrices import random_tensor, random_words

from kashin_jax import (
    HQQ,
    NF4,
    RTN,
    BasisSpec,
    GreedyKashin,
    JointKashin,
    KMeans,
    Rotated,
    matmul,
    prepare,
)
from kashin_jax.tensors import kernels
from kashin_jax.tensors.kernels import cpu, library
from kashin_jax.tensors.products import ProductOptions

pytestmark = pytest.mark.skipif(
    not os.environ.get("KASHIN_JAX_KERNEL_LIBRARY"), reason="needs a C++ compiler"
)
# Of this architecture, the better ones last; `tests/neon_parity.cc` runs NEON on any.
SETS = {0: "plain", 1: "avx2", 2: "avx512"}
if machine() in ("aarch64", "arm64"):
    SETS = {0: "plain", 3: "neon"}
RIGHT_ONLY = BasisSpec("identity", "hadamard")
LEFT_ONLY = BasisSpec("hadamard", "identity")


def joint(bits, **options):
    return JointKashin(bits=bits, **options)


# (configuration, shape of the matrix, rows of x, type of x): widths x bases x blocks.
JOINT = [
    (joint(4), (128, 320), 1, "float32"),
    (joint(4), (128, 256), 1, "float32"),
    (joint(2), (64, 512), 3, "float32"),
    (joint(2, block_shape=(16, 8)), (32, 256), 3, "float32"),
    (joint(4, basis=LEFT_ONLY), (128, 64), 3, "bfloat16"),
    (joint(4, basis=RIGHT_ONLY), (64, 128), 2, "float32"),
    (joint(4, basis=BasisSpec("haar", "dct")), (64, 64), 7, "float32"),
    (joint(4, block_shape=(16, 256)), (48, 512), 5, "float16"),
    (joint(4, block_shape=(10, 5)), (30, 15), 4, "float32"),
    (joint(4, block_shape=(256, 256)), (256, 256), 37, "float32"),
    (joint(2), (64, 192), 8, "float32"),
    (joint(2, block_shape=(64, 8)), (128, 8), 1, "float32"),
    (joint(2.5), (128, 64), 1, "float32"),
    (joint(2.5, block_shape=(6, 3)), (18, 9), 6, "float32"),
    (joint(3), (64, 320), 9, "float32"),
    (joint(3, block_shape=(24, 20)), (24, 20), 1, "bfloat16"),
    (joint(3.5), (128, 128), 4, "float32"),
    (joint(4.5), (64, 128), 2, "float32"),
    (joint(5), (128, 192), 64, "float32"),
    (joint(5, block_shape=(7, 3)), (21, 33), 3, "float32"),
    # Blocks are decoded.
    (joint(4), (128, 320), 65, "float32"),
    (joint(4, basis=LEFT_ONLY), (64, 64), 70, "float32"),
    (joint(3, basis=RIGHT_ONLY), (64, 128), 150, "float32"),
    (joint(2.5, block_shape=(16, 256)), (32, 512), 150, "float32"),
    (joint(4.5), (128, 64), 33, "bfloat16"),
]
OTHERS = [
    (GreedyKashin(bits=2, block_shape=(64, 64)), (64, 256), 3, "float32"),
    (GreedyKashin(bits=3), (96, 40), 1, "float32"),
    (GreedyKashin(bits=4, block_shape=(32, 32)), (64, 96), 8, "float32"),
    (RTN(bits=2, group_size=12), (44, 21), 2, "float32"),
    (RTN(bits=3, group_size=64), (128, 80), 1, "bfloat16"),
    (HQQ(bits=4, group_size=64), (128, 65), 5, "float32"),
    (NF4(), (128, 128), 8, "float32"),
    (KMeans(bits=3), (96, 33), 4, "float32"),
    (Rotated(RTN(bits=4, group_size=16)), (64, 48), 3, "float32"),
    (GreedyKashin(bits=3, block_shape=(64, 64)), (64, 128), 40, "float32"),
    (RTN(bits=3, group_size=12), (44, 21), 40, "float32"),
    (KMeans(bits=2), (130, 33), 70, "float32"),
]


@pytest.fixture(params=SETS, ids=SETS.get)
def instruction_set(request, monkeypatch):
    """Each of those that this processor has, around no compiled program."""
    best = library.instruction_set()
    if best is None or request.param > best:
        pytest.skip("this processor does not have it")
    monkeypatch.setattr(cpu, "instruction_set", lambda: request.param)
    monkeypatch.setattr(library, "_declined", {})


def activations(rows, inputs, dtype):
    x = np.random.default_rng(rows).normal(size=(rows, inputs))
    return jnp.asarray(x, dtype)


def error(y, x, w):
    """The largest relative error of a row against the product in float64."""
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    norm = np.linalg.norm(exact, axis=1)
    return np.max(np.linalg.norm(np.asarray(y, np.float64) - exact, axis=1) / norm)


def case_id(case):
    config, (m, n), rows, dtype = case
    return f"{config.name}-{config.bits}-{m}x{n}-{rows}-{dtype}"


@pytest.mark.parametrize("case", JOINT, ids=case_id)
def test_joint_codes(case, instruction_set):
    config, shape, rows, dtype = case
    tensor = random_words(config, shape)
    x = activations(rows, shape[0], dtype)
    bases = tensor.derive_bases()
    y = cpu.cpu_kashin_product(x, tensor, bases, ProductOptions())
    assert y.dtype == jnp.float32 and not kernels.report().declined
    assert error(y, x, tensor.decode(bases)) < 1e-6


# Decoded blocks have nothing of their own here, and neither have shapes like others.
TRANSPOSED = [
    *JOINT[:2], *JOINT[5:9], *JOINT[13:17], *JOINT[19:20],
    (GreedyKashin(bits=3), (96, 40), 3, "float32"),
    (joint(3, block_shape=(8, 16)), (48, 2224), 9, "bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize("case", TRANSPOSED, ids=case_id)
def test_products_with_the_transpose(case, instruction_set):
    """Guards against sums of padded columns, and rows of W in another's place."""
    config, shape, rows, dtype = case
    draw = random_words if isinstance(config, JointKashin) else random_tensor
    tensor = draw(config, shape)
    bases = tensor.derive_bases()
    x = activations(rows, shape[1], dtype)
    y = cpu.cpu_kashin_transposed(x, tensor, bases, ProductOptions())
    assert y.dtype == jnp.float32 and not kernels.report().declined
    assert error(y, x, np.asarray(tensor.decode(bases)).T) < 1e-6


def test_a_tied_head_calls_the_kernel_and_has_gradients(packed):
    x = activations(3, 64, "float32")
    assert is_called(lambda x, q: q.transposed_product(x), x, packed)
    w = packed.tensor.decode()
    slope = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(packed.transposed_product(x)))))
    exact = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(x @ w.T))))
    scale = np.abs(exact(x)).max()
    np.testing.assert_allclose(slope(x), exact(x), atol=1e-4 * scale)


@pytest.mark.parametrize("case", OTHERS, ids=case_id)
def test_general_pairs_and_grids(case, instruction_set):
    config, shape, rows, dtype = case
    tensor = random_tensor(config, shape)
    if getattr(tensor, "levels", None) is not None:
        # Of either sign, as levels are: sums of positive ones may cancel altogether.
        tensor = tensor.replace(levels=tensor.levels - 1)
    x = activations(rows, shape[0], dtype)
    bases = tensor.derive_bases()
    is_kashin = isinstance(config, GreedyKashin)
    product = cpu.cpu_kashin_product if is_kashin else cpu.cpu_grouped_product
    y = product(x, tensor, bases, ProductOptions())
    assert not kernels.report().declined
    assert error(y, x, tensor.decode(bases)) < 1e-6


@pytest.fixture(scope="module")
def packed():
    return prepare(random_words(joint(4), (128, 64)))


def is_called(function, *arguments):
    return library.TARGET in jax.jit(function).lower(*arguments).as_text()


def test_products_by_operator_call_the_kernel(packed):
    x = activations(3, 128, "float32")
    assert is_called(lambda x, q: x @ q, x, packed)
    # What is given explicitly is about XLA's ways.
    assert not is_called(lambda x, q: matmul(x, q, max_tile=512), x, packed)
    short = prepare(random_words(joint(4, block_shape=(64, 8)), (128, 64)))
    assert not is_called(lambda x, q: x @ q, activations(65, 128, "float32"), short)
    declined = kernels.report().declined
    assert any("more than 64 rows" in reason for reason in declined)
    assert kernels.report().instruction_set in SETS.values()


def test_no_rows_give_no_rows(packed):
    assert (jnp.zeros((0, 128)) @ packed).shape == (0, 64)


def test_gradients_are_those_of_the_decoded_matrix(packed):
    x, tensor = activations(3, 128, "float32"), packed.tensor

    def by_kernel(x, scale, centroids):
        q = tensor.replace(scale=scale, centroids=centroids)
        return jnp.sum(jnp.sin(matmul(x, q)))

    def decoded(x, scale, centroids):
        w = tensor.replace(scale=scale, centroids=centroids).decode()
        return jnp.sum(jnp.sin(jnp.matmul(x, w, precision="highest")))

    at = x, tensor.scale, tensor.centroids
    found = jax.jit(jax.grad(by_kernel, argnums=(0, 1, 2)))(*at)
    exact = jax.jit(jax.grad(decoded, argnums=(0, 1, 2)))(*at)
    for own, other in zip(found, exact, strict=True):
        np.testing.assert_allclose(own, other, atol=1e-4 * np.abs(other).max())
    # Forward, too.
    _, slope = jax.jvp(lambda x: x @ packed, (x,), (2 * x,))
    np.testing.assert_allclose(slope, 2 * (x @ packed), rtol=1e-4, atol=1e-3)


def test_maps_over_x_are_one_call_and_stacks_are_many(packed):
    x = (
        jnp.stack([activations(2, 128, "float32")] * 3)
        * jnp.arange(1.0, 4)[:, None, None]
    )
    expected = jnp.stack([each @ packed for each in x])
    np.testing.assert_allclose(jax.vmap(lambda x: x @ packed)(x), expected, rtol=1e-6)
    mapped = jax.make_jaxpr(jax.vmap(lambda x: x @ packed))(x)
    assert "scan" not in str(mapped).split("ffi_call")[0].rsplit("custom_vmap", 1)[-1]
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), packed.tensor)
    by_map = jax.jit(jax.vmap(lambda x, q: x @ q))(x, stack)
    np.testing.assert_allclose(by_map, expected, rtol=1e-5, atol=1e-4)
    _, by_scan = jax.lax.scan(lambda c, each: (c, each[0] @ each[1]), 0, (x, stack))
    np.testing.assert_allclose(by_scan, expected, rtol=1e-5, atol=1e-4)


def test_a_program_for_other_platforms_has_no_kernel(packed):
    traced = jax.jit(lambda x, q: x @ q).trace(activations(3, 128, "float32"), packed)
    for platform, is_there in (("cpu", True), ("tpu", False), ("cuda", False)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert (library.TARGET in text) == is_there


def test_among_several_devices_xla_divides_the_product(packed, monkeypatch):
    """A call of the kernel cannot be divided: its inputs would be gathered."""
    x = activations(5, 128, "float32")
    monkeypatch.setattr(jax, "device_count", lambda *platform: 2)
    # Of what can be cut the parts are multiplied by it, see `test_cut_matrices.py`.
    monkeypatch.setattr(type(packed.tensor), "cuts", lambda self: (1, 1))
    assert not is_called(lambda x, q: x @ q + 1, x, packed)
    mesh = jax.make_mesh((1,), ("d",))
    rows, all_of_it = jax.sharding.PartitionSpec("d"), jax.sharding.PartitionSpec()
    product = jax.shard_map(
        lambda x, q: x @ q, mesh=mesh, in_specs=(rows, all_of_it), out_specs=rows
    )
    x = jax.device_put(x, jax.sharding.NamedSharding(mesh, rows))
    assert is_called(product, x, packed)
    y = jax.jit(product)(x, packed)
    assert error(y, x, packed.decode()) < 1e-6


GOOD = {
    "x": (1, 2, 16), "codes": 16 * 8 // 2, "coarse": 0, "scale": (2, 1), "u": 4, "v": 4,
    "signs": (8, 8, 8, 8), "y": (1, 2, 8), "bits": 4, "v_bits": 2, "block_height": 8,
    "instruction_set": 0, "way": 0,
}  # fmt: skip


def call(**changes):
    given = GOOD | changes
    inputs = [
        jnp.ones(given["x"]), jnp.zeros(given["codes"], jnp.uint8),
        jnp.zeros(given["coarse"], jnp.uint8), jnp.ones(given["scale"]),
        jnp.ones(given["u"]), jnp.ones(given["v"]),
        *(jnp.ones(size, jnp.int8) for size in given["signs"]),
    ]  # fmt: skip
    names = ("bits", "v_bits", "block_height", "instruction_set", "way")
    result = jax.ShapeDtypeStruct(given["y"], jnp.float32)
    attributes = {name: np.int64(given[name]) for name in names}
    return jax.ffi.ffi_call(library.TARGET, result)(*inputs, **attributes)


def test_calls_that_fit_are_answered():
    assert library.instruction_set() is not None
    assert call().shape == (1, 2, 8)
    assert call(x=(1, 0, 16), y=(1, 0, 8)).shape == (1, 0, 8)
    assert call(y=(1, 2, 0), codes=0).shape == (1, 2, 0)
    assert call(way=2, x=(1, 2, 8), y=(1, 2, 16)).shape == (1, 2, 16)
    # Nothing to add up.
    empty = call(x=(1, 2, 0), codes=0, scale=(0, 1))
    np.testing.assert_array_equal(empty, np.zeros((1, 2, 8)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": 63}, "fewer codes than weights"),
        ({"y": (1, 2, 16), "scale": (2, 1)}, "fewer codes"),
        ({"coarse": 5, "u": 6}, "fewer codes than weights"),
        ({"bits": 6}, "levels do not fit"),
        ({"bits": -1}, "levels do not fit"),
        ({"v_bits": 4}, "levels do not fit"),
        ({"u": 3}, "levels do not fit"),
        ({"v": 3}, "levels do not fit"),
        ({"coarse": 64, "u": 5}, "levels do not fit"),
        ({"block_height": 0}, "scales do not fit"),
        ({"block_height": -8}, "scales do not fit"),
        ({"block_height": 2**62}, "scales do not fit"),
        ({"scale": (2, 3)}, "scales do not fit"),
        ({"scale": (2, 0)}, "scales do not fit"),
        ({"scale": (3, 1)}, "scales do not fit"),
        ({"signs": (7, 8, 8, 8)}, "signs of the bases"),
        ({"signs": (8, 8, 8, 4)}, "signs of the bases"),
        ({"x": (3, 2, 16)}, "do not fit each other"),
        ({"x": (1, 3, 16)}, "do not fit each other"),
        ({"x": (2, 16)}, "axes"),
        ({"instruction_set": 7}, "instruction set"),
        ({"way": 1}, "not decoded"),
        (
            {
                "way": 2,
                "x": (1, 2, 8),
                "y": (1, 2, 16),
                "bits": 5,
                "v_bits": 0,
                "v": 0,
                "u": 32,
                "codes": 80,
                "signs": (0, 0, 0, 0),
            },
            "no look-ups",
        ),
        ({"way": 2, "x": (1, 2, 8), "y": (1, 3, 16)}, "do not fit each other"),
        ({"way": 2, "x": (1, 2, 8), "y": (1, 2, 16), "codes": 63}, "fewer codes"),
        ({"way": 2, "x": (1, 2, 16), "y": (1, 2, 8)}, "scales do not fit"),
        ({"v_bits": 1, "u": 8}, ""),
    ],
)
def test_calls_that_do_not_fit_are_refused(changes, message):
    """Guards against reading beyond a buffer whatever a caller says it holds."""
    assert library.instruction_set() is not None
    if not message:
        assert call(**changes).shape == (1, 2, 8)
        return
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(call(**changes))
