"""Memory is bounded by the largest quantized matrix, whatever the checkpoint's size.

Measured is anonymous memory (RssAnon): pages of mapped files are the system's to drop.
"""

import sys

import numpy as np
import pytest

from benchmarks.layouts import LAYOUTS, Layout
from benchmarks.streaming import StreamingConfig, main, measure, write_checkpoint
from experiments.common.results import read_jsonl
from kashin_jax.io import open_checkpoint

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the memory of a process is measured on Linux only"
)
WIDTH = 4096
# 500 MB that are copied, and matrices of 64 MiB in float32.
LARGE = Layout(
    {
        "model.embed_tokens.weight": (61_000, WIDTH),
        "model.layers.0.mlp.up_proj.weight": (WIDTH, WIDTH),
        "model.layers.0.mlp.down_proj.weight": (WIDTH, WIDTH),
    },
    {"model_type": "llama"},
)


@pytest.mark.slow
def test_memory_is_at_most_ten_times_the_largest_quantized_matrix(tmp_path):
    rules = StreamingConfig(method="rtn", bits=4.0).rules()
    bare = measure(tmp_path / "bare", LAYOUTS["bare"], rules)
    found = measure(tmp_path / "large", LARGE, rules)
    assert found["largest_quantized_float32"] == 4 * WIDTH**2
    assert found["largest_copied"] > 7 * found["largest_quantized_float32"]
    above = found["peak_bytes"] - bare["peak_bytes"]
    assert 0 < above <= 10 * found["largest_quantized_float32"]
    assert found["quantized_weights"] == 2 * WIDTH**2
    assert 4 < found["bits_per_weight"] < 4.2


@pytest.mark.slow
def test_the_benchmark_adds_a_record(tmp_path, capsys):
    flags = [
        "--layout=bare",
        f"--work={tmp_path / 'work'}",
        f"--out={tmp_path / 'out'}",
    ]
    assert main(flags) == 0
    (record,) = read_jsonl(tmp_path / "out" / "bench_streaming.jsonl")
    assert (record["layout"], record["method"]) == ("bare", "rtn")
    assert record["quantized_weights"] == 4 * 128**2
    assert "peak_bytes_above_bare" in capsys.readouterr().out
    assert list((tmp_path / "work").iterdir()) == []


def test_random_checkpoints_are_the_same_every_time(tmp_path):
    for name in "ab":
        write_checkpoint(tmp_path / name, LAYOUTS["bare"])
    a, b = (open_checkpoint(tmp_path / name) for name in "ab")
    assert a.sha256 == b.sha256
    one, other = (a.load(f"model.layers.0.self_attn.{x}_proj.weight") for x in "qk")
    assert one.dtype == np.float16 and not np.array_equal(one, other)
    assert abs(one.std() - 0.02) < 1e-3


def test_layouts_have_the_sizes_they_are_named_after():
    weights = {
        name: sum(int(np.prod(shape)) for shape in layout.tensors.values())
        for name, layout in LAYOUTS.items()
    }
    assert weights["opt-1.3b"] == 1_315_758_080
    assert 4e9 < 2 * weights["4gb"] < 4.1e9


@pytest.mark.parametrize("flag", ["--layout=opt-66b", "--method=gptq", "--effort=most"])
def test_wrong_flags_of_the_benchmark_are_one_line(flag, capsys):
    assert main([flag]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_effort_is_that_of_joint_coding_only():
    assert "effort" not in StreamingConfig(method="rtn").rules()["config"]
    joint = StreamingConfig(method="kashin-joint").rules()["config"]
    assert joint["effort"] == "fast"
