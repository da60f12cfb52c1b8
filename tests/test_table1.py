"""The program of Table 1: rows, files and wrong flags."""

import json

import jax
import numpy as np
import pytest

from experiments.common.results import read_jsonl
from experiments.table1 import Table1Config, main, measure_row
from kashin_jax.bases import FAMILIES, make_basis
from kashin_jax.theory import eigenvector_ratios

FIELDS = {
    "family", "n", "seeds", "starts", "steps", "eigenvector_minimum",
    "eigenvector_mean", "constant_bound", "gamma", "gaussian_rate", "worst_rate",
    "slowest_step", "seconds", "kashin_jax_version", "jax_version", "device", "seed",
    "date",
}  # fmt: skip


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Records by basis and size, and the files of a small run."""
    out = tmp_path_factory.mktemp("table1")
    arguments = ["--sizes=32,16", "--bases=hadamard,identity", "--seeds=2"]
    arguments += ["--starts=2", "--steps=60"]
    assert main([f"--out={out}", *arguments]) == 0
    files = {path.suffix: path for path in out.iterdir()}
    records = list(map(json.loads, files[".jsonl"].read_text().splitlines()))
    return {(r["family"], r["n"]): r for r in records}, files


def test_there_is_a_row_for_every_basis_and_size_with_every_field(table):
    records, _ = table
    expected = [(f, n) for f in ("identity", "hadamard") for n in (16, 32)]
    assert list(records) == expected
    for record in records.values():
        assert set(record) == FIELDS
        assert record["seeds"] == len(record["gamma"]) == 2
        assert record["starts"] == 2 and record["steps"] == 60


def test_the_identity_has_the_values_known_for_it(table):
    for n in (16, 32):
        record = table[0]["identity", n]
        least = 1 / np.sqrt(n)
        np.testing.assert_allclose(record["eigenvector_minimum"], least, rtol=1e-6)
        np.testing.assert_allclose(record["eigenvector_mean"], least, rtol=1e-6)
        np.testing.assert_allclose(record["constant_bound"], least, rtol=1e-5)


def test_hadamard_of_order_16_is_bounded_by_its_comb(table):
    assert max(table[0]["hadamard", 16]["constant_bound"]) <= 0.5 + 1e-6


def test_eigenvectors_are_those_of_the_bases_of_the_seeds(table):
    bases_key, _ = jax.random.split(jax.random.key(0))
    keys = jax.random.split(bases_key, 2)
    found = [eigenvector_ratios(make_basis("hadamard", k, 16), 16) for k in keys]
    record = table[0]["hadamard", 16]
    means = [f.ratios.mean() for f in found]
    np.testing.assert_allclose(record["eigenvector_mean"], means, rtol=1e-6)
    assert means[0] != means[1]


def test_rates_agree_with_the_bound_that_predicts_them(table):
    for record in table[0].values():
        gammas = np.sqrt(1 - np.square(record["constant_bound"]))
        np.testing.assert_allclose(record["gamma"], gammas, rtol=1e-6)
        assert np.all(np.array(record["constant_bound"]) <= 1)
        worst, slowest = np.array(record["worst_rate"]), record["slowest_step"]
        assert np.all(worst <= np.array(slowest) + 1e-6)
        assert np.all(np.array(slowest) < 1)


def test_table_and_figure_are_written(table):
    _, files = table
    assert set(files) == {".jsonl", ".md", ".png", ".svg"}
    assert files[".png"].read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in files[".svg"].read_text()
    text = files[".md"].read_text()
    command = "python -m experiments.table1 --sizes=32,16 --bases=hadamard,identity"
    assert command in text
    assert "The numbers of the paper's Table 1 are not known to us" in text
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == 6


def test_another_key_draws_other_bases_and_vectors():
    found = [
        measure_row(jax.random.key(seed), "haar", 8, seeds=1, starts=1, steps=1)[
            "gaussian_rate"
        ]
        for seed in (0, 1)
    ]
    assert found[0] != found[1]


def test_another_seed_is_another_record_of_the_file(tmp_path):
    arguments = ["--sizes=8", "--bases=haar", "--seeds=1", "--starts=1", "--steps=1"]
    for seed in (0, 1):
        assert main([f"--out={tmp_path}", f"--seed={seed}", *arguments]) == 0
    first, second = read_jsonl(tmp_path / "table1.jsonl")
    assert (first["seed"], second["seed"]) == (0, 1)
    assert first["gaussian_rate"] != second["gaussian_rate"]


def test_by_default_every_family_is_in_the_table():
    config = Table1Config()
    assert config.bases == ("all",)
    assert {"haar", "butterfly", "householder", "givens"} < set(FAMILIES)


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--sizes=1", "`--sizes` must list whole numbers in [2, 4096]. Got '1'"),
        ("--sizes=many", "`--sizes` must list whole numbers"),
        ("--sizes=", "`--sizes` must be given"),
        ("--bases=qr", "`--bases` must be all or a list of: identity, dct"),
        ("--bases=", "`--bases` must be given"),
        ("--seeds=0", "`--seeds` must be at least 1. Got 0"),
        ("--starts=0", "`--starts` must be at least 1. Got 0"),
        ("--steps=-1", "`--steps` must be at least 0. Got -1"),
        ("--seed=-1", "`--seed` must be in [0, 2147483647]. Got -1"),
        ("--out=", "`--out` must be given"),
    ],
)
def test_a_wrong_flag_is_named(tmp_path, capsys, flag, says):
    out = tmp_path / "out"
    assert main([f"--out={out}", flag]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("table1: ") and says in line
    assert not out.exists()
