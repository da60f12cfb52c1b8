"""Safetensors files: the library's own reader and writer are the oracle."""

import io
import os
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.io import (
    DTYPES,
    TensorSpec,
    open_safetensors,
    open_writer,
    record_file,
    write_tensors,
)

RNG = np.random.default_rng(0)
CODES = {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}


def every_type():
    tensors = {"none": np.zeros((0, 4), np.float32)}
    for i, (name, dtype) in enumerate(DTYPES.items()):
        tensors[name] = RNG.integers(0, 2, (3, i % 3 + 1)).astype(dtype)
        tensors[f'é"\n {name}'] = RNG.integers(0, 2, ()).astype(dtype)
    return tensors


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_files_of_every_type_have_the_bytes_that_safetensors_writes(tmp_path):
    tensors = every_type()
    write_tensors(tmp_path / "ours", tensors, {"format": "pt"})
    safetensors.numpy.save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_safetensors_reads_what_is_written_here(tmp_path):
    tensors = every_type()
    write_tensors(tmp_path / "t", tensors, {"format": "pt", "more": "text"})
    found = dict(safetensors.deserialize((tmp_path / "t").read_bytes()))
    assert found.keys() == tensors.keys()
    for name, item in found.items():
        assert bytes(item["data"]) == tensors[name].tobytes()
        assert tuple(item["shape"]) == tensors[name].shape
    with safetensors.safe_open(tmp_path / "t", "np") as file:
        assert file.metadata() == {"format": "pt", "more": "text"}
        loaded = file.get_tensor("bfloat16")
    assert same(loaded, tensors["bfloat16"]) and loaded.dtype == ml_dtypes.bfloat16


def test_what_safetensors_writes_is_read_here(tmp_path):
    tensors = every_type()
    safetensors.numpy.save_file(tensors, tmp_path / "t", {"a": "b"})
    file = open_safetensors(tmp_path / "t")
    assert file.metadata == {"a": "b"}
    assert file.specs.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert same(file.read(name), expected)
        assert file.specs[name] == (expected.dtype.name, expected.shape)


def test_every_array_is_aligned_to_its_type(tmp_path):
    write_tensors(tmp_path / "t", every_type())
    file = open_safetensors(tmp_path / "t")
    for name, spec in file.specs.items():
        assert file.starts[name] % DTYPES[spec.dtype].itemsize == 0


def test_rows_are_slices_along_the_first_axis(tmp_path):
    x = RNG.normal(size=(7, 3, 2)).astype(ml_dtypes.bfloat16)
    write_tensors(tmp_path / "t", {"x": x, "y": np.arange(5.0)})
    file = open_safetensors(tmp_path / "t")
    assert same(file.read_rows("x", 2, 5), x[2:5])
    assert same(file.read_rows("x", 7, 7), x[7:])
    assert same(file.read_rows("y", 4, 5), np.array([4.0]))


@pytest.mark.parametrize("rows", [(-1, 2), (0, 8), (3, 2)])
def test_rows_that_are_not_there_are_an_error(tmp_path, rows):
    write_tensors(tmp_path / "t", {"x": np.zeros((7, 3))})
    with pytest.raises(UsageError, match=r"'x' of shape \(7, 3\) has no rows"):
        open_safetensors(tmp_path / "t").read_rows("x", *rows)


def test_a_name_that_is_not_there_is_an_error(tmp_path):
    write_tensors(tmp_path / "t", {"x": np.zeros(2)})
    with pytest.raises(UsageError, match="has no tensor 'y'"):
        open_safetensors(tmp_path / "t").read("y")


def test_bytes_are_copied_in_slices(tmp_path):
    x = RNG.integers(0, 256, 1000).astype(np.uint8)
    write_tensors(tmp_path / "t", {"x": x, "none": np.zeros((0, 2))})
    pieces = []

    class Sink:
        def write(self, data):
            pieces.append(bytes(data))

    file = open_safetensors(tmp_path / "t")
    file.copy("x", Sink(), chunk=300)
    assert [len(piece) for piece in pieces] == [300, 300, 300, 100]
    assert b"".join(pieces) == x.tobytes()
    file.copy("none", nothing := io.BytesIO())
    assert nothing.getvalue() == b""


def test_reading_rows_and_copying_take_the_memory_of_a_slice(tmp_path):
    write_tensors(tmp_path / "t", {"x": np.zeros((4096, 4096), np.uint8)})
    file = open_safetensors(tmp_path / "t")
    tracemalloc.start()
    try:
        file.read_rows("x", 100, 200)
        specs = {"x": TensorSpec("uint8", (4096, 4096))}
        with open_writer(tmp_path / "u", specs) as writer:
            file.copy("x", writer.sink("x"), chunk=2**19)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20
    assert (tmp_path / "u").read_bytes() == (tmp_path / "t").read_bytes()


def test_arrays_may_come_in_any_order_and_layout(tmp_path):
    tensors = {
        "rows": RNG.normal(size=(3000, 700)).astype(np.float32),
        "transposed": RNG.normal(size=(40, 30)).T,
        "swapped": np.arange(5, dtype=">i4"),
    }
    specs = {k: TensorSpec(v.dtype.name, v.shape) for k, v in tensors.items()}
    with open_writer(tmp_path / "t", specs) as writer:
        for name in ("swapped", "rows", "transposed"):
            writer.write(name, tensors[name])
    found = safetensors.numpy.load_file(tmp_path / "t")
    assert all((found[name] == tensors[name]).all() for name in tensors)


def test_a_record_holds_the_hash_of_the_file(tmp_path):
    import hashlib

    write_tensors(tmp_path / "t.safetensors", {"x": np.zeros(3), "y": np.ones(2)})
    record = record_file(tmp_path / "t.safetensors")
    data = (tmp_path / "t.safetensors").read_bytes()
    assert record.sha256 == hashlib.sha256(data).hexdigest()
    assert (record.name, record.tensors, record.size) == (
        "t.safetensors", ("x", "y"), 40,
    )  # fmt: skip


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_are_as_open_as_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "t", {"x": np.zeros(3)})
    finally:
        os.umask(before)
    assert (tmp_path / "t").stat().st_mode & 0o777 == 0o666 & ~umask


SPECS = {"x": TensorSpec("float32", (2, 3)), "y": TensorSpec("uint8", (4,))}
WRONG = {
    "a name that is not in the header": lambda w: w.write("z", np.zeros(1)),
    "another shape": lambda w: w.write("x", np.zeros((3, 2), np.float32)),
    "another type": lambda w: w.write("x", np.zeros((2, 3))),
    "too many bytes": lambda w: w.append("y", b"12345"),
    "twice": lambda w: [w.write("y", np.zeros(4, np.uint8)) for _ in range(2)],
    "too few bytes": lambda w: w.sink("y").write(b"123"),
    "nothing": lambda w: None,
}


@pytest.mark.parametrize("act", WRONG.values(), ids=WRONG.keys())
def test_data_unlike_the_header_are_an_error_and_leave_nothing(tmp_path, act):
    with pytest.raises(UsageError, match="Tensor '[xyz]'"):
        with open_writer(tmp_path / "t", SPECS) as writer:
            act(writer)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_keeps_the_older_file(tmp_path):
    write_tensors(tmp_path / "t", {"x": np.zeros(3)})
    before = (tmp_path / "t").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        with open_writer(tmp_path / "t", SPECS) as writer:
            writer.append("y", b"12")
            raise KeyboardInterrupt
    assert (tmp_path / "t").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_directory_that_is_missing_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="gone.*cannot be written"):
        write_tensors(tmp_path / "gone" / "t", {"x": np.zeros(3)})


@pytest.mark.parametrize("name", ["__metadata__", "\ud800"])
def test_names_that_no_header_can_hold_are_an_error(tmp_path, name):
    with pytest.raises(UsageError):
        write_tensors(tmp_path / "t", {name: np.zeros(3)})


def test_types_that_no_header_knows_are_an_error(tmp_path):
    with pytest.raises(UsageError, match="complex64 cannot be stored"):
        write_tensors(tmp_path / "t", {"x": np.zeros(3, np.complex64)})
