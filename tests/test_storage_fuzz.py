"""Damaged and invented files: success or `CheckpointError`, and little memory.

The seeds are the golden files. The slow tests are the same properties with thousands
of cases and other random numbers every time.
"""

import json
import shutil
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from storage_tensors import GOLDEN, V1

from kashin_jax.errors import CheckpointError
from kashin_jax.io import (
    from_leaves,
    open_checkpoint,
    open_safetensors,
    to_leaves,
)

FILES = sorted(path.name for path in V1.iterdir() if path.name != "decoded.json")
SHARDS = [name for name in FILES if name.endswith(".safetensors")]
# The golden checkpoint has 9 kB; what a case may take, Python's own objects included.
PEAK = 4 * 2**20

HARD_INTEGERS = [0, -1, 1, 2, 7, 8, 9, 2**16, 2**31, 2**31 + 1, 2**53, 2**63, 10**400]
HARD_TEXT = ["", "..", "../x", "/x", "\0", "\n", "\ud800", "__metadata__", "é", "F32",
             "U8", "float32", "uint8", "float16", "haar", "dct", "hadamard:haar",
             "kashin", "affine", "codebook", "kashin-vectors", "a.scale",
             *SHARDS]  # fmt: skip
SCALARS = (
    st.none() | st.booleans() | st.sampled_from(HARD_INTEGERS) | st.integers()
    | st.floats() | st.sampled_from(HARD_TEXT) | st.text(max_size=8)
)  # fmt: skip
KEYS = st.sampled_from([
    *HARD_TEXT, "type", "layout", "leaves", "shape", "dtype", "data_offsets", "bits",
]) | st.text(max_size=5)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=12,
)
few = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
many = settings(few, max_examples=3000, derandomize=False)


def bounded(act):
    """Runs a case; whether it succeeded. Anything but `CheckpointError` is raised."""
    tracemalloc.start()
    try:
        act()
        return True
    except CheckpointError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < PEAK


def read_all(path):
    file = open_safetensors(path)
    for name in file.specs:
        file.read(name)


def load_some(directory, first=0, step=1):
    checkpoint = open_checkpoint(directory)
    for name in checkpoint.names()[first::step]:
        checkpoint.spec(name)
        checkpoint.load(name)


@st.composite
def damaged(draw, data):
    """Bytes with bits flipped, a piece cut out, put in, or the end missing."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        # Half of the damage to the header, where it tells.
        at = draw(st.sampled_from([at, at % 400]))
        match draw(st.sampled_from(["flip", "cut", "put", "end"])):
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at : at + draw(st.integers(1, 40))]
            case "put":
                data[at:at] = draw(st.binary(max_size=20))
            case "end":
                del data[at:]
    return bytes(data)


def places(content, path=()):
    """Paths to every value of some JSON."""
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items:
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))
        else:
            yield (*path, key)


@st.composite
def edited(draw, content):
    """JSON with some values replaced, removed, renamed or added."""
    content = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, 3))):
        paths = [path for path in places(content) if path]
        if not paths:
            break
        *parents, last = draw(st.sampled_from(paths))
        inner = content
        for key in parents:
            inner = inner[key]
        value = draw(VALUES)
        match draw(st.sampled_from(["replace", "replace", "remove", "more"])):
            case "replace":
                inner[last] = value
            case "remove":
                del inner[last]
            case "more" if isinstance(inner, dict):
                inner[draw(KEYS)] = value
            case "more":
                inner.append(value)
    return content


def split(name):
    """Header of a golden shard, its metadata parsed, and its data."""
    data = (V1 / name).read_bytes()
    stop = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:stop])
    header["__metadata__"]["kashin_jax"] = json.loads(
        header["__metadata__"]["kashin_jax"]
    )
    return header, data[stop:]


def joined(header, data):
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict) and not isinstance(metadata.get("kashin_jax"), str):
        metadata["kashin_jax"] = json.dumps(metadata.get("kashin_jax"))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@st.composite
def damaged_file(draw):
    """Name and new content of one file of the golden checkpoint."""
    name = draw(st.sampled_from(FILES))
    if draw(st.booleans()):
        return name, draw(damaged((V1 / name).read_bytes()))
    if name in SHARDS:
        header, data = split(name)
        return name, joined(draw(edited(header)), data)
    content = json.loads((V1 / name).read_text())
    return name, json.dumps(draw(edited(content))).encode()


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    return shutil.copytree(V1, tmp_path_factory.mktemp("fuzz") / "v1")


PACKED = {
    name: (GOLDEN.descriptions[name], to_leaves(GOLDEN.load(name)))
    for name in GOLDEN.descriptions
}


@st.composite
def damaged_leaves(draw):
    description, leaves = PACKED[draw(st.sampled_from(sorted(PACKED)))]
    if draw(st.booleans()):
        description = draw(edited(description))
    leaves = dict(leaves)
    for _ in range(draw(st.integers(0, 2))):
        leaf = draw(st.sampled_from(sorted(leaves)))
        original = leaves[leaf]
        raw = np.frombuffer(draw(damaged(original.tobytes())), np.uint8)
        dtype = draw(st.sampled_from([original.dtype] * 5 + [np.dtype(np.float16)]))
        value = raw[: raw.size - raw.size % dtype.itemsize].view(dtype)
        fits = value.size == original.size
        value = value.reshape(original.shape) if fits else value
        leaves[draw(st.sampled_from([leaf] * 5 + ["seed", "more"]))] = value
    return description, leaves


def any_bytes(path, data):
    path.write_bytes(data)
    bounded(lambda: read_all(path))


def any_file(directory, change, first):
    name, data = change
    (directory / name).write_bytes(data)
    try:
        bounded(lambda: load_some(directory, first, 4))
    finally:
        shutil.copyfile(V1 / name, directory / name)


def any_leaves(case):
    bounded(lambda: from_leaves(*case, name="t"))


SHARD_BYTES = (V1 / SHARDS[0]).read_bytes()
HEADERS = damaged(SHARD_BYTES) | st.binary(max_size=200) | st.builds(
    joined, st.dictionaries(KEYS, VALUES, max_size=4), st.binary(max_size=30)
)  # fmt: skip


def test_undamaged_seeds_pass_all_the_properties(golden):
    assert bounded(lambda: load_some(golden))
    for name in SHARDS:
        header, data = split(name)
        (golden / "copy").write_bytes(joined(header, data))
        assert bounded(lambda: read_all(golden / "copy"))
    for case in PACKED.values():
        assert bounded(lambda case=case: from_leaves(*case))


@few
@given(data=HEADERS)
def test_no_bytes_break_the_reader_of_headers(golden, data):
    any_bytes(golden / "copy", data)


@few
@given(change=damaged_file(), first=st.integers(0, 3))
def test_no_damaged_file_breaks_the_reader_of_checkpoints(golden, change, first):
    any_file(golden, change, first)


@few
@given(case=damaged_leaves())
def test_no_description_or_leaves_break_the_reader_of_packed_tensors(case):
    any_leaves(case)


@pytest.mark.slow
@many
@given(data=HEADERS)
def test_thousands_of_damaged_headers_are_read_or_refused(golden, data):
    any_bytes(golden / "copy", data)


@pytest.mark.slow
@settings(many, max_examples=2000)
@given(change=damaged_file(), first=st.integers(0, 3))
def test_thousands_of_damaged_checkpoints_are_read_or_refused(golden, change, first):
    any_file(golden, change, first)


@pytest.mark.slow
@many
@given(case=damaged_leaves())
def test_thousands_of_damaged_tensors_are_read_or_refused(case):
    any_leaves(case)
