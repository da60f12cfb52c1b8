"""`python -m benchmarks.matmul`: what it records, and that it goes on."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import matmul as benchmark
from benchmarks.blocks import chain, random_layers, random_tensor
from benchmarks.methods import TIMED, method_config
from kashin_jax import matmul, quantize, stored_bits

SHAPES = ((64, 64),) * 4 + ((64, 128), (128, 64))
FLAGS = ["--methods=kashin-joint,rtn-g128", "--bits=4", "--rows=1,3", "--repeats=1"]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(benchmark, "BLOCKS", {"small": SHAPES})
    monkeypatch.setattr(benchmark, "_STREAMED", (64, 64))


def records(path):
    lines = (path / "bench_matmul.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_rows_have_times_bytes_and_parts_beside_dense_ones(small, tmp_path, capsys):
    assert benchmark.main([*FLAGS, f"--out={tmp_path}"]) == 0
    found = records(tmp_path)
    dense = [r for r in found if r["method"].startswith("dense")]
    packed = [r for r in found if r not in dense]
    # Two layouts in two types.
    assert len(dense) == 2 * 2 * 2 and len(packed) == 2 * 2
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
    printed = capsys.readouterr().out
    assert "times dense" in printed and "rtn-g128" in printed


def test_what_is_recorded_is_not_measured_again(small, tmp_path):
    benchmark.main([*FLAGS, f"--out={tmp_path}"])
    before = (tmp_path / "bench_matmul.jsonl").read_bytes()
    benchmark.main([*FLAGS, f"--out={tmp_path}"])
    assert (tmp_path / "bench_matmul.jsonl").read_bytes() == before
    benchmark.main([*FLAGS[:1], "--bits=3", *FLAGS[2:], f"--out={tmp_path}"])
    after = records(tmp_path)
    assert [r["bits"] for r in after if "times_dense" in r] == [4] * 4 + [3] * 4


def test_only_the_rows_that_are_missing_are_measured(small, tmp_path):
    flags = ["--methods=rtn-g128", "--bits=4", "--repeats=1", "--nobreakdown"]
    for rows in ("1", "1,3"):
        benchmark.main([*flags, f"--rows={rows}", f"--out={tmp_path}"])
    assert [r["rows"] for r in records(tmp_path) if "times_dense" in r] == [1, 3]


@pytest.mark.parametrize("name", [n for n in TIMED if n != "kashin-haar"])
def test_random_matrices_are_of_the_kind_that_quantizing_gives(name):
    config = method_config(name, 4)
    weight = jax.random.normal(jax.random.key(0), (64, 128))
    found, expected = random_tensor((64, 128), config, 0), quantize(weight, config)[0]
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
        changed = [*tensors[:i], tensor._replace(scale=-2 * tensor.scale)]
        assert (run([*changed, *tensors[i + 1 :]]) != whole).any()
