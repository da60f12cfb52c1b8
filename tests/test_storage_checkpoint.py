"""Checkpoint directories: shards, index and configuration agree, or are refused."""

import json
import math

import numpy as np
import pytest
import safetensors.numpy
from storage_tensors import (
    GOLDEN,
    INDEX,
    PLAIN,
    RNG,
    copy,
    every_type,
    golden,
    save,
    sharded,
)

from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.io import (
    open_checkpoint,
    plan_packed,
    plan_plain,
    plan_shards,
    to_leaves,
    write_tensors,
)
from kashin_jax.tensors import stored_bits


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("saved") / "deep" / "q")


@pytest.fixture
def copied(saved, tmp_path):
    return copy(saved, tmp_path)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_a_checkpoint_of_every_type_returns_bit_by_bit(saved):
    checkpoint = open_checkpoint(saved)
    tensors = PLAIN | every_type()
    assert sorted(checkpoint.names()) == sorted(tensors)
    assert len(checkpoint.files) > 2
    for name, expected in tensors.items():
        assert checkpoint.is_packed(name) == (name not in PLAIN)
        if name in PLAIN:
            assert same(checkpoint.load(name), expected)
            assert checkpoint.spec(name) == (expected.dtype.name, expected.shape)
            continue
        found, leaves = to_leaves(checkpoint.load(name)), to_leaves(expected)
        assert found.keys() == leaves.keys()
        assert all(same(found[leaf], leaves[leaf]) for leaf in leaves)


def test_the_shape_of_a_packed_tensor_is_that_of_the_original(saved):
    checkpoint = open_checkpoint(saved)
    assert checkpoint.spec("layers.joint.weight") == ("float32", (24, 12))
    assert checkpoint.spec("layers.kashin.weight") == ("float32", (8, 16))
    assert checkpoint.described("layers.joint.weight").is_transposed


def test_one_shard_is_called_model_and_has_an_index_too(tmp_path):
    save(tmp_path, max_shard_bytes=10**9)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model.safetensors", INDEX, "config.json"}
    assert len(open_checkpoint(tmp_path).names()) == len(PLAIN) + len(
        GOLDEN.descriptions
    )


def test_the_same_content_gives_the_same_bytes(saved, tmp_path):
    save(tmp_path)
    files = {path.name: path.read_bytes() for path in saved.iterdir()}
    assert files == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_safetensors_reads_every_stored_array(saved):
    found = {}
    for path in saved.glob("*.safetensors"):
        found |= safetensors.numpy.load_file(path)
    weight_map = json.loads((saved / INDEX).read_text())["weight_map"]
    assert found.keys() == weight_map.keys()
    assert same(found["embed.weight"], PLAIN["embed.weight"])
    # In memory with an axis of rows, in a file one stream.
    codes = np.asarray(golden("codebook-nf4").packed_codes).reshape(-1)
    assert same(found["layers.codebook-nf4.weight.packed_codes"], codes)


def test_the_configuration_says_how_it_was_quantized(saved):
    quantization = open_checkpoint(saved).quantization
    assert quantization["quant_method"] == "kashin"
    assert quantization["schema_version"] == 1
    assert quantization["seed"] == 7
    assert quantization["rules"]["config"]["method"] == "kashin-joint"
    bits = sum(stored_bits(tensor) for tensor in every_type().values())
    weights = sum(math.prod(tensor.shape) for tensor in every_type().values())
    assert quantization["tensors"] == {
        "packed": len(GOLDEN.descriptions), "packed_weights": weights,
        "packed_bits": bits, "plain": 3,
    }  # fmt: skip


def test_the_index_counts_the_bytes_of_all_tensors(saved):
    index = json.loads((saved / INDEX).read_text())
    data = {}
    for path in saved.glob("*.safetensors"):
        data |= safetensors.numpy.load_file(path)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in data.values())


def test_verification_finds_the_shard_with_a_flipped_bit(copied):
    assert open_checkpoint(copied).verify() == []
    path = sorted(copied.glob("*.safetensors"))[1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert open_checkpoint(copied).verify() == [path.name]


def test_a_checkpoint_of_others_opens_with_no_packed_tensors(tmp_path):
    x = RNG.normal(size=(6, 4)).astype(np.float16)
    safetensors.numpy.save_file({"b": x, "a": x[0]}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert sorted(checkpoint.names()) == ["a", "b"]
    assert checkpoint.config == {} and checkpoint.quantization is None
    assert not checkpoint.is_packed("b")
    assert same(checkpoint.load("b"), x)
    assert same(checkpoint.file_of("b").read_rows("b", 2, 4), x[2:4])
    with pytest.raises(CheckpointError, match="records no `sha256`"):
        checkpoint.verify()
    with pytest.raises(UsageError, match="'b' is not packed"):
        checkpoint.described("b")


def test_a_sharded_checkpoint_of_others_opens(tmp_path):
    sharded(tmp_path)
    assert open_checkpoint(tmp_path).names() == ["a", "b"]


def test_shards_may_be_links_to_elsewhere_as_in_the_hubs_cache(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir(), snapshot.mkdir()
    write_tensors(blobs / "abc", {"x": np.arange(3.0)})
    (snapshot / "model.safetensors").symlink_to("../blobs/abc")
    assert open_checkpoint(snapshot).load("x")[2] == 2


@pytest.mark.parametrize("name", [
    "../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "..",
    "a\\b.safetensors", "c:b.safetensors", "a\0.safetensors", ".safetensors",
    "model.bin", "x" * 300 + ".safetensors", "", 1, None, ["a.safetensors"],
    "model.safetensors\n", "\ud800.safetensors",
])  # fmt: skip
def test_an_index_cannot_name_files_outside_its_directory(tmp_path, name):
    inside = tmp_path / "inside"
    inside.mkdir()
    write_tensors(tmp_path / "model.safetensors", {"a": np.zeros(3)})
    sharded(inside, weight_map={"a": name})
    with pytest.raises(CheckpointError, match="not a .safetensors file of its") as e:
        open_checkpoint(inside)
    assert "\n" not in str(e.value)


def test_shards_are_filled_in_order_and_packed_tensors_stay_whole():
    sizes = [300, 300, 500, 2000, 10]
    plan = [plan_plain(f"x{i}", "uint8", [size]) for i, size in enumerate(sizes)]
    whole = plan_packed("p", golden("joint-half"), is_transposed=False)
    shards = plan_shards([*plan, whole], 1000)
    assert [[t.name for t in shard] for shard in shards] == [
        ["x0", "x1"], ["x2"], ["x3"], ["x4", "p"],
    ]  # fmt: skip
    assert whole.size * 8 == stored_bits(golden("joint-half"))
    assert len(whole.specs) == 7
    assert plan_shards([]) == [[]]


def test_names_that_would_clash_in_the_file_are_an_error():
    whole = plan_packed("a", golden("codebook-nf4"), is_transposed=False)
    for other in ("a", "a.scale"):
        with pytest.raises(UsageError, match=f"Two tensors are stored as '{other}'"):
            plan_shards([whole, plan_plain(other, "uint8", [3])])


def test_what_cannot_be_stored_is_named():
    with pytest.raises(UsageError, match="`a.b`: A dict cannot be stored"):
        plan_packed("a.b", {}, is_transposed=False)
    with pytest.raises(UsageError, match="max_shard_bytes"):
        plan_shards([], 0)
