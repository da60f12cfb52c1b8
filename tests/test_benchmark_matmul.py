"""`python -m benchmarks.matmul`: what it records, and that it goes on."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import matmul as benchmark
from benchmarks.blocks import chain, random_layers, random_tensor
from benchmarks.methods import TIMED, method_config
from kashin_jax import encode, matmul, stored_bits
from kashin_jax.tensors.kernels import report

# A whole program on tiny models; its parts have tests of their own.
pytestmark = pytest.mark.slow

KEY = jax.random.key(0)
SHAPES = ((64, 64),) * 4 + ((64, 128), (128, 64))
FLAGS = ["--methods=kashin-joint,rtn-g128", "--bits=4", "--rows=3", "--repeats=1"]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(benchmark, "BLOCKS", {"small": SHAPES})
    monkeypatch.setattr(benchmark, "_STREAMED", (64, 64))


def records(path):
    lines = (path / "bench_matmul.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_rows_have_times_bytes_and_parts_beside_dense_ones(small, tmp_path, capsys):
    assert benchmark.main([*FLAGS, "--nokernel", f"--out={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert "times dense" in printed and "rtn-g128" in printed
    found = records(tmp_path)
    dense = [r for r in found if r["method"].startswith("dense")]
    packed = [r for r in found if r not in dense]
    # Two layouts in two types.
    assert len(dense) == 2 * 2 and len(packed) == 2
    weights = sum(m * n for m, n in SHAPES)
    for r in dense:
        assert r["megabytes"] == pytest.approx(weights * r["bits"] / 8e6)
    for r in packed:
        assert 4 * weights / 8e6 < r["megabytes"] < 6 * weights / 8e6
        fastest = min(
            d["milliseconds"]
            for d in dense
            if (d["rows"], d["bits"]) == (r["rows"], 32)
        )
        assert r["times_dense"] == pytest.approx(r["milliseconds"] / fastest)
        assert r["decode_milliseconds"] > 0


def test_the_kernel_takes_turns_with_dense_products(small, tmp_path, monkeypatch):
    by_kernel = report()._replace(instruction_set="some")
    monkeypatch.setattr(benchmark, "report", lambda: by_kernel)
    flags = ["--noxla", "--seconds=0.01", f"--out={tmp_path}"]
    assert benchmark.main([*FLAGS, *flags]) == 0
    found = records(tmp_path)
    names = ["kashin-joint by kernel", "rtn-g128 by kernel"]
    assert [r["method"] for r in found] == names
    for r in found:
        ratio = r["milliseconds"] / r["dense_milliseconds"]
        assert r["times_dense"] == pytest.approx(ratio)
        assert r["median_milliseconds"] >= r["milliseconds"]


def test_only_what_is_not_recorded_is_measured(small, tmp_path):
    def measured(rows, bits):
        flags = ["--methods=rtn-g128", f"--bits={bits}", f"--rows={rows}"]
        more = ["--repeats=1", "--nobreakdown", "--nokernel", f"--out={tmp_path}"]
        assert benchmark.main([*flags, *more]) == 0
        found = [r for r in records(tmp_path) if "times_dense" in r]
        return [(r["rows"], r["bits"]) for r in found]

    assert measured("1", "4") == [(1, 4)]
    before = (tmp_path / "bench_matmul.jsonl").read_bytes()
    measured("1", "4")
    assert (tmp_path / "bench_matmul.jsonl").read_bytes() == before
    assert measured("1,3", "4") == [(1, 4), (3, 4)]
    assert measured("1,3", "3") == [(1, 4), (3, 4), (1, 3), (3, 3)]


@pytest.mark.parametrize("name", [n for n in TIMED if n != "kashin-haar"])
def test_random_matrices_are_of_the_kind_that_quantizing_gives(name):
    config = method_config(name, 4)
    weight = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    expected, _ = jax.eval_shape(partial(encode, config=config), weight, KEY)
    found = random_tensor((64, 128), config, 0)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert stored_bits(found) == stored_bits(expected)
    assert np.isfinite(found.decode()).all()


def test_layers_of_a_block_wait_for_each_other():
    layers = random_layers(SHAPES, method_config("kashin-joint", 4))
    x = jnp.ones((2, 64))

    def run(tensors):
        return chain(x, tensors, lambda x, tensor: matmul(x, tensor))

    tensors = [layer.tensor for layer in layers]
    whole = run(tensors)
    assert whole.shape == (2, 64) and jnp.isfinite(whole).all()
    for i, tensor in enumerate(tensors):
        changed = [*tensors[:i], tensor.replace(scale=-2 * tensor.scale)]
        assert (run([*changed, *tensors[i + 1 :]]) != whole).any()
