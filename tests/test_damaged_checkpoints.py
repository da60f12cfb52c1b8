"""Damaged checkpoint files end in one line that names the file and the remedy."""

import numpy as np
import pytest
from opt_checkpoints import GOLDEN, directory, message, tensors, write, write_shards

__all__ = ["directory", "tensors"]  # fixtures


@pytest.mark.parametrize("keep", [0, 4, 100, 3000, -1])
def test_a_truncated_file_is_named(directory, tensors, keep):
    write(directory, tensors)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    text = message(directory)
    assert text.startswith(f"{path}: is truncated or damaged")
    assert "download it again" in text


@pytest.mark.parametrize("keep", [0, 1, 1000, -1])
def test_a_truncated_flax_file_is_named(directory, keep):
    path = directory / "flax_model.msgpack"
    content = (GOLDEN / "prenorm" / "flax_model.msgpack").read_bytes()
    path.write_bytes(content[:keep])
    assert message(directory).startswith(f"{path}: is truncated or damaged")


@pytest.mark.parametrize("seed", range(20))
def test_overwritten_headers_never_end_in_another_error(directory, tensors, seed):
    write(directory, tensors)
    path = directory / "model.safetensors"
    rng = np.random.RandomState(seed)
    content = bytearray(path.read_bytes())
    for place in rng.randint(0, 2000, size=5):
        content[place] = rng.randint(256)
    path.write_bytes(content)
    assert str(directory) in message(directory)


def test_an_index_that_names_a_missing_file_is_refused(directory, tensors):
    index = write_shards(directory, tensors, ["a.safetensors"], extra="b.safetensors")
    assert message(directory).startswith(f"{index}: names 'b.safetensors'")


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/etc/passwd", "..", "", "sub/a.safetensors", "x\\a"]
)
def test_an_index_that_leads_out_of_the_directory_is_refused(directory, tensors, name):
    outside = directory.parent / "a.safetensors"
    write(directory.parent, tensors, outside.name)
    index = write_shards(directory, tensors, ["a.safetensors"], extra=name)
    assert message(directory).startswith(f"{index}: names {name!r}, which is not")


@pytest.mark.parametrize(
    "content", ["", "[]", '{"weight_map": {}}', '{"weight_map":1}']
)
def test_a_damaged_index_is_named(directory, content):
    index = directory / "model.safetensors.index.json"
    index.write_text(content)
    assert message(directory).startswith(f"{index}: ")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"null"])
def test_a_config_that_is_no_json_object_is_named(directory, tensors, content):
    write(directory, tensors)
    (directory / "config.json").write_bytes(content)
    text = message(directory)
    assert text.startswith(f"{directory / 'config.json'}: is not")


def test_a_directory_without_config_or_weights_says_what_to_add(directory, tensors):
    text = message(directory)
    assert f"{directory}: holds no weights" in text
    assert "model.safetensors, flax_model.msgpack, pytorch_model.bin" in text
    write(directory, tensors)
    (directory / "config.json").unlink()
    assert "config.json: is missing" in message(directory)
