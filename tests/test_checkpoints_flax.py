"""`kashin quantize` from Flax's files: the same result as from safetensors."""

import json
import tracemalloc

import jax
import numpy as np
import pytest
from flax import nnx, serialization
from flax_sources import NAME, flax_arrays, make_flax_copy, write_flax
from opt_checkpoints import GOLDEN
from quantized_sources import FEW, RTN_RULES, content, edit_json, make_source, method
from safetensors.numpy import load_file
from tiny_classifier import make_classifier

from kashin_jax import Rules, quantize_model
from kashin_jax.cli import main
from kashin_jax.errors import CheckpointError
from kashin_jax.io import open_checkpoint
from kashin_jax.models.loading import load_opt
from kashin_jax.pipeline import (
    checkpoint,
    dequantize_checkpoint,
    inspect_checkpoint,
    load_quantized,
    packed_layers,
    quantize_checkpoint,
)

SHARD = 50_000
INDEX = f"{NAME}.index.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("checkpoints") / "source")


@pytest.fixture(scope="module")
def flax_copy(source):
    return make_flax_copy(source, source.parent / "flax")


@pytest.mark.parametrize("size", [SHARD, 10**9])
def test_a_flax_copy_is_quantized_to_the_same_bytes(source, flax_copy, tmp_path, size):
    # Kernels that are copied, too.
    rules = Rules(config=method("rtn"), skip=["fc1", "layers/1/fc2"])
    for name, directory in (("a", source), ("b", flax_copy)):
        quantize_checkpoint(directory, tmp_path / name, rules, max_shard_bytes=size)
    found = content(tmp_path / "b")
    assert found == content(tmp_path / "a")
    shards = [name for name in found if name.endswith(".safetensors")]
    assert (len(shards) > 2) == (size == SHARD)


def test_kashin_codes_do_not_depend_on_the_format(source, flax_copy, tmp_path):
    rules = Rules(config=method("kashin", bits=3), skip=[r"layers/0/", "proj"])
    for name, directory in (("a", source), ("b", flax_copy)):
        quantize_checkpoint(directory, tmp_path / name, rules, seed=5)
    assert content(tmp_path / "b") == content(tmp_path / "a")


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_classifiers_give_the_same_bytes(tmp_path, kind):
    fields = {"type_vocab_size": 0} if kind == "distilbert" else {}
    made = make_classifier(tmp_path / "source", "sst2", kind=kind, **fields)
    copied = make_flax_copy(made, tmp_path / "flax")
    for name, directory in (("a", made), ("b", copied)):
        quantize_checkpoint(directory, tmp_path / name, RTN_RULES)
    assert content(tmp_path / "b") == content(tmp_path / "a")
    assert load_quantized(tmp_path / "b").config.model_type == kind


def test_shards_of_flax_give_the_same_bytes(source, flax_copy, tmp_path):
    shards = make_flax_copy(source, tmp_path / "shards", shards=3)
    assert len(open_checkpoint(shards).files) == 3
    for name, directory in (("a", flax_copy), ("b", shards)):
        quantize_checkpoint(directory, tmp_path / name, RTN_RULES)
    # The order of the tensors may differ, and with it that of the report.
    assert load_bytes(tmp_path / "b") == load_bytes(tmp_path / "a")


def load_bytes(directory):
    return (directory / "model.safetensors").read_bytes()


def test_arrays_that_flax_cut_into_chunks_give_the_same_bytes(
    source, flax_copy, tmp_path, monkeypatch
):
    # Chunks that do not end where rows do.
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 1234)
    chunked = make_flax_copy(source, tmp_path / "chunked")
    assert b"__msgpack_chunked_array__" in (chunked / NAME).read_bytes()
    rules = Rules(config=method("rtn"), skip=["fc1"])
    for name, directory in (("a", flax_copy), ("b", chunked)):
        quantize_checkpoint(directory, tmp_path / name, rules)
    assert content(tmp_path / "b") == content(tmp_path / "a")


@pytest.mark.parametrize("name", ["prenorm", "postnorm"])
def test_what_hugging_face_wrote_is_quantized_as_in_memory(tmp_path, name):
    rules = Rules(config=method("rtn", group_size=None))
    quantize_checkpoint(GOLDEN / name, tmp_path / "q", rules, seed=2)
    dense = load_opt(GOLDEN / name).model
    model, _ = quantize_model(dense, key=jax.random.key(2), rules=rules)
    found = packed_layers(open_checkpoint(tmp_path / "q"))
    assert len(found) >= 12
    nodes = {"/".join(map(str, path)): node for path, node in nnx.iter_graph(model)}
    for path, tensor in found.items():
        expected = nodes[path].kernel.get_value()
        assert tensor.layout == expected.layout
        for ours, theirs in zip(
            jax.tree.leaves(tensor), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
    assert load_quantized(tmp_path / "q").config == load_opt(GOLDEN / name).config


def test_undoing_gives_the_layout_of_pytorch(source, flax_copy, tmp_path):
    quantize_checkpoint(flax_copy, tmp_path / "q", RTN_RULES)
    dequantize_checkpoint(tmp_path / "q", tmp_path / "back")
    found = load_file(tmp_path / "back" / "model.safetensors")
    expected = load_file(source / "model.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in found.items()} == {
        k: (v.shape, v.dtype) for k, v in expected.items()
    }
    fc1 = "model.decoder.layers.0.fc1.weight"
    error = np.linalg.norm(np.float32(found[fc1]) - np.float32(expected[fc1]))
    assert 0 < error < 0.2 * np.linalg.norm(np.float32(expected[fc1]))
    load_opt(tmp_path / "back")


def test_an_interrupted_run_goes_on_to_the_same_bytes(flax_copy, tmp_path, monkeypatch):
    def run(target):
        return quantize_checkpoint(flax_copy, target, FEW, max_shard_bytes=SHARD)

    run(tmp_path / "whole")
    write, count = checkpoint.write_part, 0

    def interrupted(*args):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        write(*args)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_part", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "q")
    assert run(tmp_path / "q").resumed == 3
    assert content(tmp_path / "q") == content(tmp_path / "whole")


def test_the_command_reads_flax_files(flax_copy, tmp_path, capsys):
    arguments = ["quantize", str(flax_copy), str(tmp_path / "q"), "--method=rtn"]
    assert main([*arguments, "--dry-run"]) == 0
    assert "model.decoder.layers.0.fc1.weight" in capsys.readouterr().out
    assert main(arguments) == 0
    assert main(["inspect", str(tmp_path / "q")]) == 0
    assert "Every file is as it was written." in capsys.readouterr().out


def test_flax_files_are_inspected_and_loaded_as_they_are(source, flax_copy):
    before, after = inspect_checkpoint(source), inspect_checkpoint(flax_copy)
    assert after.tensors == before.tensors and after.weights == before.weights
    found, expected = load_quantized(flax_copy), load_opt(source)
    assert found.config == expected.config
    for ours, theirs in zip(
        jax.tree.leaves(nnx.state(found.model)),
        jax.tree.leaves(nnx.state(expected.model)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_safetensors_go_before_flax_files(source, tmp_path):
    both = make_flax_copy(source, tmp_path / "both")
    (both / "model.safetensors").write_bytes(load_bytes(source))
    assert list(open_checkpoint(both).files) == ["model.safetensors"]


@pytest.fixture
def wide(tmp_path):
    """One kernel of 8 MB in float16, stored transposed."""
    kernel = np.random.default_rng(0).standard_normal((1000, 4001)).astype(np.float16)
    write_flax(tmp_path / NAME, {"head/kernel": kernel})
    return open_checkpoint(tmp_path), kernel


class Sink:
    def __init__(self):
        self.parts = []

    def write(self, data):
        self.parts.append(bytes(data))


def test_kernels_are_transposed_in_slices_while_they_are_copied(wide):
    checkpoint, kernel = wide
    file, sink = checkpoint.file_of("head.weight"), Sink()
    file.copy("head.weight", sink, chunk=10**6)
    assert b"".join(sink.parts) == kernel.T.tobytes()
    assert max(map(len, sink.parts)) <= 10**6 and len(sink.parts) == 9
    rows = file.read_rows("head.weight", 17, 4001)
    np.testing.assert_array_equal(rows, kernel.T[17:])
    np.testing.assert_array_equal(checkpoint.load("head.weight"), kernel.T)


class Nothing:
    def write(self, data):
        pass


def test_one_file_at_a_time_is_in_memory(tmp_path):
    files = [f"flax_model-0000{i}-of-00004.msgpack" for i in range(1, 5)]
    for i, file in enumerate(files):
        write_flax(tmp_path / file, {f"x{i}": np.full(10**6, i, np.uint8)})
    places = {f"x{i}": file for i, file in enumerate(files)}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
    tracemalloc.start()
    try:
        checkpoint = open_checkpoint(tmp_path)
        for i, name in enumerate(checkpoint.names()):
            assert checkpoint.load(name)[-1] == i
            checkpoint.copy(name, Nothing())
        # Its bytes, the array in them as an extension and out of it, and a slice.
        assert tracemalloc.get_traced_memory()[1] < 4.5 * 10**6
        assert tracemalloc.get_traced_memory()[0] < 1.5 * 10**6
    finally:
        tracemalloc.stop()


@pytest.fixture
def damaged(source, tmp_path):
    return make_flax_copy(source, tmp_path / "damaged")


def refused(directory, tmp_path, *parts):
    with pytest.raises(CheckpointError) as caught:
        quantize_checkpoint(directory, tmp_path / "q", RTN_RULES)
    text = str(caught.value)
    assert "\n" not in text and all(part in text for part in parts), text
    assert not (tmp_path / "q").exists()


def test_a_kernel_with_more_axes_is_refused(damaged, tmp_path):
    arrays = flax_arrays_of(damaged) | {"conv/kernel": np.zeros((3, 3, 2), np.float32)}
    write_flax(damaged / NAME, arrays)
    refused(damaged, tmp_path, "`conv/kernel` has 3 axes", "safetensors")


def flax_arrays_of(directory):
    found = {}
    for name in (checkpoint := open_checkpoint(directory)).names():
        found[name.replace(".", "/")] = checkpoint.load(name)
    return found


def test_two_arrays_of_one_name_are_refused(damaged, tmp_path):
    twice = {"norm/scale": np.ones(2), "norm/weight": np.ones(2)}
    write_flax(damaged / NAME, flax_arrays_of(damaged) | twice)
    refused(damaged, tmp_path, "both `norm.weight`")


@pytest.mark.parametrize("keep", [0, 1, 5000, -1])
def test_a_truncated_file_is_named(damaged, tmp_path, keep):
    path = damaged / NAME
    path.write_bytes(path.read_bytes()[:keep])
    refused(damaged, tmp_path, f"{path}: is truncated or damaged")


@pytest.mark.parametrize("change", ["cut", "swapped"])
def test_a_file_that_changes_while_in_use_is_named(source, tmp_path, change):
    directory = make_flax_copy(source, tmp_path / "shards", shards=2)
    checkpoint = open_checkpoint(directory)
    first, other = (directory / name for name in sorted(checkpoint.files))
    data = first.read_bytes()[:-1] if change == "cut" else other.read_bytes()
    first.write_bytes(data)
    part = "is truncated or damaged" if change == "cut" else "has changed while"
    with pytest.raises(CheckpointError, match=f"{first}: .*{part}"):
        for name in checkpoint.names():
            checkpoint.load(name)


def swap_places(weight_map):
    """Says of two tensors that each is where the other one is."""
    first = min(weight_map)
    other = next(n for n, file in weight_map.items() if file != weight_map[first])
    weight_map[first], weight_map[other] = weight_map[other], weight_map[first]


def test_an_index_that_leaves_a_tensor_out_is_read(source, tmp_path):
    """Some tools forget tied copies and buffers; the shards say what they hold."""
    directory = make_flax_copy(source, tmp_path / "shards", shards=2)
    whole = open_checkpoint(directory).names()
    edit_json(directory / INDEX, lambda c: c["weight_map"].popitem())
    assert open_checkpoint(directory).names() == whole


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda c: c.pop("weight_map"), "weight_map"),
        (lambda c: c["weight_map"].update(x="../flax_model.msgpack"), "its own dir"),
        (lambda c: c["weight_map"].update(x="config.json"), "config.json"),
        (lambda c: c["weight_map"].update(x=3), "names 3, which"),
        (lambda c: swap_places(c["weight_map"]), "places tensor"),
    ],
)
def test_a_wrong_index_is_refused(source, tmp_path, change, part):
    directory = make_flax_copy(source, tmp_path / "shards", shards=2)
    edit_json(directory / INDEX, change)
    refused(directory, tmp_path, part)


def test_a_tensor_in_two_shards_is_refused(source, tmp_path):
    directory = make_flax_copy(source, tmp_path / "shards", shards=2)
    places = json.loads((directory / INDEX).read_text())["weight_map"]
    arrays = flax_arrays(source)
    other = "flax_model-00002-of-00002.msgpack"
    name = next(name for name, file in places.items() if file != other)
    part = {key: arrays[key] for key, file in places.items() if file == other}
    write_flax(directory / other, part | {name: arrays[name]})
    refused(directory, tmp_path, "is in flax_model-00001", other)


def test_a_checkpoint_of_neither_format_says_what_is_missing(source, tmp_path):
    with pytest.raises(CheckpointError, match=r"one of model\.safetensors, flax_model"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no such directory"):
        open_checkpoint(tmp_path / "nothing")
