"""Flags that several programs share: lists in, command lines and file names out."""

import dataclasses
import shlex

import pytest

from experiments.common.flags import (
    command_line,
    file_stem,
    flag,
    flag_text,
    parse_bases,
    parse_numbers,
    parse_widths,
    plain_differences,
    short_model_name,
)
from kashin_jax import BasisSpec
from kashin_jax.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    bits: tuple[str, ...] = flag(("4",), "")
    model: str = flag("m", "")
    rtol: float = flag(1e-6, "")


def test_numbers_are_sorted_and_come_once():
    assert parse_numbers("bits", ("8", "1", "3", "1"), 1, 8) == [1, 3, 8]


@pytest.mark.parametrize("text", ["0", "9", "-1", "1.5", "x", "", " 4", "1" * 400, "٣"])
def test_other_numbers_are_refused_with_flag_and_bounds(text):
    with pytest.raises(UsageError) as caught:
        parse_numbers("bits", ("4", text), 1, 8)
    assert str(caught.value).startswith("`--bits` must list whole numbers in [1, 8].")
    assert repr(text) in str(caught.value)


def test_widths_are_numbers_sorted_and_come_once():
    found = parse_widths("bits", ("3", "2.5", "2.70", "3.0", "8", "2.7"), 1, 8)
    assert found == [2.5, 2.7, 3, 8]
    assert [type(width) for width in found] == [float, float, int, int]


@pytest.mark.parametrize(
    "text", ["0.999", "8.001", "-2.5", "2.5555", "2.", ".5", "1e0", "nan", "x", "", "٣"]
)
def test_other_widths_are_refused_with_flag_and_bounds(text):
    with pytest.raises(UsageError) as caught:
        parse_widths("bits", ("4", text), 1, 8)
    assert str(caught.value).startswith("`--bits` must list numbers in [1, 8]")
    assert repr(text) in str(caught.value)


def test_bases_come_once_in_the_order_given():
    found = parse_bases(("haar:dct", "hadamard", "haar:dct", "hadamard:hadamard"))
    assert found == [BasisSpec("haar", "dct"), BasisSpec("hadamard", "hadamard")]


def test_an_unknown_basis_names_the_flag_and_the_known():
    with pytest.raises(UsageError, match="`--basis`: Unknown basis `x`. Choose from"):
        parse_bases(("haar", "x"))


def test_values_are_shown_as_they_are_given():
    assert [flag_text(v) for v in (("4", "6"), (), "x", 1e-6, 3)] == [
        "4,6", "", "x", "1e-06", "3"
    ]  # fmt: skip


def test_a_command_line_shows_what_differs_and_what_must_be_shown():
    config = Config(model="a b/{task}")
    command = command_line("glue", config, always=("bits",))
    assert shlex.split(command) == [
        "python", "-m", "experiments.glue", "--bits=4", "--model=a b/{task}"
    ]  # fmt: skip
    assert command_line("x", Config(), always=()) == "python -m experiments.x"


def test_names_of_files_have_what_differs_from_the_plain_run():
    names = {"rtol": "rtol", "bits": ""}
    assert plain_differences(Config(), names) == []
    changed = Config(bits=("2", "3"), rtol=1e-3, model="other")
    assert plain_differences(changed, names) == ["rtol0.001", "2,3"]


@pytest.mark.parametrize(
    ("parts", "stem"),
    [
        (["glue", "a/b"], "glue-a-b"),
        (["glue", "bert-{task}", "x"], "glue-bert-task-x"),
        (["a", "haar:dct,é $(rm)", "1e-06"], "a-haar-dct-rm-1e-06"),
        (["a_b.c", "D9"], "a_b.c-D9"),
    ],
)
def test_file_names_have_no_character_that_shells_mind(parts, stem):
    assert file_stem(parts) == stem


def test_a_model_goes_by_the_name_of_its_directory_or_its_id(tmp_path, monkeypatch):
    (tmp_path / "run" / "hf").mkdir(parents=True)
    assert short_model_name(str(tmp_path / "run")) == "run"
    assert short_model_name(f"{tmp_path}/run/") == "run"
    assert short_model_name(str(tmp_path / "run" / "hf")) == "run"
    assert short_model_name("textattack/roberta-base-RTE") == (
        "textattack/roberta-base-RTE"
    )
    assert short_model_name("runs/bert-{task}/hf") == "bert-{task}"
    assert short_model_name("runs/bert-{task}") == "bert-{task}"
    monkeypatch.chdir(tmp_path / "run" / "hf")
    assert short_model_name(".") == "run"
