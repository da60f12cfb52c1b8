"""The table of weight error against stored bits, beside the Shannon curve."""

import hashlib
import json
import math

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from experiments.rate_distortion import (
    RATE_METHODS,
    SYNTHETIC,
    RateDistortionConfig,
    load_source,
    main,
)

# A whole program on tiny models; its parts have tests of their own.
pytestmark = pytest.mark.slow

USAGE, FILE = 2, 1
SIZE = 2**16
FIELDS = {
    "method", "bits", "stored_bits_per_weight", "mse", "relative_error", "shannon",
    "gap_db", "seconds", "weights_per_second", "effort", "source", "weights", "seed",
    "kashin_jax_version", "jax_version", "device", "note", "matrices", "source_sha256",
    "date",
}  # fmt: skip
MEASURED = (
    "stored_bits_per_weight", "mse", "relative_error", "shannon", "gap_db", "seconds",
    "weights_per_second",
)  # fmt: skip


def table(out, *arguments):
    """Records of a run, by method, and the files that it wrote."""
    assert main([f"--weights={SIZE}", f"--out={out}", *arguments]) == 0
    files = {path.suffix: path for path in out.iterdir()}
    lines = files[".jsonl"].read_text().splitlines()
    return {record["method"]: record for record in map(json.loads, lines)}, files


@pytest.fixture(scope="module")
def gaussian(tmp_path_factory):
    return table(
        tmp_path_factory.mktemp("gaussian"),
        "--bits=3",
        "--methods=nf4-g64,kashin-joint,rotate-k-means,rtn-g128",
        "--effort=fast",
    )


def test_every_record_has_every_field(gaussian):
    records, _ = gaussian
    assert list(records) == ["kashin-joint", "rtn-g128", "nf4-g64", "rotate-k-means"]
    for name, record in records.items():
        assert set(record) == FIELDS
        assert (record["bits"], record["source"]) == (3, "gaussian")
        assert (record["weights"], record["seed"]) == (SIZE, 0)
        assert record["source_sha256"] is None
        assert record["effort"] == ("fast" if name == "kashin-joint" else None)


def test_a_width_that_a_method_lacks_is_a_row_of_dashes_with_the_reason(gaussian):
    record = gaussian[0]["nf4-g64"]
    assert all(record[field] is None for field in MEASURED)
    assert record["note"] == "NF4 exists at 4 bits only. Got bits=3."


def test_a_table_of_dashes_alone_is_still_written(tmp_path):
    records, files = table(tmp_path, "--bits=3", "--methods=nf4-g64")
    assert records["nf4-g64"]["relative_error"] is None
    assert files[".png"].read_bytes().startswith(b"\x89PNG")


def test_sizes_and_shannon_are_those_counted_by_hand(gaussian):
    record = gaussian[0]["rtn-g128"]
    # An fp16 step and a 3-bit zero point per 128 codes of 3 bits.
    assert record["stored_bits_per_weight"] == 3 + 19 / 128
    assert record["shannon"] == pytest.approx(1 / 64 / 2 ** (19 / 64), rel=1e-12)
    ratio = record["relative_error"] / record["shannon"]
    assert 10 ** (record["gap_db"] / 10) == pytest.approx(ratio, rel=1e-9)
    speed = record["weights_per_second"] * record["seconds"]
    assert speed == pytest.approx(SIZE, rel=1e-9)


def test_the_joint_coder_lies_between_shannon_and_the_best_scalar_code(gaussian):
    joint, scalar = gaussian[0]["kashin-joint"], gaussian[0]["rotate-k-means"]
    assert joint["shannon"] < joint["relative_error"] < scalar["relative_error"]
    assert scalar["shannon"] < scalar["relative_error"]
    # Max, 1960: the best eight levels for a normal variable.
    assert scalar["mse"] == pytest.approx(0.03454, rel=0.03)


def test_table_and_figure_are_written(gaussian):
    _, files = gaussian
    assert set(files) == {".jsonl", ".md", ".png"}
    assert files[".png"].read_bytes().startswith(b"\x89PNG")
    text = files[".md"].read_text()
    assert "| Shannon |" in text
    assert "--bits=3" in text
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == 6


@pytest.mark.parametrize("name", SYNTHETIC)
def test_a_synthetic_source_has_unit_variance_and_depends_on_its_seed(name):
    first, again, other = (
        load_source(name, size=2**20, seed=seed).matrices[name] for seed in (0, 0, 1)
    )
    assert first.shape == (1024, 1024)
    assert np.mean(np.square(first)) == pytest.approx(1, abs=0.2)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_outliers_are_four_of_1024_output_columns_thirty_times_the_others():
    (matrix,) = load_source("outlier_columns", size=2**20, seed=0).matrices.values()
    rms = np.sqrt(np.mean(np.square(matrix), axis=0))
    strong = rms > 10 * np.median(rms)
    assert strong.sum() == 4
    assert rms[strong].mean() / rms[~strong].mean() == pytest.approx(30, rel=0.05)


def test_a_file_gives_its_large_floating_matrices_as_kernels(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "a.weight": rng.standard_normal((96, 64)).astype(np.float32),
        "b.weight": rng.standard_normal((67, 97)).astype(ml_dtypes.bfloat16),
        "narrow": np.ones((63, 128), np.float32),
        "vector": np.ones(128, np.float32),
        "tokens": np.ones((64, 64), np.int32),
    }
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(tensors, path)
    matrices = load_source(str(path), size=SIZE, seed=0).matrices
    assert set(matrices) == {"a.weight", "b.weight"}
    for name, matrix in matrices.items():
        np.testing.assert_array_equal(matrix, tensors[name].astype(np.float32).T)


def test_errors_of_a_file_are_those_of_all_its_matrices_together(tmp_path):
    rng = np.random.default_rng(0)
    fine, coarse = np.arange(4.0), np.linspace(-1, 1, 64 * 64).reshape(64, 64)
    tensors = {
        # Four levels, an exact grid for two bits.
        "exact": rng.permuted(np.tile(fine, (80, 16)), axis=1).astype(np.float32),
        "ramp": coarse.astype(np.float32),
    }
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(tensors, path)
    records, _ = table(
        tmp_path / "out", f"--source={path}", "--bits=2", "--methods=uniform"
    )
    record = records["uniform"]
    levels = np.array([-1, -1 / 3, 1 / 3, 1])
    lost = np.sum(np.min((coarse[..., None] - levels) ** 2, axis=-1))
    energy = sum(np.sum(np.square(x, dtype=np.float64)) for x in tensors.values())
    assert record["weights"] == 80 * 64 + 64 * 64
    assert record["source"] == f"{tmp_path.name}/model.safetensors"
    assert record["mse"] == pytest.approx(lost / record["weights"], rel=1e-4)
    assert record["relative_error"] == pytest.approx(lost / energy, rel=1e-4)


def test_each_effort_is_a_row_and_matrices_are_compared_one_by_one(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.standard_normal((256, 256)).astype(np.float32) for name in "abc"
    }
    # Eight levels of each output, an exact grid for three bits, but more of the matrix
    # than codes; and little of the whole energy.
    grid = rng.permuted(np.tile(np.arange(8), (256, 32)), axis=1)
    grid = grid - np.arange(256)[:, None] % 8
    tensors["grid"] = grid.astype(np.float32) / 16
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(tensors, path)
    out = tmp_path / "out"
    arguments = ["--methods=kashin-joint,rtn-g128", "--effort=default,fast", "--bits=3"]
    assert main([f"--out={out}", f"--source={path}", *arguments]) == 0
    files = {file.suffix: file.read_text("utf-8", "replace") for file in out.iterdir()}
    fast, default, rtn = sorted(
        map(json.loads, files[".jsonl"].splitlines()),
        key=lambda record: ["fast", "default", None].index(record["effort"]),
    )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert {r["source_sha256"] for r in (fast, default, rtn)} == {digest}
    assert default["relative_error"] < fast["relative_error"]
    assert set(rtn["matrices"]) == set(tensors)
    assert rtn["matrices"]["grid"] < 1e-6 < default["matrices"]["grid"]
    energy = {name: np.sum(np.square(x)) for name, x in tensors.items()}
    lost = sum(energy[name] * rtn["matrices"][name] for name in tensors)
    assert rtn["relative_error"] == pytest.approx(lost / sum(energy.values()), rel=1e-5)
    won = "loses less than rtn-g128 (3.15 bits) on 3 of 4 matrices"
    assert files[".md"].count(won) == 2


def test_a_source_that_is_coded_exactly_has_no_gap(tmp_path):
    path = tmp_path / "grid.safetensors"
    signs = np.where(np.eye(64) > 0, 1, -1).astype(np.float32)
    safetensors.numpy.save_file({"signs": signs}, path)
    records, files = table(
        tmp_path / "out", f"--source={path}", "--bits=1", "--methods=uniform"
    )
    assert records["uniform"]["relative_error"] == 0
    assert records["uniform"]["gap_db"] is None
    assert ".png" in files


def test_all_stands_for_every_method_that_differs_without_a_model():
    assert "kashin-authors" not in RATE_METHODS
    assert {"kashin", "kashin-joint", "uniform", "nf4-g64"} < set(RATE_METHODS)
    assert RateDistortionConfig().bits == ("2", "3", "4")


@pytest.fixture
def complaint(tmp_path, capsys):
    """Runs a command that must fail cleanly; the line it prints."""

    def run(code, *arguments):
        out = tmp_path / "out"
        assert main([f"--out={out}", *arguments]) == code
        printed = capsys.readouterr()
        assert printed.out == ""
        (line,) = printed.err.splitlines()
        assert line.startswith("rate_distortion: ")
        assert not out.is_dir() or list(out.iterdir()) == []
        return line

    return run


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--source=laplace", "`--source` must be one of gaussian, student_t3"),
        ("--source=", "`--source` must be one of gaussian"),
        ("--effort=huge", "`--effort` must be a list of fast, default, max"),
        ("--weights=65537", "`--weights` must be a multiple of 1024 and at least"),
        ("--weights=64512", "`--weights` must be a multiple of 1024 and at least"),
        ("--weights=-1024", "`--weights` must be a multiple of 1024 and at least"),
        ("--bits=0", "`--bits` must list numbers in [1, 8]"),
        ("--bits=", "`--bits` must be given"),
        ("--seed=-1", "`--seed` must be in [0, 2147483647]. Got -1"),
        ("--methods=gptq", "`--methods` has no `gptq`"),
        ("--methods=kashin-authors", "`--methods` must be all or a list of: kashin"),
        ("--methods=full precision", "`--methods` must be all or a list of: kashin"),
        ("--out=", "`--out` must be given"),
    ],
)
def test_a_wrong_flag_is_named(complaint, flag, says):
    assert says in complaint(USAGE, flag)


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (np.ones((63, 64), np.float32), "has no floating 2-D tensor"),
        (np.ones((64, 64), np.int8), "has no floating 2-D tensor"),
        (np.zeros((64, 64), np.float32), "are all zero"),
        (np.full((64, 64), math.nan, np.float16), "`w` holds 4096 NaN or infinite"),
        (np.full((64, 64), 1e300), "`w` holds 4096 NaN or infinite"),
    ],
)
def test_a_file_without_usable_matrices_is_refused(complaint, tmp_path, tensor, says):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"w": tensor}, path)
    assert says in complaint(FILE, f"--source={path}")


@pytest.mark.parametrize("content", [b"", b"no safetensors at all", None])
def test_a_damaged_or_missing_file_is_named(complaint, tmp_path, content):
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert str(path) in complaint(FILE, f"--source={path}")
