"""Flax's files as its own reader has them, and hostile ones, which are refused."""

import math
import tracemalloc

import ml_dtypes
import msgpack
import numpy as np
import pytest
from flax import serialization, traverse_util
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kashin_jax.errors import CheckpointError
from kashin_jax.io.whole_files import open_whole_files, pytorch_name

TYPES = [
    "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64",
    "float16", "float32", "float64", ml_dtypes.bfloat16,
]  # fmt: skip


def in_one_file(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


def array_of(shape, dtype, seed=0):
    size = math.prod(shape)
    values = np.random.default_rng(seed).integers(0, 2, size)
    return values.reshape(shape).astype(dtype)


arrays = st.builds(
    array_of,
    st.lists(st.integers(0, 4), max_size=4).map(tuple),
    st.sampled_from(TYPES),
    st.integers(0, 9),
)
# Names that PyTorch calls by one name, and kernels without two axes, have tests of
# their own.
keys = st.text(
    st.characters(exclude_characters="/.", codec="utf-8"), max_size=40
).filter(lambda key: key not in ("kernel", "embedding", "scale"))
trees = st.dictionaries(
    keys,
    st.recursive(
        arrays, lambda inner: st.dictionaries(keys, inner, min_size=1), max_leaves=20
    ),
    max_size=20,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "flax_model.msgpack"


def opened(path):
    return open_whole_files([path])[path.name]


def read_all(path):
    """All arrays of a file by their names in PyTorch."""
    file = opened(path)
    return {name: file.read(name) for name in file.specs}


def assert_read_as_flax_does(path):
    restored = serialization.msgpack_restore(path.read_bytes())
    expected = traverse_util.flatten_dict(restored, sep="/")
    found = read_all(path)
    assert found.keys() == set(map(pytorch_name, expected))
    for name, value in expected.items():
        read = found[pytorch_name(name)]
        assert (read.dtype, read.shape) == (value.dtype, value.shape)
        assert read.tobytes() == value.tobytes()


@in_one_file(30)
@given(trees)
@example({f"{i}": array_of((i,), "int8") for i in range(300)})
@example({"x": array_of((70_000,), "uint8"), "y" * 300: array_of((), "float32")})
def test_what_flax_writes_is_read_as_flax_reads_it(path, tree):
    path.write_bytes(serialization.to_bytes(tree))
    assert_read_as_flax_does(path)


@pytest.mark.slow
@in_one_file(300)
@given(trees)
def test_what_flax_writes_is_read_as_flax_reads_it_many_times(path, tree):
    path.write_bytes(serialization.to_bytes(tree))
    assert_read_as_flax_does(path)


@pytest.mark.parametrize("limit", [8, 100, 101, 10_000])
def test_chunks_are_joined_as_flax_does(path, limit, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", limit)
    tree = {"a": {str(t): array_of((5, 7, 3), t, 1) for t in TYPES[:-1]}}
    path.write_bytes(serialization.msgpack_serialize(tree))
    assert_read_as_flax_does(path)


def test_scalars_are_arrays_without_axes(path):
    tree = {"step": np.float32(3.5), "count": array_of((), "int32")}
    path.write_bytes(serialization.msgpack_serialize(tree))
    found = read_all(path)
    assert found["step"] == np.float32(3.5) and found["step"].shape == ()


def packed(shape=(2, 3), dtype="float32", data=bytes(24), code=1):
    return msgpack.ExtType(code, msgpack.packb((shape, dtype, data)))


def chunked(shape, *parts):
    return {
        "__msgpack_chunked_array__": True,
        "shape": {str(i): side for i, side in enumerate(shape)},
        "chunks": {str(i): part for i, part in enumerate(parts)},
    }


def nested(depth):
    return {"x": nested(depth - 1)} if depth else {"x": packed()}


HALF = packed((3,), data=bytes(12))
FILES = {
    "nothing": b"",
    "a number": msgpack.packb(3),
    "an array alone": msgpack.packb(packed()),
    "a list": msgpack.packb([packed()]),
    "a list of arrays": msgpack.packb({"x": [packed()]}),
    "text": msgpack.packb({"x": "y"}),
    "nothing at a key": msgpack.packb({"x": None}),
    "a number at a key": msgpack.packb({"x": 3}),
    "a float": msgpack.packb({"x": 0.5}),
    "a negative number": msgpack.packb({"x": -1000}),
    "a key that is a number": msgpack.packb({3: packed()}),
    "a key of bytes": msgpack.packb({b"x": packed()}),
    "a key that is not UTF-8": b"\x81\xa1\xff" + msgpack.packb(packed()),
    "a long key": msgpack.packb({"x" * 1001: packed()}),
    "long keys": msgpack.packb({"x" * 600: {"y" * 600: packed()}}),
    "deep maps": msgpack.packb(nested(40)),
    "very deep maps": b"\x81\xa1x" * 50_000 + b"\x80",
    "a key twice": b"\x82" + 2 * (b"\xa1x" + msgpack.packb(packed())),
    "a name twice": msgpack.packb({"a/b": packed(), "a": {"b": packed()}}),
    "a map without end": b"\xdf\xff\xff\xff\xff",
    "a large map without end": b"\xdf\x00\x01\x00\x00",
    "an extension beyond the end": b"\x81\xa1x\xc9\xff\xff\xff\xff\x01",
    "an unused first byte": b"\xc1",
    "bytes after the end": msgpack.packb({"x": packed()}) + b"\x00",
    "another extension": msgpack.packb({"x": packed(code=5)}),
    "a complex number": serialization.msgpack_serialize({"x": 1j}),
    "complex numbers": serialization.to_bytes({"x": np.ones(2, np.complex64)}),
    "an unknown type": msgpack.packb({"x": packed(dtype="object")}),
    "a structured type": msgpack.packb({"x": packed(dtype="f4,f4")}),
    "less data": msgpack.packb({"x": packed(data=bytes(23))}),
    "more data": msgpack.packb({"x": packed(data=bytes(25))}),
    "another shape": msgpack.packb({"x": packed((2, 4))}),
    "a negative side": msgpack.packb({"x": packed((-2, -3))}),
    "a large shape": msgpack.packb({"x": packed((2**40, 2**40))}),
    "a large empty shape": msgpack.packb({"x": packed((2**62, 8, 0), data=b"")}),
    "many axes": msgpack.packb({"x": packed((1,) * 40, data=bytes(4))}),
    "axes without end": b"\x81\xa1x\xc7\x07\x01\x93\xdd\xff\xff\xff\xff\x01",
    "a shape that is a number": msgpack.packb({"x": packed(6)}),
    "data that are text": msgpack.packb({"x": packed(data="x" * 24)}),
    "a pair": msgpack.packb({"x": msgpack.ExtType(1, msgpack.packb(((2,), "bool")))}),
    "four": msgpack.packb(
        {"x": msgpack.ExtType(1, msgpack.packb(((1,), "bool", b"\0", 0)))}
    ),
    "unused bytes in an extension": msgpack.packb(
        {"x": msgpack.ExtType(1, packed().data + b"\x00")}
    ),
    "data beyond the extension": b"\x82\xa1x"
    + b"\xc7\x06\x01"
    + msgpack.packb(((4,), "int8", b"abcd"))[:6]
    + b"\x04\xa1y\x01",
    "no chunks": msgpack.packb({"x": chunked((0,))}),
    "chunks of another size": msgpack.packb({"x": chunked((5,), HALF, HALF)}),
    "chunks of two types": msgpack.packb(
        {"x": chunked((6,), HALF, packed((3,), "int32", bytes(12)))}
    ),
    "chunks that are numbers": msgpack.packb({"x": chunked((2,), 1, 2)}),
    "sides that are arrays": msgpack.packb({"x": chunked((HALF, 2), HALF)}),
    "sides that are true": msgpack.packb({"x": chunked((True, 3), HALF)}),
    "chunks with a gap": msgpack.packb(
        {"x": chunked((6,), HALF) | {"chunks": {"0": HALF, "2": HALF}}}
    ),
    "chunks without shape": msgpack.packb(
        {"x": {"__msgpack_chunked_array__": True, "chunks": {"0": HALF}}}
    ),
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_a_hostile_file_is_one_line_and_takes_no_memory(path, content):
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            opened(path)
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()
    text = str(caught.value)
    faults = ("is truncated or damaged (", "`a/b` and `a/b` are both `a.b`")
    assert text.startswith(tuple(f"{path}: {fault}" for fault in faults))
    assert "\n" not in text


def test_many_items_are_refused_before_they_are_kept(path):
    # A million pairs of an empty name and an empty map, by groups of their own keys.
    inner = msgpack.packb({f"{i}": {} for i in range(1000)})
    keys = b"".join(msgpack.packb(f"{i}") + inner for i in range(1000))
    path.write_bytes(b"\xde\x03\xe8" + keys)
    with pytest.raises(CheckpointError, match="more than 100000 items"):
        opened(path)


def test_a_missing_file_is_named(path):
    with pytest.raises(CheckpointError, match=r"flax_model\.msgpack: is missing"):
        opened(path)


SMALL = serialization.to_bytes(
    {"a": {"kernel": array_of((3, 2), "float16"), "bias": array_of((2,), "float32")}}
)
CHUNKED = msgpack.packb({"a": chunked((6,), HALF, HALF), "b": packed()})


def check_bounded(path, content):
    """Either an error of ours, or arrays that lie within the file."""
    path.write_bytes(content)
    try:
        found = read_all(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
        return
    assert sum(array.nbytes for array in found.values()) <= len(content)


@pytest.mark.parametrize("content", [SMALL, CHUNKED], ids=["plain", "chunked"])
def test_a_file_cut_anywhere_is_refused(path, content):
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            opened(path)


@pytest.mark.parametrize("content", [SMALL, CHUNKED], ids=["plain", "chunked"])
def test_a_changed_byte_never_leads_out_of_the_file(path, content):
    for place in range(len(content)):
        for value in (0, 1, 0x7F, 0x80, 0xC9, 0xDF, 0xFF, content[place] ^ 1):
            check_bounded(path, content[:place] + bytes([value]) + content[place + 1 :])


@pytest.mark.slow
@in_one_file(300)
@given(st.binary(max_size=200), st.integers(0, len(CHUNKED)))
def test_any_bytes_end_in_an_error_of_ours_or_in_arrays(path, noise, place):
    check_bounded(path, noise)
    check_bounded(path, b"\x81\xa1x" + noise)
    check_bounded(path, CHUNKED[:place] + noise + CHUNKED[place:])
