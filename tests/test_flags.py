"""Flags from dataclasses, and errors as one line and an exit code."""

import dataclasses

import pytest

from experiments.common.flags import check_flags, flag, parse_flags, run_program
from kashin_jax.errors import CheckpointError, DataError, NonFiniteError, UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    name: str = flag("x", "A name.", (bool, "given"))
    count: int = flag(3, "How many.", (lambda n: n > 0, "positive"))
    rate: float = flag(0.5, "How fast.")
    fast: bool = flag(False, "Whether to hurry.")
    items: tuple[str, ...] = flag(("a", "b"), "A list.")

    def __post_init__(self):
        check_flags(self)


def parse(*arguments):
    return parse_flags(Config, "program", list(arguments))


def test_without_flags_the_defaults_hold():
    assert parse() == Config()


def test_flags_have_the_types_of_their_fields():
    config = parse(
        "--name=n", "--count", "7", "--rate=1e-3", "--fast", "--items= c, d ,,e"
    )
    assert config == Config(
        name="n", count=7, rate=1e-3, fast=True, items=("c", "d", "e")
    )


def test_two_parses_do_not_share_state():
    assert parse("--count=7").count == 7
    assert parse().count == 3


def test_the_last_of_two_equal_flags_counts():
    assert parse("--count=7", "--count=8").count == 8


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("--nmae=x", "nmae"),
        ("--count=seven", "--count=seven"),
        ("--count=1.5", "--count=1.5"),
        ("--count=", "--count="),
        ("--rate=fast", "--rate=fast"),
        ("--fast=maybe", "--fast=maybe"),
        ("--count=0", "`--count` must be positive. Got 0."),
        ("--name=", "`--name` must be given. Got ''."),
        ("--name", "name"),
        ("count=3", "`count=3` is not a flag; write `--name=value`."),
        ("--flagfile=/nonexistent", "/nonexistent"),
    ],
)
def test_a_wrong_flag_is_named_in_one_line(argument, named):
    with pytest.raises(UsageError) as caught:
        parse(argument)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def program(run, *arguments):
    return run_program("program", "What it does.", Config, run, list(arguments))


def test_the_exit_code_is_the_programs():
    seen = []

    def run(config):
        seen.append(config)
        return 7

    assert program(run, "--count=5") == 7
    assert seen == [Config(count=5)]


def test_help_shows_the_manual_and_every_flag_and_runs_nothing(capsys):
    assert program(pytest.fail, "--help", "--count=4") == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("What it does.\n")
    for field in dataclasses.fields(Config):
        assert f"{field.name}:" in printed.out
        assert field.metadata["help"] in printed.out
    assert printed.err == ""


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("`--x` is odd."), 2, "program: `--x` is odd."),
        (DataError("`f` is empty."), 1, "program: `f` is empty."),
        (CheckpointError("`f` (two\nlines)."), 1, "program: `f` (two lines)."),
        (NonFiniteError("`w` is NaN."), 1, "program: `w` is NaN."),
        (FileExistsError(17, "File exists", "f"), 1, "File exists: 'f'"),
        (ModuleNotFoundError("No module named 'm'"), 2, "pip install 'kashin_jax["),
        (KeyboardInterrupt(), 130, "the same command goes on from there."),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_a_code(capsys, error, code, line):
    def run(config):
        raise error

    assert program(run) == code
    printed = capsys.readouterr()
    assert line in printed.err
    assert len(printed.err.splitlines()) == 1
    assert printed.out == ""


@pytest.mark.parametrize("error", [ValueError, TypeError, AssertionError])
def test_a_mistake_of_ours_is_not_dressed_up_as_the_users(error):
    def run(config):
        raise error

    with pytest.raises(error):
        program(run)
