"""Headers that somebody damaged or made to harm: each is refused, in one line."""

import json
import os
import tracemalloc

import numpy as np
import pytest
import safetensors

from kashin_jax.errors import CheckpointError
from kashin_jax.io import open_safetensors, write_tensors


def header(**changes):
    return {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | changes


def file_of(content, data=b"\0" * 24, length=None):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    length = len(text) if length is None else length
    return length.to_bytes(8, "little") + text + data


def without(key):
    return {k: v for k, v in header().items() if k != key}


DEEP = b'{"x":' * 100_000
OTHER = header(data_offsets=[16, 40])
HOSTILE = {
    "an empty file": b"",
    "seven bytes": b"\1\0\0\0\0\0\0",
    "a length alone": (2).to_bytes(8, "little"),
    "a length of zero": file_of(b"", length=0),
    "a length beyond the file": file_of({"x": header()}, length=10**6),
    "a length beyond the limit": file_of({"x": header()}, length=10**8 + 1),
    "the largest length": file_of({"x": header()}, length=2**64 - 1),
    "a header cut short": file_of({"x": header()}, length=20),
    "no JSON": file_of(b"not json at all!"),
    "a list": file_of([1, 2]),
    "leading spaces": file_of(b"  {}", b""),
    "a byte order mark": file_of("\ufeff{}".encode(), b""),
    "UTF-16": file_of('{"x":1}'.encode("utf-16-le"), b""),
    "broken UTF-8": file_of(b'{"\xff": 1}', b""),
    "nesting without end": file_of(DEEP),
    "a tensor twice": file_of(
        f'{{"x":{json.dumps(header())},"x":{json.dumps(header())}}}'.encode()
    ),
    "a key of an entry twice": file_of(
        b'{"x":{"dtype":"F32","dtype":"F32","shape":[6],"data_offsets":[0,24]}}'
    ),
    "an endless number": file_of(
        b'{"x":{"dtype":"F32","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,24]}}'
    ),
    "metadata of numbers": file_of({"__metadata__": {"a": 1}, "x": header()}),
    "metadata as a list": file_of({"__metadata__": [], "x": header()}),
    "an entry that is a number": file_of({"x": 1}),
    "no dtype": file_of({"x": without("dtype")}),
    "no shape": file_of({"x": without("shape")}),
    "no data_offsets": file_of({"x": without("data_offsets")}),
    "a field too many": file_of({"x": header(more=1)}),
    "an unknown dtype": file_of({"x": header(dtype="F31")}),
    "a dtype of ours": file_of({"x": header(dtype="float32")}),
    "a dtype that is a list": file_of({"x": header(dtype=["F32"])}),
    "an entry that is a list": file_of({"x": ["F32", [2, 3], [0, 24]]}),
    "a dtype of six bits": file_of({"x": header(dtype="F6_E2M3", shape=[32])}),
    "a complex dtype": file_of({"x": header(dtype="C64", shape=[3])}),
    "a dtype below a byte": file_of({"x": header(dtype="F4")}),
    "a shape that is a number": file_of({"x": header(shape=6)}),
    "a negative side": file_of({"x": header(shape=[-2, -3])}),
    "a side that is a fraction": file_of({"x": header(shape=[2.0, 3])}),
    "a side that is true": file_of({"x": header(shape=[True, 6])}),
    "a side that is text": file_of({"x": header(shape=["6"])}),
    "a side that overflows": file_of({"x": header(shape=[2**64, 0])}),
    "sides that overflow together": file_of({"x": header(shape=[2**62, 2**62])}),
    "sides that overflow to the size": file_of({"x": header(shape=[2**61 + 3, 2])}),
    "an empty array of huge sides": file_of(
        {"x": header(shape=[0, 2**62, 2**62], data_offsets=[0, 0])}, b""
    ),
    "a hundred sides": file_of({"x": header(shape=[1] * 98 + [2, 3])}),
    "a shape bomb": file_of({"x": header(shape=[2**40], data_offsets=[0, 2**42])}),
    "one offset": file_of({"x": header(data_offsets=[0])}),
    "three offsets": file_of({"x": header(data_offsets=[0, 24, 24])}),
    "offsets backwards": file_of({"x": header(data_offsets=[24, 0])}),
    "a negative offset": file_of({"x": header(data_offsets=[-24, 0])}),
    "a shape unlike the offsets": file_of({"x": header(shape=[2, 2])}),
    "data that overlap": file_of({"x": header(), "y": OTHER}, b"\0" * 40),
    "data used twice": file_of({"x": header(), "y": header()}),
    "a gap between data": file_of({"x": header(), "y": header(data_offsets=[25, 49])},
                                  b"\0" * 49),
    "a gap before the data": file_of({"x": header(data_offsets=[4, 28])}, b"\0" * 28),
    "data cut short": file_of({"x": header()}, b"\0" * 23),
    "data too long": file_of({"x": header()}, b"\0" * 25),
    "data without an entry": file_of({}, b"\0"),
}  # fmt: skip


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_is_refused_in_one_line_without_allocating(tmp_path, data):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            open_safetensors(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message and len(message) < 600
    assert peak < 20 * len(data) + 2**18


# Sound to the safetensors library: what is checked here beside it.
STRICTER = {
    "a tensor twice", "a field too many", "leading spaces", "an entry that is a list",
    "a dtype of six bits", "a complex dtype", "a hundred sides",
    "an empty array of huge sides",
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(HOSTILE))
def test_only_what_the_library_takes_for_sound_is_checked_beside_it(tmp_path, case):
    (tmp_path / "t").write_bytes(HOSTILE[case])
    if case in STRICTER:
        safetensors.safe_open(tmp_path / "t", "np")
        return
    with pytest.raises(safetensors.SafetensorError):
        safetensors.safe_open(tmp_path / "t", "np")


def test_the_message_names_the_tensor(tmp_path):
    content = {"a\nb": header(dtype="C64", shape=[3])}
    (tmp_path / "t").write_bytes(file_of(content))
    with pytest.raises(CheckpointError, match=r"tensor 'a\\nb' has the unknown dtype"):
        open_safetensors(tmp_path / "t")


def test_sound_files_of_odd_looks_are_read(tmp_path):
    for i, data in enumerate([
        file_of({}, b""),
        file_of(b"{}      ", b""),
        file_of({"x": header(shape=[], data_offsets=[0, 4])}, b"\0" * 4),
        file_of({"y": header(data_offsets=[24, 48]), "x": header()}, b"\0" * 48),
        file_of({"x": header(shape=[0], data_offsets=[0, 0])}, b""),
        file_of({"__metadata__": None, "x": header()}, b"\0" * 24),
    ]):  # fmt: skip
        (tmp_path / str(i)).write_bytes(data)
        file = open_safetensors(tmp_path / str(i))
        assert all(file.read(name).sum() == 0 for name in file.specs)


def test_a_file_cut_after_its_header_was_read_is_an_error(tmp_path):
    write_tensors(tmp_path / "t", {"x": np.zeros(1000)})
    file = open_safetensors(tmp_path / "t")
    os.truncate(tmp_path / "t", 500)
    with pytest.raises(CheckpointError, match="ends inside tensor 'x'"):
        file.read("x")


def test_booleans_other_than_0_and_1_are_an_error(tmp_path):
    content = {"x": header(dtype="BOOL", shape=[3], data_offsets=[0, 3])}
    (tmp_path / "t").write_bytes(file_of(content, b"\0\1\2"))
    with pytest.raises(CheckpointError, match="'x' has booleans other than"):
        open_safetensors(tmp_path / "t").read("x")


def test_a_missing_file_and_a_directory_are_errors(tmp_path):
    for path in (tmp_path / "gone", tmp_path):
        with pytest.raises(CheckpointError, match=str(path)):
            open_safetensors(path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "t")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        open_safetensors(tmp_path / "t")


def test_a_name_that_is_not_utf8_is_a_file_like_any_other(tmp_path):
    path = tmp_path / os.fsdecode(b"a\x80.safetensors")
    write_tensors(path, {"x": np.arange(3)})
    np.testing.assert_array_equal(open_safetensors(path).read("x"), np.arange(3))
