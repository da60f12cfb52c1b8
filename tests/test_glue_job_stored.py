"""Quantized classifiers as `--model`: scored as they are, as in the table."""

import pytest
from tiny_classifier import arguments, given, pick, table

from experiments.common.methods import AS_STORED
from experiments.glue import main
from kashin_jax import Rules, Uniform
from kashin_jax.pipeline import inspect_checkpoint, quantize_checkpoint

__all__ = ["given"]  # fixture

# Quantizing takes longer than compiling does.
# They have a run of their own, in which classifiers are saved and scored again.
pytestmark = [pytest.mark.optimized, pytest.mark.slow]

METHODS = "--methods=kashin-joint,rtn-g128,uniform"
EXACT = ("task", "metric", "value", "log_loss", "examples")
BITS = "stored_bits_per_weight"


@pytest.fixture(scope="module")
def saved(given, tmp_path_factory):
    """The records of a table of two tasks, and the classifiers it kept."""
    directory = tmp_path_factory.mktemp("saved")
    flags = (METHODS, "--bits=2", f"--save={directory}")
    out = tmp_path_factory.mktemp("out")
    return table(given.template, given.data, out, *flags), directory


def assert_same(found, expected, exact=(*EXACT, BITS)):
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert [ours[name] for name in exact] == [theirs[name] for name in exact]
        assert ours["model_bits_per_weight"] == pytest.approx(
            theirs["model_bits_per_weight"], rel=1e-9
        )


@pytest.mark.parametrize("method", ["kashin-joint", "rtn-g128", "uniform"])
def test_a_saved_row_scores_as_it_did_in_the_table(given, saved, tmp_path, method):
    records, directory = saved
    for task in ("sst2", "stsb"):
        (path,) = directory.glob(f"{task}-{method}-2bit*")
        # `--tasks` is not needed: the checkpoint says what it is for.
        found = table(path, given.data, tmp_path / task)
        assert {record["method"] for record in found} == {AS_STORED}
        assert_same(found, pick(records, method=method, task=task))
        assert (
            f"Quantized already by {method.removesuffix('-g128')} at 2 bits"
            in (found[0]["note"])
        )


def test_a_template_scores_a_saved_row_of_each_task(given, saved, tmp_path):
    records, directory = saved
    found = table(directory / "{task}-uniform-2bit", given.data, tmp_path)
    assert_same(found, pick(records, method="uniform"))
    (page,) = tmp_path.glob("*.md")
    assert page.name == "table3_glue.md"
    text = page.read_text()
    assert "| as stored [1] | - | 2.0" in text
    assert "--bits" not in text


def test_layers_that_were_left_alone_stay_so_on_disk(given, tmp_path):
    # After 15 steps the residuals lie between 6.3e-4 and 8.3e-4.
    limits = ("--max_steps=15", "--rtol=7.5e-4")
    flags = ("--methods=kashin-authors", "--tasks=sst2", *limits)
    save = tmp_path / "saved"
    records = table(
        given.root / "bert-sst2", given.data, tmp_path / "out", *flags, f"--save={save}"
    )
    (path,) = save.iterdir()
    kept = [row for row in inspect_checkpoint(path).tensors if row.form == "float32"]
    matrices = [row for row in kept if row.name.endswith("dense.weight")]
    share = pick(records, method="kashin-authors")[0]["converged_share"]
    assert 0 < share < 1
    assert matrices
    found = table(path, given.data, tmp_path / "again")
    expected = pick(records, method="kashin-authors")
    assert_same(found, expected, EXACT)
    # The table counts layers that were to be quantized, the checkpoint those that are.
    assert 4 < found[0][BITS] < 5 < expected[0][BITS]


def test_what_kashin_quantize_writes_is_scored(given, saved, tmp_path):
    records, _ = saved
    source = given.root / "bert-sst2"
    rules = Rules(config=Uniform(bits=2))
    quantize_checkpoint(source, tmp_path / "q", rules)
    found = table(tmp_path / "q", given.data, tmp_path / "out", "--tasks=sst2")
    assert_same(found, pick(records, method="uniform", task="sst2"))


@pytest.mark.parametrize("flag", ["--bits=3", "--methods=uniform", "--save=S"])
def test_a_quantized_model_is_not_quantized_again(given, saved, tmp_path, flag, capsys):
    _, directory = saved
    path = directory / "sst2-uniform-2bit"
    assert main(arguments(path, given.data, tmp_path / "out", flag)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is quantized already and scored as it is" in line
    assert not list((tmp_path / "out").iterdir())
