"""Checkpoint directories that somebody damaged: each is refused, in one line."""

import json
import os
import re

import numpy as np
import pytest
import safetensors.numpy
from storage_tensors import INDEX, copy, save, sharded

from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.io import open_checkpoint, write_tensors

NF4 = "layers.codebook-nf4.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def copied(saved, tmp_path):
    return copy(saved, tmp_path)


def edit(directory, name, change):
    content = json.loads((directory / name).read_text())
    change(content)
    (directory / name).write_text(json.dumps(content))


def edit_shard(directory, change, at=0):
    """Rewrites a shard: `change` sees its tensors and its parsed description."""
    path = sorted(directory.glob("*.safetensors"))[at]
    with safetensors.safe_open(path, "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    content = json.loads(metadata.get("kashin_jax", '{"tensors":{}}'))
    change(tensors, content)
    metadata["kashin_jax"] = json.dumps(content)
    write_tensors(path, tensors, metadata)
    return path


def shard_of(directory, name):
    checkpoint = open_checkpoint(directory)
    return sorted(checkpoint.files).index(checkpoint.places[name])


def message(directory):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def first(mapping):
    return sorted(mapping)[0]


INDEXES = {
    "no weight_map": (lambda c: c.pop("weight_map"), "has no `weight_map`"),
    "an empty one": (lambda c: c["weight_map"].clear(), "has no `weight_map`"),
    "a tensor too many": (
        lambda c: c["weight_map"].update(x=first(c["weight_map"].values())), "'x' in"),
    "a tensor elsewhere": (
        lambda c: c["weight_map"].update(steps=sorted(c["weight_map"].values())[-1]),
        "'steps' in"),
    "a shard that is missing": (
        lambda c: c["weight_map"].update(steps="gone.safetensors"), "gone.*missing"),
    "metadata as a list": (lambda c: c.update(metadata=[]), "malformed"),
    "hashes as a list": (lambda c: c["metadata"].update(sha256=[]), "malformed"),
    "a hash that is none": (
        lambda c: c["metadata"]["sha256"].update({"a": "xyz"}), "malformed"),
    "hashes of other files": (
        lambda c: c["metadata"]["sha256"].update({"a": "0" * 64}), "same files"),
}  # fmt: skip


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that_does_not_agree_is_refused(copied, case):
    change, expected = INDEXES[case]
    edit(copied, INDEX, change)
    assert re.search(expected, message(copied))


def leave_out_a_tensor(content):
    content["weight_map"].pop("steps")


@pytest.mark.parametrize("change", [
    leave_out_a_tensor, lambda c: c.update(metadata=None), lambda c: c.pop("metadata"),
    lambda c: c["metadata"].update(sha256=None),
])  # fmt: skip
def test_an_index_that_says_less_is_read(copied, change):
    # Other loaders take such indices: refusing them kept sound checkpoints out.
    before = open_checkpoint(copied)
    edit(copied, INDEX, change)
    found = open_checkpoint(copied)
    assert found.places == before.places
    np.testing.assert_array_equal(found.load("steps"), before.load("steps"))


def test_both_a_single_file_and_an_index_of_others_is_refused(tmp_path):
    sharded(tmp_path)
    write_tensors(tmp_path / "model.safetensors", {"a": np.zeros(3)})
    assert "an index that does not name it" in message(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    names = sharded(tmp_path)
    write_tensors(tmp_path / names[1], {"a": np.zeros(3), "b": np.zeros(3)})
    assert f"'a' is in {names[0]} and in {names[1]}" in message(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a":1,"a":2}', "[" * 10**5])
@pytest.mark.parametrize("name", [INDEX, "config.json"])
def test_damaged_json_is_refused(copied, name, content):
    (copied / name).write_text(content)
    assert str(copied / name) in message(copied)


def test_a_directory_that_is_empty_or_missing_is_refused(tmp_path):
    assert "holds no weights; put one of model.safetensors" in message(tmp_path)
    assert "gone: no such directory" in message(tmp_path / "gone")


@pytest.mark.parametrize(
    "name", [INDEX, "config.json", "flax_model.msgpack", "pytorch_model.bin"]
)
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, name):
    if name in (INDEX, "config.json"):
        write_tensors(tmp_path / "model.safetensors", {"x": np.zeros(3)})
    os.mkfifo(tmp_path / name)
    assert f"{name}: is not a regular file" in message(tmp_path)


def test_a_shard_that_is_no_regular_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    assert "not a regular file" in message(tmp_path)


def test_a_tensor_that_is_not_there_is_an_error(copied):
    with pytest.raises(UsageError, match="has no tensor 'x'"):
        open_checkpoint(copied).load("x")


VERSIONS = {0: "cannot be 0", -1: "cannot be -1", "1": "cannot be '1'",
            None: "cannot be None", True: "cannot be True",
            4: "schema version 4, but this kashin_jax reads up to 3; upgrade",
            10**30: "reads up to 3; upgrade"}  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
def test_a_schema_version_that_is_not_known_is_refused(copied, version):
    def in_config(content):
        content["quantization_config"]["schema_version"] = version

    def in_shard(tensors, content):
        content["schema_version"] = version

    at = shard_of(copied, NF4)
    edit(copied, "config.json", in_config)
    assert VERSIONS[version] in message(copied)
    edit(copied, "config.json", lambda c: c.pop("quantization_config"))
    path = edit_shard(copied, in_shard, at)
    assert VERSIONS[version] in (text := message(copied)) and str(path) in text


def test_descriptions_that_were_dropped_are_missed(copied):
    for path in copied.glob("*.safetensors"):
        tensors = safetensors.numpy.load_file(path)
        safetensors.numpy.save_file(tensors, path, {"format": "pt"})
    assert "counts 10 packed tensors, but the shards describe 0" in message(copied)


SHARDS = {
    "no descriptions": (lambda t, c: c.pop("tensors"), "has no `tensors`"),
    "a list of them": (lambda t, c: c.update(tensors=[]), "has no `tensors`"),
    "a description of nothing": (
        lambda t, c: c["tensors"].update(x=c["tensors"][NF4]), "'x.* Got nothing"),
    "a leaf cut": (
        lambda t, c: t.update({f"{NF4}.scale": t[f"{NF4}.scale"][:1]}), "nf4.*scale"),
    "another layout": (
        lambda t, c: c["tensors"][NF4]["layout"].update(shape=[2**31, 2**31]),
        "nf4.*packed_codes"),
    "null as one": (lambda t, c: c["tensors"].update({NF4: None}), "`description`"),
    "an unknown type": (lambda t, c: c["tensors"][NF4].update(type="x"), "`type`"),
}  # fmt: skip


@pytest.mark.parametrize("case", SHARDS)
def test_a_shard_unlike_its_descriptions_is_refused(copied, case):
    change, expected = SHARDS[case]
    path = edit_shard(copied, change, shard_of(copied, NF4))
    text = message(copied)
    assert str(path) in text and re.search(expected, text)


def test_a_plain_tensor_of_a_packed_ones_name_is_refused(copied):
    at = shard_of(copied, NF4)
    path = edit_shard(copied, lambda t, c: t.update({NF4: np.zeros(3)}), at)
    edit(copied, INDEX, lambda c: c["weight_map"].update({NF4: path.name}))
    assert f"{NF4!r} is there twice" in message(copied)


def test_damaged_data_are_named_with_their_file(copied):
    def break_scale(tensors, content):
        tensors[f"{NF4}.scale"][0] = np.inf

    path = edit_shard(copied, break_scale, shard_of(copied, NF4))
    with pytest.raises(CheckpointError, match=f"{path}.*{NF4}.scale.*NaN or inf"):
        open_checkpoint(copied).load(NF4)
